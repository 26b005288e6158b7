# SPDX-License-Identifier: Apache-2.0
"""Rational functions and their gradients in float64, with bounds of what float32 arithmetic may be off.

Written from the equations of the sources that ``singlepass._ops.rational`` names, over arrays of shape
(outer, channels, inner); element (o, c, i) has the number (o * channels + c) * inner + i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..simt.bounded import HALF_ULP, Bounded, absolute

Floats = NDArray[np.float64]


@dataclass
class Problem:
    """Inputs as float64 arrays of what is stored; ``a`` and ``b`` are (groups or 1, coefficients)."""

    form: str
    x: Floats
    a: Floats
    b: Floats
    bias: Floats | None = None
    gate: Floats | None = None
    grad: Floats | None = None
    threshold: int = 0
    seed: int = 0


@dataclass
class Truth:
    y: Bounded
    grads: list[Bounded]  # of x, a, b and, where there are, bias and gate


def philox(key: int, low: NDArray[np.uint64], high: int) -> list[NDArray[np.uint64]]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words for each counter."""
    mask = np.uint64(0xFFFFFFFF)
    c = [low & mask, low >> np.uint64(32), np.full_like(low, high & 0xFFFFFFFF), np.full_like(low, high >> 32)]
    k = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (q >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            q & mask,
            (p >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            p & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def _half(words: list[NDArray[np.uint64]], index: int) -> NDArray[np.uint64]:
    return (words[index // 2] >> np.uint64(16 * (index % 2))) & np.uint64(0xFFFF)


def _elements(shape: tuple[int, ...]) -> NDArray[np.uint64]:
    return np.arange(int(np.prod(shape)), dtype=np.uint64).reshape(shape)


def noise(seed: int, shape: tuple[int, ...], stream: int, count: int) -> list[Floats]:
    """Form D's factors, as float32 arithmetic makes them."""
    words = philox(seed, _elements(shape), stream)
    unit = np.float32(0.2) / np.float32(65536.0)
    return [(np.float32(0.9) + _half(words, i).astype(np.float32) * unit).astype(np.float64) for i in range(count)]


def kept(seed: int, shape: tuple[int, ...], threshold: int) -> NDArray[np.bool_]:
    elements = _elements(shape)
    words = philox(seed, elements // np.uint64(8), 0)
    halves = np.stack([_half(words, i) for i in range(8)])
    return np.take_along_axis(halves, (elements % np.uint64(8)).astype(np.int64)[None], 0)[0] >= threshold


def _with_sign_of(s: Bounded, v: Bounded) -> Bounded:
    """v times the sign of s, zero being positive; where rounding may turn the sign, either is right."""
    uncertain = (s.error > 0.0) & (np.abs(s.value) <= s.error)
    return Bounded(
        np.where(s.value < 0.0, -v.value, v.value), v.error + np.where(uncertain, 2.0 * np.abs(v.value), 0.0)
    )


def _horner(coefficients: list[Bounded], x: Bounded) -> tuple[Bounded, Bounded]:
    """The polynomial and its derivative."""
    value, slope = coefficients[-1], Bounded(np.zeros_like(x.value))
    for c in reversed(coefficients[:-1]):
        slope = slope * x + value
        value = value * x + c
    return value, slope


def _sum(terms: Bounded, groups: int, rows: int) -> Floats | Any:
    """Sums over the channels of each group, and over all groups where they share a row: (rows,).

    n additions in float32, in any order, are off by at most n half ulps of the sum of the absolute values.
    """
    outer, channels, inner = terms.value.shape
    shape = (outer, groups, channels // groups, inner)
    axes: tuple[int, ...] = (0, 2, 3) if rows == groups else (0, 1, 2, 3)

    def over(values: Floats) -> Floats:
        return values.reshape(shape).sum(axes).reshape(rows)

    count = terms.value.size / rows
    return Bounded(over(terms.value), over(terms.error) + count * HALF_ULP * over(np.abs(terms.value) + terms.error))


def truth(p: Problem) -> Truth:
    shape = p.x.shape
    groups = max(len(p.a), len(p.b))
    per_group = shape[1] // groups

    def spread(table: Floats) -> list[Bounded]:
        return [Bounded(np.repeat(column, shape[1] // len(table))[None, :, None]) for column in table.T]

    a, b = spread(p.a), spread(p.b)
    factors_a, factors_b = [Bounded(1.0)] * len(a), [Bounded(1.0)] * len(b)
    if p.form == "D":
        factors_a = [Bounded(f) for f in noise(p.seed, shape, 1, len(a))]
        factors_b = [Bounded(f) for f in noise(p.seed, shape, 2, len(b))]
        a = [c * f for c, f in zip(a, factors_a, strict=True)]
        b = [c * f for c, f in zip(b, factors_b, strict=True)]

    z = Bounded(p.x)
    if p.bias is not None:
        z = z + Bounded(p.bias[None, :, None])
    value, slope = _horner(a, z)
    if p.form == "A":
        q, q_slope = _horner([Bounded(np.ones_like(b[0].value)), *map(absolute, b)], absolute(z))
        inside = z
    else:
        first = [] if p.form == "C" else [Bounded(np.zeros_like(b[0].value))]
        inside, q_slope = _horner([*first, *b], z)
        q = absolute(inside) + (0.1 if p.form == "C" else Bounded(1.0))
    q_slope = _with_sign_of(inside, q_slope)
    r = Bounded(1.0) / q
    r = Bounded(r.value, r.error + HALF_ULP * np.abs(r.value))  # a reciprocal is good to an ulp
    f = value * r

    scale = Bounded(1.0)
    if p.threshold > 0:
        alive = kept(p.seed, shape, p.threshold)
        scale = Bounded(np.where(alive, 65536.0 / (65536.0 - p.threshold), 0.0))
        scale = Bounded(scale.value, HALF_ULP * scale.value)
    y = f * scale if p.threshold > 0 else f
    if p.gate is not None:
        y = y * Bounded(p.gate)
    if p.grad is None:
        return Truth(y, [])

    g = Bounded(p.grad) * scale if p.threshold > 0 else Bounded(p.grad)
    grad_gate = g * f
    if p.gate is not None:
        g = g * Bounded(p.gate)
    scaled = g * r
    grad_z = scaled * (slope - f * q_slope)
    h = -(f * scaled)
    if p.form != "A":
        h = _with_sign_of(inside, h)
    powers = [Bounded(np.ones(shape))]
    for _ in range(7):
        powers.append(powers[-1] * z)
    first_power = 0 if p.form == "C" else 1

    grads_a = [_sum(scaled * powers[i] * factors_a[i], groups, len(p.a)) for i in range(len(a))]
    grads_b = []
    for i in range(len(b)):
        power = powers[i + first_power]
        term = h * (absolute(power) if p.form == "A" else power) * factors_b[i]
        total = _sum(term, groups, len(p.b))
        if p.form == "A":
            total = Bounded(np.where(p.b[:, i] < 0.0, -1.0, 1.0) * total.value, total.error)
        grads_b.append(total)
    grads = [grad_z, _columns(grads_a), _columns(grads_b)]
    if p.bias is not None:
        assert per_group > 0
        grads.append(_sum(grad_z, shape[1], shape[1]))
    if p.gate is not None:
        grads.append(grad_gate)
    return Truth(y, grads)


def _columns(columns: list[Bounded]) -> Bounded:
    return Bounded(np.stack([c.value for c in columns], 1), np.stack([c.error for c in columns], 1))
