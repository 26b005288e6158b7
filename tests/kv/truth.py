# SPDX-License-Identifier: Apache-2.0
"""What the KV cache's ops should give, in NumPy, written from the contract of ``singlepass._ops.kv``.

Codes, steps, minima and channel factors follow float32 and float16 arithmetic operation by operation, a quotient being
a product with the divisor's rounded reciprocal: they are compared bit for bit. What is read from codes is computed in
float64, with bounds of what float32 arithmetic may be off in any order of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..simt.bounded import HALF_ULP, Bounded

Array = NDArray
LARGEST = np.float32(65504.0)

# Roundings beside those of the sums. A logit: scale and what it multiplies, step or factor, the product, the two sums'
# own sum, twice where a coefficient is rounded first. A weight: exponential (two ulp), quotient, rescaling. In the
# window, GPUs take a float32 as two TF32, which may lose its last bit: two roundings of a query, a key, a weight and a
# value. These are no more: a logit has six beside those of its scale, as nothing is multiplied by steps.
LOGIT_ROUNDINGS = 8
WEIGHT_ROUNDINGS = 32
PIECE = 8  # weights are rescaled to a new maximum at most once in so many tokens, by five roundings
UNDERFLOW = 2.0**-120  # smaller weights may come out as anything up to that

# Codes are multiplied by integers of two signed bytes: queries times steps, and weights times steps, are off by half a
# step of such an integer, and a rounding. Weights have a step for at most so many tokens. Where queries are float32,
# GPUs use two integers for a number, the second for what the first leaves over, in units of its step divided by the
# largest. What is left then are roundings: of a step and its reciprocal (five), a number in steps, two sums. In a logit
# they are fewer than those of a sum of D floats; here the sum itself is exact.
LARGEST_INTEGER = 127 * 256 + 127
INTEGER_ROUNDING = 0.51
INTEGER_ROUNDINGS = 8
INTEGER_PIECE = 128
INTEGERS_MOST = 0.2  # that the worst case of a weight may be off by, before a bound tells nothing


def unpack(packed: Array, bits: int) -> Array:
    """Codes (..., D) of bytes (..., W): channel p * W + w stands in byte w, from bit p * bits on."""
    planes = [(packed >> np.uint8(shift)) & np.uint8(2**bits - 1) for shift in range(0, 8, bits)]
    return np.concatenate(planes, -1)


def rounded_down(x: Array) -> Array:
    """float16 from below."""
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):
        below = np.nextafter(half, np.float16(-np.inf))
    return np.where(half.astype(np.float32) > x, below, half)


def rounded_up(x: Array) -> Array:
    return -rounded_down(-x)


@dataclass
class Codes:
    """What a quantiser should write, codes unpacked; ``held`` (B, H, T) are the slots that a token stands in, and
    ``poisoned`` (B, H, T, D) what should come back as NaN."""

    codes: Array
    scales: Array
    channels: Array | None
    held: Array
    poisoned: Array


def _group(y: Array, finite: Array, bits: int, axis: int) -> tuple[Array, Array, Array, Array]:
    """Codes, steps, minima and poison of groups along ``axis``, which stays in the results with size 1."""
    low, high = y.min(axis, keepdims=True), y.max(axis, keepdims=True)
    minimum = rounded_down(low)
    span = (high - minimum.astype(np.float32)) / np.float32(2**bits - 1)
    step = rounded_up(span)
    with np.errstate(divide="ignore"):
        inverse = np.where(step > 0, np.float32(1.0) / step.astype(np.float32), np.float32(0.0))
    codes = np.rint((y - minimum.astype(np.float32)) * inverse).clip(0, 2**bits - 1)
    bad = ~finite.all(axis, keepdims=True)
    step, minimum = (np.where(bad, np.float16(np.nan), part) for part in (step, minimum))
    return codes.astype(np.uint8), step, minimum, bad


def head_counts(counts: Sequence[Sequence[int]], heads: int, blocks: int) -> Array:
    """Counts (batch, heads, blocks) that differ between heads if they differ between sequences."""
    rows = np.asarray(counts, np.int32).reshape(len(counts), blocks)
    return np.stack([np.roll(rows, -h, 0) for h in range(heads)], 1)


def quantize(
    x: Array, index: Array | None, starts: Array, counts: Array, bits: int, axis: int, groups: int, separable: bool
) -> Codes:
    """x (B, H, L, D) in float32, block by block and head by head."""
    assert x.dtype == np.float32
    batch, heads, _, width = x.shape
    slots, blocks = int(starts[-1]), len(starts) - 1
    shape = (batch, heads, blocks, 2, width) if axis == 0 else (batch, heads, slots, 2, groups)
    result = Codes(
        np.zeros((batch, heads, slots, width), np.uint8),
        np.zeros(shape, np.float16),
        np.ones((batch, heads, blocks, width), np.float16) if separable else None,
        np.zeros((batch, heads, slots), bool),
        np.zeros((batch, heads, slots, width), bool),
    )
    for b, h, i in np.ndindex(batch, heads, blocks):
        begin, n = int(starts[i]), int(counts[b, h, i])
        if n == 0:
            continue
        place = slice(begin, begin + n)
        result.held[b, h, place] = True
        rows = x[b, h, place] if index is None else x[b, h, index[b, h, place]]
        finite = np.isfinite(rows)
        y = np.clip(np.where(finite, rows, np.float32(0.0)), -LARGEST, LARGEST)  # the others' groups are poisoned
        if axis == 0:
            codes, step, minimum, bad = _group(y, finite, bits, 0)
            result.scales[b, h, i] = np.concatenate((step, minimum))
            bad = np.broadcast_to(bad, y.shape)
        else:
            if result.channels is not None:
                most = np.where(finite, np.abs(y), np.float32(0.0)).max(0)
                c = np.sqrt(most).astype(np.float16)
                c = np.where(c == 0, np.float16(1.0), c)
                result.channels[b, h, i] = c
                y = y * (np.float32(1.0) / c.astype(np.float32))
            apart = (n, groups, width // groups)
            codes, step, minimum, bad = _group(y.reshape(apart), finite.reshape(apart), bits, 2)
            result.scales[b, h, place] = np.stack((step[..., 0], minimum[..., 0]), 1)
            codes, bad = codes.reshape(y.shape), np.broadcast_to(bad, apart).reshape(y.shape)
        result.codes[b, h, place] = codes
        result.poisoned[b, h, place] = bad
    return result


@dataclass
class Tokens:
    """x^ (B, H, T, D) with its bound, what it is a sum of in absolute values, and which slots hold tokens (B, H, T).
    What can be multiplied as integers has codes times channel factors, steps, and bits beside it."""

    x: Bounded
    magnitude: Array
    held: Array
    codes: Array
    steps: Array
    bits: int = 0

    @property
    def as_integers(self) -> bool:
        return self.bits > 0

    def half_step(self, terms: int, integers: int) -> float:
        """Of ``integers`` of largest 1, of which ``terms`` products with codes add up in 32 bits."""
        largest = min(LARGEST_INTEGER, (2**31 - 1) // (terms * (2**self.bits - 1)))
        return INTEGER_ROUNDING / float(largest) ** integers

    @staticmethod
    def exact(x: Array, held: Array) -> Tokens:
        return Tokens(Bounded(x), np.abs(x), held, np.zeros_like(x), np.zeros_like(x))


def dequantize(
    packed: Array, scales: Array, channels: Array | None, starts: Array, counts: Array, bits: int, axis: int
) -> Tokens:
    """c * (code * step + minimum), in which the inner product is exact in float32."""
    n = unpack(packed, bits).astype(np.float64)
    batch, heads, slots, width = n.shape
    held = np.zeros((batch, heads, slots), bool)
    step, minimum, c = np.zeros_like(n), np.zeros_like(n), np.ones_like(n)
    for b, h, i in np.ndindex(batch, heads, len(starts) - 1):
        place = slice(int(starts[i]), int(starts[i]) + int(counts[b, h, i]))
        held[b, h, place] = True
        if axis == 0:
            parts = scales[b, h, i, :, None]
        else:
            parts = np.moveaxis(np.repeat(scales[b, h, place], width // scales.shape[4], -1), 1, 0)
        step[b, h, place], minimum[b, h, place] = parts[0], parts[1]
        if channels is not None:
            c[b, h, place] = channels[b, h, i]
    x = Bounded(n * step) + Bounded(minimum)
    if channels is not None:
        x = x * Bounded(c)
    as_integers = axis == 0 or scales.shape[4] == 1
    return Tokens(x, c * (n * step + np.abs(minimum)), held, c * n, step, bits if as_integers else 0)


def _logits(q: Array, k: Array, magnitude: Array, scale: float, softcap: float, more: Array | float = 0.0) -> Bounded:
    """Of rows q (R, D) and tokens k (L, D); ``more`` is an error beside those of float32."""
    roundings = q.shape[1] + LOGIT_ROUNDINGS
    x = scale * (q @ k.T)
    error = roundings * HALF_ULP * abs(scale) * (np.abs(q) @ magnitude.T) + more
    if softcap == 0.0:
        return Bounded(x, error)
    # The slope is at most 1; the quotient is rounded twice, the tangent is good to two ulp, the product rounded twice.
    s = softcap * np.tanh(x / softcap)
    return Bounded(s, error + HALF_ULP * (2.0 * np.abs(x) + 6.0 * np.abs(s)))


@dataclass
class Weights:
    """Of rows (R, L): weights, how far they may be off relatively, and the logarithms of the sums."""

    p: Array
    relative: Array
    lse: Bounded


def _softmax(logits: Bounded, seen: Array, sink: float | None, lse: Array | None = None, most: float = 0.01) -> Weights:
    """exp(logit - lse) of what is seen. A bound above ``most`` would tell nothing.

    Weights are relative to a maximum, or to lse itself: the difference, its conversion to another base and the way
    from one maximum to the next are each off by three half ulps of at most 2 S, S the largest logit; the same again in
    the sum that divides.
    """
    s = np.where(seen, logits.value, -np.inf)
    e = np.where(seen, logits.error, 0.0)
    length = s.shape[1]
    given = lse is not None
    if lse is None:
        column = s if sink is None else np.concatenate((s, np.full((len(s), 1), sink)), 1)
        top = column.max(1, initial=-np.inf)
        shift = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            lse = shift + np.log(np.exp(column - shift[:, None]).sum(1))
    finite = np.where(np.isfinite(lse), lse, 0.0)
    p = np.where(seen, np.exp(s - finite[:, None]), 0.0)
    largest = np.maximum(np.abs(np.where(seen, s, 0.0)).max(1, initial=0.0), np.abs(finite))
    if sink is not None:
        largest = np.maximum(largest, abs(sink))
    in_sum = np.zeros(len(p)) if given else (p * np.expm1(e)).sum(1)
    roundings = WEIGHT_ROUNDINGS + length + 5 * -(-length // PIECE)
    common = HALF_ULP * (24.0 * largest + roundings) - np.log1p(-in_sum)
    relative = np.expm1(1.01 * (e + common[:, None]))  # roundings of roundings are less than a hundredth of them
    assert relative.max(initial=0.0) < most, "inputs for which this tells nothing"
    return Weights(p, relative, Bounded(lse, 1.01 * common + 2.0 * HALF_ULP * np.abs(finite)))


def saliency(
    q: Array, k: Array, positions: Array, mask: Array | None, lse: Array | None, scale: float, softcap: float
) -> Bounded:
    batch, heads, length, _ = k.shape
    group, probes = q.shape[1] // heads, q.shape[2]
    value, error = np.zeros((batch, heads, length)), np.zeros((batch, heads, length))
    for b, h, g in np.ndindex(batch, heads, group):
        row = h * group + g
        logits = _logits(q[b, row], k[b, h], np.abs(k[b, h]), scale, softcap)
        seen = np.arange(length) <= positions[:, None]
        if mask is not None:
            seen = seen & mask[b] & mask[b][positions][:, None]
        w = _softmax(logits, seen, None, None if lse is None else lse[b, row])
        value[b, h] += w.p.sum(0)
        error[b, h] += (w.p * w.relative).sum(0)
    return Bounded(value, error + HALF_ULP * group * probes * value + group * probes * UNDERFLOW)


def _integer_queries(q: Array, keys: Tokens, b: int, h: int, some: Array, scale: float, integers: int) -> Array:
    """By how much logits (R, L) are off where the rows q (R, D) are integers."""
    if not keys.as_integers:
        return np.zeros((len(q), int(some.sum())))
    largest = (np.abs(q)[:, None] * keys.steps[b, h][some]).max(2, initial=0.0)
    return keys.half_step(q.shape[1], integers) * abs(scale) * largest * keys.codes[b, h][some].sum(1)


def _integer_weights(p: Array, values: Tokens, b: int, h: int, some: Array, integers: int) -> Array:
    """By how much results (R, D) are off where the weights p (R, L) times steps are integers."""
    if not values.as_integers or not some.any():
        return np.zeros((len(p), values.codes.shape[3]))
    largest = (p * values.steps[b, h][some][:, 0]).max(1)
    return values.half_step(INTEGER_PIECE, integers) * largest[:, None] * values.codes[b, h][some].sum(0)


def attention(
    q: Array,
    parts: list[tuple[Tokens, Tokens, Array | None]],
    window: Array,
    sinks: Array | None,
    scale: float,
    softcap: float,
    integers: int = 0,
) -> tuple[Bounded, Bounded]:
    """Results (B, Hq, Lq, Dv) and logarithms of sums. ``parts`` are keys, values and the first slots to see (B, H) of
    each segment; the last one is the window, of which ``window`` (B, 2) says what it holds. ``integers``: codes are
    multiplied by so many integers for each number."""
    batch, rows, queries, _ = q.shape
    heads, width = parts[0][0].x.value.shape[1], parts[0][1].x.value.shape[3]
    group = rows // heads
    out = np.zeros((2, batch, rows, queries, width))
    sums = np.zeros((2, batch, rows, queries))
    for b, h in np.ndindex(batch, heads):
        seen, tokens, present = [], [], []
        for i, (keys, values, first) in enumerate(parts):
            slots = np.arange(keys.held.shape[2])
            shown = np.broadcast_to(keys.held[b, h], (queries, len(slots)))
            if first is not None:
                shown = shown & (slots >= first[b, h])
            if i == len(parts) - 1:
                ends = window[b, 1] - np.arange(queries - 1, -1, -1)
                shown = (slots >= window[b, 0]) & (slots < ends[:, None])
            some = shown.any(0)
            present.append(some)
            seen.append(shown[:, some])
            tokens.append([t[b, h][some] for t in (keys.x.value, keys.magnitude, values.x.value, values.magnitude)])
        k, k_magnitude, v, v_magnitude = (np.concatenate(t) for t in zip(*tokens, strict=True))
        shown = np.concatenate(seen, 1)
        for row in range(h * group, h * group + group):
            more: Array | float = 0.0
            if integers:
                each = zip(parts, present, strict=True)
                more = np.concatenate(
                    [_integer_queries(q[b, row], keys, b, h, some, scale, integers) for (keys, *_), some in each], 1
                )
            logits = _logits(q[b, row], k, k_magnitude, scale, softcap, more)
            sink = None if sinks is None else float(sinks[row])
            w = _softmax(logits, shown, sink, most=INTEGERS_MOST if integers == 1 else 0.01)
            out[0, b, row] = w.p @ v
            roundings = INTEGER_ROUNDINGS if integers == 2 else 0
            of_sums = 1.01 * (len(k) + LOGIT_ROUNDINGS + roundings) * HALF_ULP
            weights = w.p * (w.relative + (1.0 + w.relative) * of_sums) + UNDERFLOW * shown
            out[1, b, row] = weights @ v_magnitude
            begin, off = 0, w.p * (1.0 + w.relative)
            for (_, values, _), some in zip(parts, present, strict=True):
                end = begin + int(some.sum())
                if integers:
                    out[1, b, row] += _integer_weights(off[:, begin:end], values, b, h, some, integers)
                begin = end
            sums[:, b, row] = w.lse.value, w.lse.error
    return Bounded(*out), Bounded(*sums)


def project(x: Array, basis: Array, cos: Array | None, sin: Array | None) -> Bounded:
    """x (B, H, L, D) @ basis (H, D, R), after cos and sin (B or 1, L, C) have rotated the first C channels of x:
    RoFormer's equation 34 (arXiv 2104.09864), with channel i paired with channel i + C / 2. A sum of D products has D
    roundings, a rotated channel three more; parts in tensor cores' formats carry 21 bits at least."""
    value, magnitude, roundings = x.copy(), np.abs(x), x.shape[3] + 8.0
    if cos is not None and sin is not None:
        half = cos.shape[2] // 2
        c, s = cos[:, None], sin[:, None]
        first, second = x[..., :half], x[..., half : 2 * half]
        value[..., :half] = first * c[..., :half] - second * s[..., :half]
        value[..., half : 2 * half] = second * c[..., half:] + first * s[..., half:]
        magnitude[..., :half] = np.abs(first * c[..., :half]) + np.abs(second * s[..., :half])
        magnitude[..., half : 2 * half] = np.abs(second * c[..., half:]) + np.abs(first * s[..., half:])
        roundings += 3.0
    return Bounded(value @ basis, 1.01 * HALF_ULP * roundings * (magnitude @ np.abs(basis)))
