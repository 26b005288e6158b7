# SPDX-License-Identifier: Apache-2.0
"""Draws the vectors that are active from now on."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import require
from .._ops import spectral as ops
from ._linear import SSTLinear

_MOST_DRAWS = 2**31 - 1


def draws_of(layers: list[SSTLinear]) -> set[int]:
    """How often vectors of these layers were drawn, which their buffers say.

    Raises:
        ValueError: layers on meta, or counts that cannot be, of memory that nobody filled.
    """
    remedy = "A model made on meta has to be filled first: by reset_parameters() of its modules, or a state dict."
    meta = any(layer.draws.is_meta for layer in layers)
    require(not meta, "SST", "layers that have values", "layers on meta", remedy)
    drawn = {int(layer.draws) for layer in layers}
    contract = f"layers whose vectors were drawn 0 to {_MOST_DRAWS} times"
    require(min(drawn) >= 0 and max(drawn) <= _MOST_DRAWS, "SST", contract, sorted(drawn), remedy)
    return drawn


def draw_vectors(
    layers: list[SSTLinear], moments: list[list[Tensor]], seed: int, draw: int, uniform: float, backend: str | None
) -> None:
    """Draws for all layers that are trained, and swaps their vectors, singular values, and the ``moments`` (k,) of the
    values. What a layer draws does not depend on others, nor on whether they are trained."""
    trained = [i for i, layer in enumerate(layers) if layer._is_trained()]
    for device in dict.fromkeys(layers[i].singular_values.device for i in trained):
        ids = [i for i in trained if layers[i].singular_values.device == device]
        here = [layers[i] for i in ids]
        exchange = ops.sample(
            [layer.singular_values.detach() for layer in here],
            ranks=[layer.rank for layer in here],
            ids=ids,
            seed=seed,
            draw=draw,
            uniform=uniform,
            backend=backend,
        )
        none = torch.empty(0, device=device)
        pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for i, layer, change in zip(ids, here, exchange, strict=True):
            pairs.append((layer.active_u, layer.frozen_u, layer.scales_u, change))
            pairs.append((layer.active_v, layer.frozen_v, layer.scales_v, change))
            for values in (layer.singular_values.detach(), *moments[i]):
                pairs.append((values[: layer.rank], values[layer.rank :], none, change))
        ops.swap_(*(list(column) for column in zip(*pairs, strict=True)), backend=backend)
        stored = [p for layer in here for p in (layer.singular_values, *layer.vectors())]
        torch.autograd.graph.increment_version(stored)
