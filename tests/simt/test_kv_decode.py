# SPDX-License-Identifier: Apache-2.0
"""Attention over codes, by the CUDA kernels on the CPU and by the C++ engine, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ..kv import truth
from .arrays import DTYPES, Array, assert_same_bits
from .bounded import Bounded
from .kv import DENSE, Quantized, Room, Tokens, drawn, each_bits, each_device, place, quantize

# Codecs of keys and of values.
CODECS = {
    "zipcache": ("channel", "separable"),
    "kivi": ("channel", "group"),
    "token and head": ("token", "token"),
    "groups": ("group", "separable group"),
}
each_codec = pytest.mark.parametrize("codec", CODECS)
# GPUs multiply codes by one integer for each number of 16 bits, and by two for each of 32.
each_size = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


@dataclass(frozen=True)
class Part:
    """A segment: its bits, where its blocks start, and how many tokens each holds for each sequence (None: all)."""

    bits: int
    starts: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...] | None = None


RAGGED = Part(4, (0, 16, 32, 48, 50), ((16, 16, 16, 2), (16, 3, 0, 1)))
MIXES = {
    "8, 4 and 2": (Part(8, (0, 33)), Part(4, (0, 16, 32)), Part(2, (0, 33, 34))),
    "fewer slots than are read at once": (Part(8, (0, 20)), Part(4, (0, 16, 31)), Part(2, (0, 3))),
    "ragged": (RAGGED, Part(2, (0, 40), ((0,), (39,)))),
    "large and small": (Part(4, (0, 130, 200)), Part(2, tuple(range(0, 100, 7)))),
    "a token for each": (Part(4, (0, 1), ((1,), (0,))), Part(2, (0, 1), ((0,), (1,)))),
    "no slots": (Part(4, (0,)), Part(2, (0, 3))),
    "no tokens": (Part(2, (0, 8, 10), ((0, 0), (0, 0))),),
    "none": (),
}


WINDOW_DTYPES = [
    *((dtype,) * 3 for dtype in DTYPES),
    ("float32", "bfloat16", "float16"),
    ("float32", "float16", "bfloat16"),
    ("bfloat16", "float32", "float16"),
    ("float16", "bfloat16", "float32"),
]
# Several splits for the few slots of tests, as many for any batch: they cost nothing, and there is room for all.
CUT = {"places": 1 << 20, "slots": 40, "start": 0, "merge": 0}


@dataclass
class Case:
    """A call of kv_decode. Whatever belongs to no token is nonsense."""

    q: Tokens
    segments: list[tuple[Quantized, Quantized]]
    window_k: Tokens
    window_v: Tokens
    window: Array
    first: Array | None = None
    sinks: Array | None = None
    scale: float = 1.0
    softcap: float = 0.0
    cut: dict[str, int] = field(default_factory=lambda: CUT)

    def run(self, core: ModuleType, device: str) -> tuple[Array, Array]:
        parts = [(keys.argument(core), values.argument(core)) for keys, values in self.segments]
        options = {"scale": self.scale, "softcap": self.softcap}
        windows = (self.window_k.argument(core), self.window_v.argument(core), self.window)
        attention = core.KvAttention(parts, *windows, self.sinks, self.first, **options)
        out = Tokens.of(np.full((*self.q.shape[:3], self.window_v.shape[3]), 7.0), self.q.dtype, self.q.room)
        cut = core.KvDecodeCut(**self.cut)
        found, lse = core.kv_decode(place(core, device), self.q.argument(core), attention, out.argument(core), cut)
        values = out.values(found).copy()
        out.check_room(found)
        return values, lse.reshape(self.q.shape[:3])

    def truth(self, device: str) -> tuple[Bounded, Bounded]:
        integers = 1 if self.q.dtype != "float32" else 2 if device == "simt" else 0
        parts: list[tuple[truth.Tokens, truth.Tokens, Array | None]] = []
        for i, (keys, values) in enumerate(self.segments):
            parts.append((keys.restored(), values.restored(), None if self.first is None else self.first[i]))
        every = np.ones(self.window_k.shape[:3], bool)
        windows = (truth.Tokens.exact(t.values(), every) for t in (self.window_k, self.window_v))
        parts.append((*windows, None))
        sinks = None if self.sinks is None else self.sinks.astype(np.float64)
        return truth.attention(self.q.values(), parts, self.window, sinks, self.scale, self.softcap, integers)

    def check(self, core: ModuleType, device: str, label: str = "") -> tuple[Array, Array]:
        out, lse = self.run(core, device)
        expected, sums = self.truth(device)
        stored = expected.stored(self.q.dtype)
        wrong = ~(np.abs(out - stored.value) <= stored.error)
        assert not wrong.any(), f"{label}: {int(wrong.sum())} of {wrong.size} results are off"
        nothing = np.isneginf(sums.value)
        np.testing.assert_array_equal(np.isneginf(lse), nothing, f"{label}: other rows see nothing")
        assert not out[nothing].any(), f"{label}: a row that sees nothing gives something"
        total = Bounded(sums.value[~nothing], sums.error[~nothing]).stored("float32")
        off = np.abs(lse[~nothing].astype(np.float64) - total.value)
        assert bool((off <= total.error).all()), f"{label}: logarithms of sums are off"
        return out, lse


def _spoil(q: Quantized) -> None:
    """Fills what belongs to no token with nonsense."""
    for b, h, i in np.ndindex(*q.counts.shape):
        empty = slice(int(q.starts[i]) + int(q.counts[b, h, i]), int(q.starts[i + 1]))
        q.codes[b, h, empty] = 0xCD
        if q.axis == 1:
            q.scales[b, h, empty] = np.nan
        if q.counts[b, h, i] == 0:
            if q.axis == 0:
                q.scales[b, h, i] = np.nan
            if q.channels is not None:
                q.channels[b, h, i] = np.nan


def case(
    core: ModuleType,
    parts: Sequence[Part] = (Part(4, (0, 40, 57)), Part(2, (0, 40, 43))),
    *,
    batch: int = 2,
    heads: int = 1,
    group: int = 4,
    queries: int = 1,
    width: int = 64,
    value_width: int | None = None,
    dtype: str = "float32",
    codec: str = "zipcache",
    slots: int = 12,
    window: Sequence[tuple[int, int]] = ((2, 9), (0, 12)),
    room: Room = DENSE,
    seed: int = 0,
) -> Case:
    value_width = width if value_width is None else value_width
    segments = []
    for i, part in enumerate(parts):
        counts = (tuple(np.diff(part.starts).tolist()),) * batch if part.counts is None else part.counts
        made = []
        for j, channels in enumerate((width, value_width)):
            shape = (batch, heads, part.starts[-1], channels)
            x = Tokens.of(drawn(shape, seed + 10 * i + j), "float32")
            to = Quantized.room(shape, part.starts, counts, part.bits, CODECS[codec][j], room.misalignment)
            q = quantize(core, "cpu", x, None, to)
            q = dataclasses.replace(q, codes=q.codes.copy(), scales=q.scales.copy())
            _spoil(q)
            made.append(q)
        segments.append((made[0], made[1]))
    ends = np.array([window[b % len(window)] for b in range(batch)], np.int32).reshape(batch, 2)
    windows = []
    for j, channels in enumerate((width, value_width)):
        x = drawn((batch, heads, slots, channels), seed + 100 + j)
        for b in range(batch):
            x[b, :, : ends[b, 0]] = np.nan
            x[b, :, max(int(ends[b, 1]), 0) :] = np.nan
        windows.append(Tokens.of(x, dtype, room))
    q = np.random.default_rng(seed + 200).standard_normal((batch, heads * group, queries, width))
    return Case(Tokens.of(q, dtype, room), segments, windows[0], windows[1], ends, scale=width**-0.5)


@each_device
@each_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(core: ModuleType, device: str, dtype: str, codec: str) -> None:
    for queries in (1, 3):
        case(core, dtype=dtype, queries=queries, heads=2, codec=codec).check(core, device, f"{queries} queries")


@each_device
@each_codec
@each_size
@pytest.mark.parametrize("mix", MIXES)
def test_segments(core: ModuleType, device: str, mix: str, dtype: str, codec: str) -> None:
    case(core, MIXES[mix], codec=codec, dtype=dtype).check(core, device)


@each_device
@each_bits
@each_size
@pytest.mark.parametrize("width", [16, 48, 64, 80, 96, 128, 256, 512])
def test_widths(core: ModuleType, device: str, width: int, dtype: str, bits: int) -> None:
    """Values may be wider or narrower than keys."""
    for value_width in (width, 32, 112, 128):
        parts = (Part(bits, (0, 9, 41)),)
        for codec in CODECS if value_width == width else ("zipcache",):
            few = {"group": 2, "batch": 1, "slots": 3, "window": ((0, 3),), "dtype": dtype}
            one = case(core, parts, width=width, value_width=value_width, codec=codec, **few)
            one.check(core, device, f"{value_width} {codec}")


@each_device
@each_size
@pytest.mark.parametrize("group", [1, 3, 7, 8, 9, 16])
def test_groups_of_query_heads(core: ModuleType, device: str, group: int, dtype: str) -> None:
    for queries, width in ((1, 128), (2, 64), (1, 512)):
        one = case(core, (RAGGED,), group=group, queries=queries, width=width, dtype=dtype)
        one.check(core, device, f"{queries} queries, {width} channels")


@each_device
@pytest.mark.parametrize("queries", [1, 2, 5, 12])
def test_windows(core: ModuleType, device: str, queries: int) -> None:
    """Anywhere, of any length; the last queries' own tokens are its last, and earlier ones see less."""
    windows = ((0, 0), (5, 5), (12, 12), (0, 12), (3, 4), (11, 12), (0, 1), (4, 9), (9, 4))
    counts = ((16, 16, 16, 2), (16, 3, 0, 1)) * 5
    parts = (dataclasses.replace(RAGGED, counts=counts[: len(windows)]),)
    for some in (parts, ()):
        few = {"batch": len(windows), "window": windows, "width": 32, "group": 2}
        case(core, some, queries=queries, **few).check(core, device)
    case(core, slots=0, window=((0, 0),), queries=queries).check(core, device, "no slots")


