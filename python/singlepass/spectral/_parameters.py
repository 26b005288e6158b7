# SPDX-License-Identifier: Apache-2.0
"""The parameters of the layers that an optimizer trains, which others may replace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .._errors import require
from ..optim._shards import is_sharded
from ._linear import SSTLinear, layers_by_parameter

VECTORS = ("active_u", "active_v")
_TRAINED = ("singular_values", *VECTORS)
_ROLES = {"singular_values": "values"} | dict.fromkeys(VECTORS, "vectors")


class LayerParameters:
    """Layers for sparse spectral training, and the places of parameters: modules, and their names there.

    Args:
        given: parameters, those of the layers among them.
        model: whose parameters may be replaced; None: those of the layers.

    Raises:
        ValueError: no layer, a part of one, or parameters that are DTensors.
    """

    def __init__(self, given: Sequence[Tensor], model: nn.Module | None) -> None:
        self.layers = _layers_of(given)
        modules: Iterable[nn.Module] = self.layers if model is None else model.modules()
        self._places = [(module, name) for module in modules for name in module._parameters]
        self._note()

    def _note(self) -> None:
        self._held = [module._parameters.get(name) for module, name in self._places]
        self._roles = {id(getattr(layer, name)): role for layer in self.layers for name, role in _ROLES.items()}

    def role_of(self, p: Tensor) -> str:
        """ "vectors" or "values" of a layer; empty for other parameters."""
        return self._roles.get(id(p), "")

    def replaced(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters whose places others have taken since the last call, each with the new one."""
        news = [module._parameters.get(name) for module, name in self._places]
        pairs = zip(self._held, news, strict=True)
        found = [(old, new) for old, new in pairs if new is not old and new is not None and old is not None]
        if found:
            self._note()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_places": self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose parameters are others."""
        self.__dict__.update(state)
        self._note()


def _layers_of(params: Sequence[Tensor]) -> list[SSTLinear]:
    """The layers of parameters, in their order."""
    owners = layers_by_parameter()
    given = [id(p) for p in params]
    found = list(dict.fromkeys(owners[key] for key in given if key in owners))
    remedy = "Call singlepass.spectral.convert(model, rank) first."
    require(bool(found), "SST", "parameters of SSTLinear layers", "none", remedy)
    for layer in found:
        missing = [name for name in _TRAINED if id(getattr(layer, name)) not in given]
        contract = "singular_values, active_u and active_v of a layer together"
        require(not missing, "SST", contract, f"one without {', '.join(missing)}", "Add all of its parameters.")
        remedy = "Train it by DistributedDataParallel, or let fully_shard wrap a model that is not converted."
        whole = not any(is_sharded(getattr(layer, name)) for name in _TRAINED)
        require(whole, "SST", "whole singular vectors, of which each rank draws", "DTensors", remedy)
    return found
