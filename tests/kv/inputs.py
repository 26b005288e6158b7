# SPDX-License-Identifier: Apache-2.0
"""Tokens in every layout, quantised ones, attention over them, and the truth for all of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from singlepass.kv import Quantized

from ..placed import implementation
from ..simt.bounded import Bounded
from ..tolerances import assert_within
from . import truth
from .places import decode_attention

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WIDTHS = (16, 48, 64, 80, 96, 128, 256, 512)
NAN = float("nan")

# Under TRITON_INTERPRET=1 the tests know Triton's kernels alone: tests/triton/test_interpreter.py runs them so.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ON_GPU = [pytest.param(f"cuda {name}", marks=pytest.mark.gpu) for name in ("native", "triton")]
_ON_CPU = ["triton"] if INTERPRETED else ["native", "eager"]
each_backend = pytest.mark.parametrize("backend", [*_ON_CPU, *([] if INTERPRETED else ["simt"]), *_ON_GPU])
each_cpu_backend = pytest.mark.parametrize("backend", _ON_CPU)
each_bits = pytest.mark.parametrize("bits", [2, 4, 8])
each_dtype = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())


def _within(shape: tuple[int, ...], around: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A part in the middle of something larger."""
    place = tuple(slice(more // 2, more // 2 + size) for size, more in zip(shape, around, strict=True))
    larger = [size + more for size, more in zip(shape, around, strict=True)]
    return lambda memory: memory[: math.prod(larger)].view(larger)[place]


# Name -> a view of that shape into memory that is large enough.
LAYOUTS: dict[str, Callable[[tuple[int, int, int, int]], Callable[[Tensor], Tensor]]] = {
    "contiguous": lambda s: _within(s, (0, 0, 0, 0)),
    "transposed": lambda s: lambda m: m[: math.prod(s)].view(s[0], s[2], s[1], s[3]).transpose(1, 2),
    "sliced": lambda s: _within(s, (0, 2, 3, 0)),
    "narrowed": lambda s: _within(s, (0, 0, 0, 48)),
    "offset": lambda s: lambda m: m[3 : 3 + math.prod(s)].view(s),
    "steps": lambda s: lambda m: m[: 2 * math.prod(s)].view(s[0], s[1], 2 * s[2], s[3])[:, :, ::2],
    "expanded": lambda s: lambda m: m[: math.prod(s[2:])].view(1, 1, *s[2:]).expand(s),
    "one token": lambda s: lambda m: m[: s[0] * s[1] * s[3]].view(s[0], s[1], 1, s[3]).expand(s),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> Tensor:
    """Normal values, of which channel 3 is an outlier far from zero and each token has a size of its own."""
    view = LAYOUTS[layout](shape)
    memory = torch.zeros(8 * (math.prod(shape) + 1000) + 48 * math.prod(shape[:3]), dtype=dtype)
    drawn = torch.randn(shape, generator=generator(seed)) * torch.rand(*shape[:3], 1, generator=generator(seed + 1))
    drawn[..., 3] += 7.0
    x = view(memory)
    if layout in ("expanded", "one token"):
        base = x[:1, :1] if layout == "expanded" else x[:, :, :1]
        base.copy_(drawn[tuple(slice(0, n) for n in base.shape)])
    else:
        x.copy_(drawn)
    return x


def exact(t: Tensor) -> np.ndarray:
    """As NumPy has it; bfloat16 as float32."""
    return (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()


def quantized(
    x: Tensor,
    index: Tensor | None,
    starts: Sequence[int],
    counts: Sequence[Sequence[int]],
    *,
    bits: int,
    axis: str,
    group: int | None = None,
    separable: bool = False,
    backend: str = "eager",
) -> Quantized:
    """The op's own result, in tensors that stand amid others and are full of nonsense where it writes nothing.

    ``counts`` are those of each sequence's first head; its other heads have those of the sequences after it.
    """
    batch, heads, _, width = x.shape
    slots, blocks = starts[-1], len(starts) - 1

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        if dtype == torch.uint8:
            return torch.full((shape[0], shape[1] + 1, *shape[2:]), 0xAB, dtype=dtype)[:, :-1]
        return torch.full((shape[0], shape[1] + 1, *shape[2:]), NAN, dtype=dtype)[:, :-1]

    shape = (blocks, 2, width) if axis == "channel" else (slots, 2, width // (group or width))
    result = Quantized(
        room(torch.uint8, batch, heads, slots, width * bits // 8),
        room(torch.float16, batch, heads, *shape),
        room(torch.float16, batch, heads, blocks, width) if separable else None,
        torch.tensor(starts, dtype=torch.int32),
        torch.from_numpy(truth.head_counts(counts, heads, blocks)),
        bits,
        axis,
    )
    run = implementation("kv_quantize_", backend)
    into = (result.starts, result.counts, result.codes, result.scales, result.channels)
    run(x, index, *into, bits=bits, axis=int(axis == "token"))
    for part in (result.codes, result.scales, result.channels):
        if part is not None:
            outside = part.as_strided(part[:, :1].shape, part.stride(), part.storage_offset() + heads * part.stride(1))
            assert bool(((outside == 0xAB) if part.dtype == torch.uint8 else outside.isnan()).all())
    return result


def check_codes(q: Quantized, x: Tensor, index: Tensor | None = None) -> truth.Codes:
    """Bit for bit, where a token stands: codes, steps, minima and factors; poison is NaN, whatever its codes are."""
    starts, counts = exact(q.starts), exact(q.counts)
    groups = q.scales.shape[4] if q.axis == "token" else 1
    want = truth.quantize(
        exact(x.float()),
        None if index is None else exact(index),
        starts,
        counts,
        q.bits,
        int(q.axis == "token"),
        groups,
        q.channels is not None,
    )
    filled = exact(q.counts) > 0
    chosen = filled if q.axis == "channel" else want.held
    np.testing.assert_array_equal(exact(q.scales)[chosen], want.scales[chosen], "steps and minima")
    codes = truth.unpack(exact(q.codes), q.bits)
    compared = want.held[..., None] & ~want.poisoned
    np.testing.assert_array_equal(codes[compared], want.codes[compared], "codes")
    if q.channels is not None:
        assert want.channels is not None
        np.testing.assert_array_equal(exact(q.channels)[filled], want.channels[filled], "channel factors")
    return want


def restored(q: Quantized) -> truth.Tokens:
    channels = None if q.channels is None else exact(q.channels)
    parts = (exact(q.codes), exact(q.scales), channels, exact(q.starts), exact(q.counts))
    return truth.dequantize(*parts, q.bits, int(q.axis == "token"))


def check_bounds(result: Tensor, bound: Bounded, label: str) -> None:
    stored = bound.stored(NAMES[result.dtype])
    assert_within(result, torch.from_numpy(stored.value.copy()), torch.from_numpy(stored.error.copy()), label)


@dataclass(frozen=True)
class Part:
    """A segment: its bits, where its blocks start, and how many tokens each holds for each sequence (None: all)."""

    bits: int
    starts: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...] | None = None


@dataclass
class Attention:
    """A call of :func:`decode_attention`."""

    q: Tensor
    segments: list[tuple[Quantized, Quantized]]
    window_k: Tensor
    window_v: Tensor
    window: Tensor
    first: Tensor | None = None
    sinks: Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0

    def call(self, backend: str) -> tuple[Tensor, Tensor]:
        options = {"first": self.first, "sinks": self.sinks, "scale": self.scale, "softcap": self.softcap}
        return decode_attention(
            self.q, self.segments, self.window_k, self.window_v, self.window, **options, backend=backend
        )

    def truth(self, backend: str = "native") -> tuple[Bounded, Bounded]:
        """With the bounds of a backend."""
        on_gpu, single = backend in ("simt", "cuda native"), self.q.dtype == torch.float32
        integers = (2 if single else 1) if on_gpu else int(backend == "native" and not single)
        parts = []
        for i, (keys, values) in enumerate(self.segments):
            first = None if self.first is None else exact(self.first[i])
            parts.append((restored(keys), restored(values), first))
        every = np.ones(self.window_k.shape[:3], bool)
        windows = (truth.Tokens.exact(exact(t).astype(np.float64), every) for t in (self.window_k, self.window_v))
        parts.append((*windows, None))
        scale = self.q.shape[3] ** -0.5 if self.scale is None else self.scale
        sinks = None if self.sinks is None else exact(self.sinks).astype(np.float64)
        q = exact(self.q).astype(np.float64)
        return truth.attention(q, parts, exact(self.window), sinks, scale, self.softcap, integers)

    def check(self, backend: str, label: str = "") -> tuple[Tensor, Tensor]:
        out, lse = self.call(backend)
        assert out.dtype == self.q.dtype
        assert lse.dtype == torch.float32
        expected, sums = self.truth(backend)
        check_bounds(out, expected, f"{label} result")
        nothing = torch.from_numpy(np.isneginf(sums.value))
        assert torch.equal(nothing, lse.isneginf()), f"{label}: other rows see nothing"
        assert not bool(out[nothing].any()), f"{label}: a row that sees nothing gives something"
        seen = ~np.isneginf(sums.value)
        check_bounds(lse[~nothing], Bounded(sums.value[seen], sums.error[seen]), f"{label} logarithms of sums")
        return out, lse


def attention(
    parts: Sequence[Part] = (Part(4, (0, 40, 57)), Part(2, (0, 40, 43))),
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 4,
    queries: int = 1,
    width: int = 64,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    key_axis: str = "channel",
    key_group: int | None = None,
    value_group: int | None = None,
    separable: bool = True,
    slots: int = 12,
    window: Sequence[tuple[int, int]] = ((2, 9), (0, 12)),
    layout: str = "contiguous",
    seed: int = 0,
) -> Attention:
    """Random tokens, and nonsense wherever nothing is held."""
    value_width = width if value_width is None else value_width
    segments = []
    for i, part in enumerate(parts):
        full = (tuple(np.diff(part.starts).tolist()),) * batch
        counts = full if part.counts is None else part.counts
        made = []
        for name, channels in (("k", width), ("v", value_width)):
            x = tokens((batch, heads, part.starts[-1], channels), seed=seed + 10 * i + (name == "v"))
            axis = key_axis if name == "k" else "token"
            options = {"group": key_group if name == "k" else value_group, "separable": name == "v" and separable}
            q = quantized(x, None, part.starts, counts, bits=part.bits, axis=axis, **options)
            _spoil(q)
            made.append(q)
        segments.append((made[0], made[1]))
    ends = torch.tensor([window[b % len(window)] for b in range(batch)], dtype=torch.int32).view(batch, 2)
    windows = []
    for j, channels in enumerate((width, value_width)):
        x = tokens((batch, heads, slots, channels), dtype, layout, seed + 100 + j)
        for b in range(batch) if layout not in ("expanded", "one token") else ():
            x[b, :, : int(ends[b, 0])] = NAN
            x[b, :, max(int(ends[b, 1]), 0) :] = NAN
        windows.append(x)
    q = torch.randn(batch, heads * group, queries, width, generator=generator(seed + 200)).to(dtype)
    return Attention(q, segments, windows[0], windows[1], ends)


def _spoil(q: Quantized) -> None:
    """Fills what belongs to no token with nonsense."""
    for b, h, i in np.ndindex(*q.counts.shape):
        empty = slice(int(q.starts[i]) + int(q.counts[b, h, i]), int(q.starts[i + 1]))
        q.codes[b, h, empty] = 0xCD
        if q.axis == "token":
            q.scales[b, h, empty] = NAN
        if int(q.counts[b, h, i]) == 0:
            if q.axis == "channel":
                q.scales[b, h, i] = NAN
            if q.channels is not None:
                q.channels[b, h, i] = NAN
