# SPDX-License-Identifier: Apache-2.0
"""Calls of this family's ops whose traffic is counted (tests/counting)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from counting import cut
from singlepass._ops import kv as ops

from ..counting.traffic_row import BF16, FP32, NAMES, Row
from ..samples import Sample
from .inputs import Part, attention, quantized, tokens
from .samples import decode, step

PLACES = 8  # for thread blocks on the CPU (csrc/simt/simt.h)


@dataclass(frozen=True)
class Codec:
    bits: int
    block: int
    axis: str = "channel"
    group: int | None = None
    separable: bool = False

    def __str__(self) -> str:
        kind = "separable" if self.separable else f"groups of {self.group}" if self.group else self.axis
        return f"{self.bits} bits, blocks of {self.block}, {kind}"

    def sample(self, back: bool) -> Sample:
        x = tokens((1, 4, 512, 128), BF16)
        starts = tuple(range(0, 513, self.block))
        full = ((self.block,) * (len(starts) - 1),)
        options = {"bits": self.bits, "axis": self.axis}
        q = quantized(x, None, starts, full, **options, group=self.group, separable=self.separable)
        parts, blocks = (q.codes, q.scales, q.channels), (None, q.starts, q.counts)
        options["axis"] = ops.AXES.index(self.axis)
        if back:
            return Sample(ops.dequantize_, (*parts, *blocks, torch.zeros_like(x)), options)
        return Sample(ops.quantize_, (x, *blocks, *parts), options)


CODECS = [
    Codec(4, 128),
    Codec(2, 32),
    Codec(4, 128, "token", separable=True),
    Codec(2, 32, "token", separable=True),
    Codec(2, 128, "token", group=32),
]


def attends(bits: tuple[int, ...], block: int, window: int, **codec: object) -> Sample:
    parts = [Part(b, tuple(range(0, 513, block))) for b in bits]
    shape = {"batch": 1, "heads": 2, "group": 4, "width": 128, "dtype": BF16}
    return decode(attention(parts, **shape, slots=max(window, 1), window=((0, window),), **codec))


def steps(queries: int) -> Sample:
    """New tokens behind others in a window."""
    shape = {"batch": 1, "heads": 2, "group": 4, "width": 128, "dtype": BF16, "queries": queries}
    return step(attention((), **shape, slots=512, window=((0, 512),)))


def partials(bits: tuple[int, ...], window: int, restored: bool = False) -> int:
    """Bytes of what splits leave to be merged: for 2 heads, 4 rows of 128 channels, a maximum and a sum, in float32,
    written and read."""
    costs = [cut.RESTORED if restored else b + 2 for b in bits]
    stretches = [*(cut.Stretch(512, cost) for cost in costs), cut.window(max(window, 1), BF16.itemsize)]
    return 2 * 4 * 2 * 4 * (128 + 2) * sum(cut.splits(stretches, 2, PLACES))


def probes(dtype: torch.dtype) -> Sample:
    q, k = tokens((1, 4, 32, 128), dtype), tokens((1, 1, 256, 128), dtype)
    positions = torch.arange(7, 256, 8)
    return Sample(ops.saliency, (q, k, positions, None, None), {"scale": 128**-0.5})


def projects(dtype: torch.dtype, length: int) -> Sample:
    """Keys, which are rotated, and values of some tokens, on half of the channels."""
    x = [tokens((1, 4, length, 128), dtype), tokens((1, 4, length, 128), dtype, seed=5)]
    bases = [torch.randn(4, 128, 64) for _ in x]
    turns, out = tokens((1, 2, length, 128), dtype)[0], [torch.zeros(1, 4, length, 64, dtype=dtype) for _ in x]
    return Sample(ops.project_, (x, bases, turns[:1], turns[1:], out), {"heads": [0, 1, 2, 3]})


def rows() -> Iterator[Row]:
    for codec in CODECS:
        new = dict.fromkeys(("codes", "scales", "channels"), 0.0)
        yield Row(ops.quantize_, str(codec), partial(codec.sample, False), read=new)
        yield Row(ops.dequantize_, str(codec), partial(codec.sample, True), read={"out": 0.0})
    for bits, block in product(((8,), (4,), (2,), (4, 2)), (128, 32)):
        layout, shallow = f"{' and '.join(map(str, bits))} bits, blocks of {block}", (((4,), 128), ((2,), 32))
        make, deep = partial(attends, bits, block, 0), (bits, block) not in shallow
        yield Row(ops.decode, layout, make, workspace=partials(bits, 0), deep=deep)
    grouped = partial(attends, (2,), 128, 0, separable=False, value_group=32)
    workspace = partials((2,), 0, restored=True)
    yield Row(ops.decode, "2 bits, blocks of 128, groups of 32", grouped, workspace=workspace, deep=True)
    yield Row(ops.decode, "window", partial(attends, (), 128, 128), workspace=partials((), 128))
    for queries in (1, 2):
        layout = f"{queries} token{'s' * (queries > 1)}, window"
        written = {"window_k": queries / 512, "window_v": queries / 512}
        yield Row(ops.step_, layout, partial(steps, queries), workspace=queries * partials((), 512), written=written)
    for dtype in (FP32, BF16):
        yield Row(ops.saliency, NAMES[dtype], partial(probes, dtype), 2, deep=dtype is FP32)
    for dtype, length in product((FP32, BF16), (1, 256)):
        layout = f"{NAMES[dtype]}, {length} token{'s' * (length > 1)}"
        yield Row(ops.project_, layout, partial(projects, dtype, length), read={"out": 0.0})
