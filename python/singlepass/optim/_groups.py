# SPDX-License-Identifier: Apache-2.0
"""Parameter groups with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._errors import require

_WHERE = "param_groups"


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for any optimizer: weights with ``weight_decay``, and biases, norms and the like without.

    Without weight decay are parameters of fewer than two dimensions, names that a module's own method
    ``no_weight_decay()`` returns (those of timm's models have one, and so have this package's rational activations),
    and parameters with the attribute ``_no_weight_decay = True`` (Mamba's). The singular values of
    :class:`singlepass.spectral.SSTLinear` are a part of a weight: they decay. Modules are searched, not marks on
    parameters, so the model may be wrapped (DistributedDataParallel, torch.compile, ``fully_shard``).

    A parameter that is in several places is taken once, and has no decay if one of them asks for none. Frozen
    parameters (``requires_grad=False``) are left out: to train them later, use ``optimizer.add_param_group``.

    Args:
        model: any module.
        weight_decay: of the first group.

    Returns:
        list: ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``, in the
        order of ``model.named_parameters()``. A group may be empty.

    Raises:
        ValueError: another kind of model, no parameter to train, or FSDP1, whose parameters have lost their shapes.

    Example:
        >>> import torch
        >>> from singlepass.optim import AdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = AdamW(param_groups(model, weight_decay=0.1), lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.1), (3, 0.0)]
    """
    require(isinstance(model, nn.Module), _WHERE, "a torch.nn.Module", type(model).__name__, "Pass the model.")
    without: set[int] = set()
    params: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        flat = type(module).__name__ == "FullyShardedDataParallel"
        remedy = "Wrap the model by fully_shard, or write the groups by hand from the names of the unwrapped model."
        require(not flat, _WHERE, "parameters with their own shapes", f"FullyShardedDataParallel at {name!r}", remedy)
        without |= _without(module)
        params |= {id(p): p for p in module.parameters(recurse=False) if p.requires_grad}
    require(bool(params), _WHERE, "parameters to train", "none", "Call model.requires_grad_(True).")
    ordered = [p for p in model.parameters() if id(p) in params]
    groups = ([p for p in ordered if id(p) not in without], [p for p in ordered if id(p) in without])
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def _without(module: nn.Module) -> set[int]:
    """The ids of parameters for which this module asks for no weight decay."""
    weights = getattr(type(module), "weights_of_one_dimension", ())
    own = dict(module.named_parameters(recurse=False))
    found = {id(p) for name, p in own.items() if _dimensions(p) < 2 and name not in weights}
    found |= {id(p) for p in own.values() if getattr(p, "_no_weight_decay", False)}
    ask = getattr(module, "no_weight_decay", None)
    if callable(ask):
        named = dict(module.named_parameters())
        found |= {id(named[name]) for name in ask() if name in named}
    return found


def _dimensions(p: Tensor) -> int:
    """Of the whole parameter, of which DeepSpeed's ZeRO-3 leaves a flat part."""
    return len(getattr(p, "ds_shape", p.shape))
