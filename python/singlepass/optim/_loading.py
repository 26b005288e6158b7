# SPDX-License-Identifier: Apache-2.0
"""Saved states as the optimizers keep them: in the dtypes they were saved with, and in tensors of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import require

_NOT_LOADED = ("step", "buffer", "backend", "capturable")


def merge_group(current: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group, completed by what it doesn't have.

    Left out are the counters of official implementations, and what says where and how to run.
    """
    kept = {key: value for key, value in current.items() if key != "params"}
    return kept | {key: value for key, value in saved.items() if key not in _NOT_LOADED}


def adopt_tensors(
    where: str, state: dict[str, Any], p: Tensor, names: tuple[str, ...], scales: tuple[str, ...]
) -> dict[str, Any]:
    """Copies of the named states, with the parameter's device and strides, and of the scalars that are there.

    Raises:
        ValueError: a state that is missing, or of another shape than its parameter.
    """
    missing = [name for name in names if name not in state]
    require(not missing, where, f"states {', '.join(names)}", f"no {', '.join(missing)}", "Load a whole state.")
    adopted: dict[str, Any] = {}
    for name in names:
        value = torch.as_tensor(state[name], device=p.device)
        got = tuple(value.shape)
        require(value.shape == p.shape, where, f"{name} of shape {tuple(p.shape)}", got, "Load this model's state.")
        adopted[name] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
    for name in scales:
        if name in state:
            adopted[name] = scalar_like(state[name], p)
    return adopted


def scalar_like(value: Any, p: Tensor) -> Tensor:
    """A float32 tensor of no dimensions on the parameter's device."""
    return torch.as_tensor(value, dtype=torch.float32, device=p.device).reshape(()).clone()
