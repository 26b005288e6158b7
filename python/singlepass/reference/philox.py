# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 (Salmon et al., SC 2011) and stochastic rounding, bit for bit as the kernels compute them."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32(
    key: Tensor | int, counter_low: Tensor, counter_high: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors of 32 random bits each, for a 64-bit key and 128-bit counters given as int64 halves.

    The host does not read a key that is a tensor, which under vmap may be one for each sample.
    """
    counter_high = torch.as_tensor(counter_high, device=counter_low.device).expand_as(counter_low)
    c0, c1 = counter_low & _MASK, (counter_low >> 32) & _MASK
    c2, c3 = counter_high & _MASK, (counter_high >> 32) & _MASK
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps like uint64, whose bits are all that is used
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_halves(seed: int, stream: Tensor | int, numel: int, device: torch.device, first: int = 0) -> Tensor:
    """``numel`` int32 values of 16 random bits, those of elements ``first`` and on: element i has half i % 2 of word
    (i % 8) / 2 of block i / 8."""
    block, lane = first // 8, first % 8
    blocks = torch.arange(block, block + (lane + numel + 7) // 8, device=device, dtype=torch.int64)
    words = torch.stack(philox4x32(seed, blocks, stream), dim=1).reshape(-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=1).reshape(-1)[lane : lane + numel].to(torch.int32)


def stochastic_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, up with probability equal to the discarded fraction.

    ``random`` has int32 values of 16 random bits. Infinities and NaNs stay, and no finite value becomes infinite.
    """
    bits = x.contiguous().view(torch.int32)
    up = bits + random.view(bits.shape)
    up = torch.where((up & 0x7F800000) == 0x7F800000, bits, up) & ~0xFFFF
    return torch.where(x.isfinite(), up.view(torch.float32), x).to(torch.bfloat16)
