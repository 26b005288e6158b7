# SPDX-License-Identifier: Apache-2.0
"""What providers are judged by before they are timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import Gate
from .caches import CacheShape
from .inputs import Inputs, Make, make_inputs

GATE_SHAPE = CacheShape(2, 300)
# Allowed error of each element relative to the element plus the mean magnitude. Tests judge the last bits.
GATE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}


def compare(got: Tensor, want: Tensor, dtype: torch.dtype, roundings: int = 1) -> Gate:
    """Elementwise."""
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        return Gate(float("inf"))
    error = (got - want).abs() / (roundings * GATE_TOLERANCE[dtype] * (want.abs() + want.abs().mean()))
    return Gate.of([error])


def gate(
    make: Make, truth: Callable[[Inputs], Tensor], dtype: torch.dtype, device: torch.device, roundings: int = 1
) -> Gate:
    """One call on a small cache."""
    data = make_inputs(GATE_SHAPE, dtype, device)
    return compare(make(data)(), truth(data), dtype, roundings)
