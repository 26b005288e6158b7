# SPDX-License-Identifier: Apache-2.0
"""The tokens that caches are filled with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .caches import HEADS, PROBES, QUERY_HEADS, SALIENT_RATIO, WIDTH, WINDOW, CacheShape


@dataclass(frozen=True)
class Inputs:
    """One layer's tokens; queries are those of the newest token and, for saliency, of the probes."""

    q: Tensor
    k: Tensor
    v: Tensor
    probes: Tensor
    positions: Tensor


def make_inputs(shape: CacheShape, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, WIDTH, generator=generator, device=device).to(dtype)

    probes = min(PROBES, shape.length // 10)
    positions = torch.randperm(shape.length, generator=generator, device=device)[:probes].sort().values
    positions[-1] = shape.length - 1  # the newest is always one, so that all tokens are seen
    newest, probing = normal(QUERY_HEADS, 1), normal(QUERY_HEADS, probes)
    return Inputs(newest, normal(HEADS, shape.length), normal(HEADS, shape.length), probing, positions)


inputs = lru_cache(maxsize=1)(make_inputs)
Call = Callable[[], Tensor]
Make = Callable[[Inputs], Call]


def split(data: Inputs) -> tuple[int, int]:
    """Where the 2-bit tokens begin, and where the window does."""
    compressed = data.k.shape[2] - WINDOW
    return round(SALIENT_RATIO * compressed), compressed
