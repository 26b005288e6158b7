# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from .._errors import require
from .._linear import as_linear, is_linear, require_own_calls
from ._linear import SSTLinear, rank_of
from ._watch import warn

Model = TypeVar("Model", bound=nn.Module)
Place = tuple[str, nn.Module, str, nn.Module]

#: Names of the layers that make a model's outputs, which :func:`convert` leaves alone by default.
HEADS = ("lm_head", "embed_out", "output_projection", "head", "classifier", "score", "qa_outputs")


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is the whole of a dotted name, or the end of it from a dot on."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _is_sst(module: nn.Module | None) -> bool:
    return type(module) is SSTLinear


def _parents(model: nn.Module, wanted: Callable[[nn.Module | None], bool]) -> Iterator[Place]:
    """Where every module that is wanted stands, shared ones each time: its dotted name, parent, attribute, itself."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None and wanted(child):
                yield f"{prefix}.{attribute}" if prefix else attribute, parent, attribute, child


def convert(
    model: Model,
    rank: float,
    *,
    skip: Iterable[str] = HEADS,
    frozen_dtype: torch.dtype | None = None,
    gradient: str = "enhanced",
    evaluation: str = "auto",
    backend: str | None = None,
) -> Model:
    """Replaces every linear layer of a model by an :class:`SSTLinear`, in place.

    So are the ``Conv1D`` layers of Transformers' GPT-2, which :func:`merge` makes torch.nn.Linear. Not converted are
    embeddings, norms, layers of other classes (such as the output projection of torch.nn.MultiheadAttention), linear
    layers whose weight needs no gradient, is shared with another module or comes from a parametrisation, and the names
    in ``skip``.

    Args:
        model: any module; its output stays the same up to rounding.
        rank: number of vectors trained at a time in each layer, or a fraction of each layer's min(m, n).
        skip: names of modules as in ``model.named_modules()``, or patterns (``*``); the end of a name, after a dot, is
            enough. Default: heads (``singlepass.spectral.HEADS``).
        frozen_dtype, gradient, evaluation, backend: as for :class:`SSTLinear`.

    Returns:
        Module: the model.

    Raises:
        ValueError: no layer to convert, one with hooks or a patched forward method, a rank larger than a layer, a
            weight that is not finite, or invalid options. The model is unchanged.

    Example:
        >>> import torch
        >>> from singlepass import spectral
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> spectral.convert(model, rank=4, skip=["2"])
        Sequential(
          (0): SSTLinear(in_features=64, out_features=64, rank=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=64, out_features=8, bias=True)
        )
    """
    where = "convert"
    require(isinstance(model, nn.Module), where, "a torch.nn.Module", type(model).__name__, "Pass the model.")
    patterns = [skip] if isinstance(skip, str) else list(skip)
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for pattern in () if skip is HEADS else patterns:
        known = any(_matches(name, pattern) for name in names)
        require(known, where, "names of modules to skip", repr(pattern), "Check its spelling.")
    found = []
    for place in _parents(model, is_linear):
        weight = place[3].weight
        skipped = any(_matches(place[0], pattern) for pattern in patterns)
        if not skipped and uses.get(id(weight)) == 1 and weight.requires_grad:
            found.append(place)
    contract = "torch.nn.Linear or Conv1D layers inside the model, trained, not shared and not in skip"
    converted = any(isinstance(module, SSTLinear) for module in model.modules())
    found_none = "Check skip; a layer alone: SSTLinear.from_linear."
    remedy = "It has been converted already." if converted else found_none
    require(bool(found), where, contract, f"none in {type(model).__name__}", remedy)
    require_own_calls(where, ((name, module) for name, _, _, module in found))
    linears = {id(module): as_linear(module) for _, _, _, module in found}
    layers: dict[int, SSTLinear] = {}
    for name, _, _, module in found:
        linear = linears[id(module)]
        rank_of(f"{where}: layer {name}", rank, min(linear.in_features, linear.out_features))
        finite = bool(linear.weight.isfinite().all())
        require(finite, f"{where}: layer {name}", "a finite weight", "infinities or NaNs", "Mend the weight first.")
    for key, linear in linears.items():
        layers[key] = SSTLinear.from_linear(
            linear, rank, frozen_dtype=frozen_dtype, gradient=gradient, evaluation=evaluation, backend=backend
        )
    for _, parent, attribute, module in found:
        setattr(parent, attribute, layers[id(module)])
    return model


@torch.no_grad()
def merge(model: Model) -> Model:
    """Replaces every :class:`SSTLinear` by a torch.nn.Linear with the same weight, in place, for inference and export.

    A :class:`LorentzLinear` is more than a linear layer and stays. Warns if singular vectors are not of unit length:
    the merged model computes the same, but was trained by another optimizer than :class:`SST`.

    Args:
        model: any module that has such layers.

    Returns:
        Module: the model.

    Raises:
        ValueError: no layer to merge, or a weight that is not finite. The model is unchanged.

    Example:
        >>> import torch
        >>> from singlepass import spectral
        >>> model = spectral.convert(torch.nn.Sequential(torch.nn.Linear(64, 32)), rank=4)
        >>> spectral.merge(model)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
        )
    """
    found = list(_parents(model, _is_sst))
    require(bool(found), "merge", "a model with SSTLinear layers", "none", "A layer alone: to_linear.")
    for name, _, _, layer in found:
        assert isinstance(layer, SSTLinear)
        finite = bool(layer.weight.isfinite().all())
        require(finite, f"merge: {name}", "a finite weight", "infinities or NaNs", "Load a sound checkpoint.")
    off = {name: lengths for name, _, _, layer in found if (lengths := layer._off_unit()) is not None}  # type: ignore[operator]
    if off:
        name, (least, greatest) = max(off.items(), key=lambda item: item[1][1] - item[1][0])
        warn("merge", f"lengths from {least:.3g} to {greatest:.3g} in {name} ({len(off)} of {len(found)} layers)")
    linears: dict[int, nn.Linear] = {}
    for _, parent, attribute, layer in found:
        if id(layer) not in linears:
            linears[id(layer)] = layer._as_linear()  # type: ignore[operator]
        setattr(parent, attribute, linears[id(layer)])
    return model