@each_device
@pytest.mark.parametrize("dtypes", WINDOW_DTYPES, ids=" ".join)
def test_long_windows(core: ModuleType, device: str, dtypes: tuple[str, str, str]) -> None:
    """Chunks of which the last is not whole, for several warps and splits; queries, keys and values in any dtypes."""
    windows = ((0, 300), (37, 181), (130, 163))
    for heads, group, queries, width, value_width in ((2, 4, 1, 128, 128), (1, 3, 3, 48, 16), (1, 9, 1, 80, 144)):
        few = {"heads": heads, "group": group, "queries": queries, "width": width, "value_width": value_width}
        one = case(core, (), batch=3, slots=300, window=windows, **few)
        tokens = zip((one.q, one.window_k, one.window_v), dtypes, strict=True)
        one.q, one.window_k, one.window_v = (Tokens.of(t.values(), dtype) for t, dtype in tokens)
        one.check(core, device, f"{width} channels")


@each_device
@each_codec
def test_first(core: ModuleType, device: str, codec: str) -> None:
    one = case(core, MIXES["ragged"], heads=3, codec=codec, dtype="float16")
    one.first = np.random.default_rng(0).integers(0, 52, (2, 2, 3)).astype(np.int32)
    one.first[0, 0], one.first[1, 1] = [0, 16, 31], [0, 38, 39]
    one.check(core, device)
    one.first[:] = 0
    found = one.run(core, device)
    one.first = None
    assert_same_bits(list(one.run(core, device)), list(found))


