# SPDX-License-Identifier: Apache-2.0
"""Tokens of any shape, memory order, gaps and alignment, cut into any blocks: there, back, and attended to."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from singlepass._ops import OPS

from .inputs import (
    NAMES,
    NAN,
    Attention,
    Part,
    _spoil,
    attention,
    check_bounds,
    check_codes,
    quantized,
    restored,
)

widths = st.sampled_from((16, 32, 48, 64, 80, 128, 144, 512))
seeds = st.integers(0, 2**16)


def placed(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, values: Tensor) -> Tensor:
    """Every dimension but the last may be longer in memory, or taken in steps; memory may be in any order, anywhere."""
    rank = len(shape)
    order = [*draw(st.permutations(range(rank - 1))), rank - 1]
    steps = [*(draw(st.sampled_from((1, 1, 1, 2))) for _ in range(rank - 1)), 1]
    longer = [size * step + draw(st.integers(0, 1)) for size, step in zip(shape, steps, strict=True)]
    offset = draw(st.integers(0, 3))
    memory = torch.full((offset + math.prod(longer),), NAN, dtype=dtype)
    stored = memory[offset:].view([longer[d] for d in order]).permute([order.index(d) for d in range(rank)])
    x = stored[tuple(slice(0, size * step, step) for size, step in zip(shape, steps, strict=True))]
    return x.copy_(values)


@dataclass(repr=False)
class Case:
    x: Tensor
    index: Tensor | None
    starts: list[int]
    counts: list[list[int]]
    out: Tensor
    options: dict[str, int | str | bool]

    def __repr__(self) -> str:
        x = f"{tuple(self.x.shape)}:{self.x.stride()}+{self.x.storage_offset()} {self.x.dtype}"
        return f"Case({x}, {self.index is not None}, {self.starts}, {self.counts}, {self.options})"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(seeds))
    batch, heads, length, width = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 30)),
        draw(widths),
    )
    sizes = draw(st.lists(st.integers(0, 9), max_size=5))
    starts = [0, *itertools.accumulate(sizes)]
    indexed = starts[-1] > length or draw(st.booleans())
    index = None
    if indexed:
        index = torch.randint(length, (batch, heads, starts[-1]), generator=generator).int()
    counts = [[draw(st.integers(0, size)) for size in sizes] for _ in range(batch)]
    dtype = draw(st.sampled_from(list(NAMES)))
    axis = draw(st.sampled_from(("channel", "token")))
    values = torch.randn(batch, heads, length, width, generator=generator)
    values = values * 10.0 ** draw(st.integers(-9, 9)) + draw(st.sampled_from((0.0, 0.0, 5.0, -1e3)))
    if draw(st.booleans()):
        some = torch.rand(values.shape, generator=generator) < 0.01
        values = values.masked_fill(some, draw(st.sampled_from((NAN, math.inf, -math.inf, 0.0))))
    options: dict[str, int | str | bool] = {"bits": draw(st.sampled_from((2, 4, 8))), "axis": axis}
    if axis == "token":
        options["group"] = width // draw(st.sampled_from([n for n in (1, 2, 4, 16, width) if width % n == 0]))
        options["separable"] = draw(st.booleans())
    x = placed(draw, values.shape, dtype, values)
    out = placed(draw, values.shape, draw(st.sampled_from(list(NAMES))), torch.full(values.shape, 3.0))
    return Case(x, index, starts, counts, out, options)


@given(cases())
def test_there_and_back(case: Case) -> None:
    """Bit for bit there, within a rounding back; whatever holds no token is as it was."""
    for backend in ("native", "eager"):
        q = quantized(case.x, case.index, case.starts, case.counts, backend=backend, **case.options)
        want = check_codes(q, case.x, case.index)
        _spoil(q)
        run = OPS["kv_dequantize_"].on(backend)
        out = case.out.clone(memory_format=torch.preserve_format)
        parts = (q.codes, q.scales, q.channels, case.index, q.starts, q.counts, out)
        run(*parts, bits=q.bits, axis=int(q.axis == "token"))
        found = restored(q).x
        # Where two slots of a sequence name one token, either may be there: those are left out.
        expected, error = np.full(out.shape, 3.0), np.zeros(out.shape)
        named = np.zeros(out.shape[:3], int)
        for b, h, slot in np.argwhere(want.held):
            token = slot if case.index is None else int(case.index[b, h, slot])
            named[b, h, token] += 1
            expected[b, h, token], error[b, h, token] = found.value[b, h, slot], found.error[b, h, slot]
        most = torch.finfo(out.dtype).max
        compared = torch.from_numpy(named < 2)[..., None].expand(out.shape)
        nan = torch.from_numpy(np.isnan(expected))
        assert torch.equal(out.isnan()[compared], nan[compared])
        kept = compared & ~nan & torch.from_numpy(np.abs(expected) + error <= most)
        bound = type(found)(expected[kept.numpy()], error[kept.numpy()])
        check_bounds(out[kept], bound, f"{backend} {case}")


@st.composite
def calls(draw: st.DrawFn) -> Attention:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, slots = draw(st.integers(1, 5)), draw(st.integers(0, 20))
    queries = draw(st.integers(1, min(slots, 4) or 4))
    width, value_width = draw(widths), draw(widths)
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
        counts = tuple(tuple(draw(st.integers(0, size)) for size in sizes) for _ in range(batch))
        starts = (0, *itertools.accumulate(sizes))
        parts.append(Part(draw(st.sampled_from((2, 4, 8))), starts, counts))
    window = [tuple(sorted((draw(st.integers(0, slots)), draw(st.integers(0, slots))))) for _ in range(batch)]
    case = attention(
        parts,
        batch=batch,
        heads=heads,
        group=group,
        queries=queries,
        width=width,
        value_width=value_width,
        dtype=draw(st.sampled_from(list(NAMES))),
        key_axis=draw(st.sampled_from(("channel", "token"))),
        value_group=draw(st.sampled_from((None, 16))),
        separable=draw(st.booleans()),
        slots=slots,
        window=window,
        seed=draw(seeds),
    )
    case.softcap = draw(st.sampled_from((0.0, 0.0, 1.0, 30.0)))
    for name in ("q", "window_k", "window_v"):
        t = getattr(case, name)
        setattr(case, name, placed(draw, t.shape, t.dtype, t))
    if draw(st.booleans()):
        case.sinks = torch.randn(heads * group, generator=torch.Generator().manual_seed(draw(seeds)))
    if draw(st.booleans()):
        case.first = torch.tensor(
            [[[draw(st.integers(0, p.starts[-1])) for _ in range(heads)] for _ in range(batch)] for p in parts],
            dtype=torch.int32,
        ).view(len(parts), batch, heads)
    return case


@given(calls())
def test_any_attention(case: Attention) -> None:
    for backend in ("native", "eager"):
        case.check(backend, backend)
