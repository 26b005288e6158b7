# SPDX-License-Identifier: Apache-2.0
"""Rounding and random bits, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from singlepass.reference.philox import random_halves as expected_halves
from singlepass.reference.philox import stochastic_bfloat16
from singlepass.triton_kernels._common import (
    bfloat16_bits,
    bfloat16_bits_stochastic,
    maximum,
    one_plus_exp_negative,
    random_halves,
    sign,
)

BLOCK = 1024


@triton.jit
def nearest_kernel(p_x, p_y, block: tl.constexpr):
    i = tl.arange(0, block)
    tl.store(p_y + i, bfloat16_bits(tl.load(p_x + i)))


@triton.jit
def stochastic_kernel(p_x, p_random, p_y, block: tl.constexpr):
    i = tl.arange(0, block)
    tl.store(p_y + i, bfloat16_bits_stochastic(tl.load(p_x + i), tl.load(p_random + i).to(tl.uint32)))


@triton.jit
def halves_kernel(p_y, seed: tl.int64, low: tl.int64, high: tl.int64, start: tl.int64, block: tl.constexpr):
    random = random_halves(seed.to(tl.int64), low.to(tl.int64), high.to(tl.int64), start.to(tl.int64), block)
    tl.store(p_y + tl.arange(0, block), random.to(tl.int32))


@triton.jit
def functions_kernel(p_x, p_exp, p_sign, p_maximum, block: tl.constexpr):
    i = tl.arange(0, block)
    x = tl.load(p_x + i)
    tl.store(p_exp + i, one_plus_exp_negative(tl.abs(x)))
    tl.store(p_sign + i, sign(x))
    tl.store(p_maximum + i, maximum(x, 1.0))


def floats() -> Tensor:
    """Every sign and exponent, with mantissas on both sides of every kind of tie; infinities and NaNs too."""
    high = torch.arange(0, 1 << 16, 257, dtype=torch.int64)
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    special = torch.tensor([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7F7FFFFF, 0x00000001, 0x80000000])
    bits = torch.cat(((high[:, None] << 16 | low).flatten(), special, torch.zeros(1, dtype=torch.int64)))
    bits = bits[: bits.numel() // 2 * 2]
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return torch.cat((bits, torch.zeros(-bits.numel() % BLOCK, dtype=torch.int32))).view(torch.float32)


def test_bfloat16_to_nearest() -> None:
    x = floats()
    y = torch.empty_like(x, dtype=torch.int16)
    for i in range(0, x.numel(), BLOCK):
        nearest_kernel[(1,)](x[i:], y[i:], BLOCK)
    y, expected = y.view(torch.bfloat16), x.to(torch.bfloat16)
    finite = ~x.isnan()
    assert torch.equal(y[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert bool((y[~finite].view(torch.int16) == 0x7FC0).all())


def test_bfloat16_stochastic() -> None:
    x = floats()
    random = torch.randint(1 << 16, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    y = torch.empty_like(x, dtype=torch.int16)
    for i in range(0, x.numel(), BLOCK):
        stochastic_kernel[(1,)](x[i:], random[i:], y[i:], BLOCK)
    expected = stochastic_bfloat16(x, random)
    ordinary = ~x.isnan()
    assert torch.equal(y[ordinary], expected.view(torch.int16)[ordinary])
    assert bool(y.view(torch.bfloat16)[~ordinary].isnan().all())


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345, 2**63 - 1, -3])
@pytest.mark.parametrize("start", [0, 8, BLOCK])
def test_random_halves(seed: int, start: int) -> None:
    low, high = 7, 2**24
    y = torch.empty(BLOCK, dtype=torch.int32)
    halves_kernel[(1,)](y, seed, low, high, start, BLOCK)
    expected = expected_halves(seed, (high << 32) | low, start + BLOCK, torch.device("cpu"))
    assert torch.equal(y, expected[start:])


def test_functions() -> None:
    x = torch.linspace(-100.0, 100.0, BLOCK)
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    exp, sign_, maximum_ = (torch.empty_like(x) for _ in range(3))
    functions_kernel[(1,)](x, exp, sign_, maximum_, BLOCK)
    error = (exp.double() - (1.0 + torch.exp(-x.double().abs()))).abs()
    assert float(error[~x.isnan()].max()) <= 2 * torch.finfo(torch.float32).eps
    assert bool(exp[3].isnan())
    assert torch.equal(sign_[:3], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(sign_[4:], torch.sign(x[4:]))
    assert torch.equal(maximum_[4:], x[4:].clamp(min=1.0))
    assert bool(maximum_[3].isnan())