@each_device
@pytest.mark.parametrize("softcap", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_sinks_scale_and_cap(core: ModuleType, device: str, softcap: float, sinks: bool) -> None:
    for scale in (0.02, 0.7):
        one = case(core, queries=2)
        one.softcap, one.scale = softcap, scale
        one.sinks = 4.0 * np.random.default_rng(0).standard_normal(4).astype(np.float32) if sinks else None
        one.check(core, device, f"{scale}")


@each_device
@pytest.mark.parametrize(
    "room",
    [Room(heads=1, tokens=2), Room(channels=1), Room(transposed=True), Room(misalignment=1), Room(misalignment=4)],
    ids=["heads and tokens", "channels", "transposed", "misaligned", "half aligned"],
)
def test_places_in_memory(core: ModuleType, device: str, room: Room) -> None:
    for dtype in DTYPES:
        case(core, dtype=dtype, room=room, width=128, queries=2).check(core, device, dtype)


@each_device
@each_codec
def test_weights_of_very_different_size(core: ModuleType, device: str, codec: str) -> None:
    """Logits that grow, fall, and jump by hundreds: the largest takes over again and again."""
    for seed in range(2):
        one = case(core, (Part(8, (0, 64, 128)), Part(4, (0, 100))), batch=1, window=((0, 12),), codec=codec, seed=seed)
        one.scale = 2.0
        one.q = Tokens.of(np.sign(one.q.values()), "float32")
        one.check(core, device)


@each_device
@each_codec
def test_steps_and_queries_of_any_size(core: ModuleType, device: str, codec: str) -> None:
    """Products of queries and steps lie far outside float16, and so do those of weights and steps."""
    for size, value_size in ((1e-30, 1e4), (1e30, 1e-4), (1e4, 1e4), (1e-4, 1e-6)):
        one = case(core, codec=codec)
        one.q = Tokens.of(one.q.values() * size, "float32")
        one.scale = 0.1 / size
        for _, values in one.segments:
            scales = values.scales.astype(np.float64) * value_size
            values.scales[:] = np.sign(scales) * np.clip(np.abs(scales), 6e-8, 6e4)
        one.check(core, device, f"{size} {value_size}")


@each_device
@each_codec
def test_poison_that_is_seen_shows(core: ModuleType, device: str, codec: str) -> None:
    for which in (0, 1):
        one = case(core, (RAGGED,), heads=2, codec=codec)
        clean = one.run(core, device)
        one.segments[0][which].scales[1, 0, 0, 0, 0] = np.nan
        out, lse = one.run(core, device)
        assert bool(np.isnan(out[1, :4]).all(-1).all()) or (codec in ("kivi", "groups") and which == 1)
        assert bool(np.isnan(out[1, :4]).any(-1).all())
        assert bool(np.isnan(lse[1, :4]).all()) == (which == 0)
        for found, expected in ((out, clean[0]), (lse, clean[1])):
            assert_same_bits([found[0], found[1, 4:]], [expected[0], expected[1, 4:]])


@each_device
def test_splits_hardly_matter(core: ModuleType, device: str) -> None:
    """However a head's slots are cut, also amid blocks."""
    for codec in ("zipcache", "groups"):
        one = case(core, (RAGGED, Part(2, (0, 3, 90))), codec=codec, queries=3)
        for places, slots, start in ((1, 128, 500), (1 << 20, 7, 0), (9, 33, 0)):
            one.cut = {"places": places, "slots": slots, "start": start, "merge": 0}
            one.check(core, device, f"{places} places")


def test_a_sequence_knows_nothing_of_the_others_nor_of_the_schedule(core: ModuleType) -> None:
    whole = case(core, (RAGGED, Part(8, (0, 40))), heads=2, queries=3)
    found = whole.run(core, "simt")
    for seed in range(3):
        core.set_seed(seed)
        assert_same_bits(list(whole.run(core, "simt")), list(found))
    for b in range(2):
        one = slice(b, b + 1)
        segments = [
            tuple(
                dataclasses.replace(
                    part,
                    codes=part.codes[one],
                    scales=part.scales[one],
                    channels=None if part.channels is None else part.channels[one],
                    counts=part.counts[one],
                )
                for part in pair
            )
            for pair in whole.segments
        ]
        tokens = [Tokens(t.array[one], (1, *t.shape[1:]), t.dtype) for t in (whole.q, whole.window_k, whole.window_v)]
        alone: Any = Case(tokens[0], segments, tokens[1], tokens[2], whole.window[one], scale=whole.scale)
        out, lse = alone.run(core, "simt")
        assert_same_bits([out, lse], [found[0][one], found[1][one]])


def test_launches(core: ModuleType) -> None:
    one = case(core)
    before = core.launches()
    one.run(core, "simt")
    assert core.launches() - before == 1


def test_more_segments_than_there_is_room_for(core: ModuleType) -> None:
    one = case(core, (Part(4, (0, 2)),) * 5)
    one.check(core, "cpu")
    with pytest.raises(RuntimeError, match="kv_decode: expected at most 4 segments on CUDA; got 5"):
        one.run(core, "simt")
