# SPDX-License-Identifier: Apache-2.0
"""Tokens into codes and back, by the CUDA kernels on the CPU and by the C++ engine: bit for bit, and within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest

from ..kv import truth
from .arrays import DTYPES, Array, assert_same_bits
from .bounded import Bounded
from .kv import CODECS, Quantized, Room, Tokens, drawn, each_bits, each_codec, each_device, place, quantize

ROOMS = {
    "dense": Room(),
    "heads and tokens": Room(heads=2, tokens=3),
    "channels": Room(channels=16),
    "odd channels": Room(channels=1),
    "transposed": Room(transposed=True),
    "misaligned": Room(misalignment=1),
    "half aligned": Room(misalignment=4),
}
WIDTHS = [16, 48, 64, 80, 96, 128, 256, 512]


def check_codes(q: Quantized, x: Tokens, index: Array | None) -> truth.Codes:
    """Every bit of what a token or a block has; poison is NaN, whatever its codes are."""
    axis, group, separable = CODECS[_codec_of(q)]
    width = x.shape[3]
    want = truth.quantize(
        x.values().astype(np.float32),
        index,
        q.starts,
        q.counts,
        q.bits,
        axis,
        width // (group or width),
        separable,
    )
    found = q.inside()
    filled = q.counts > 0
    chosen = filled if axis == 0 else want.held
    np.testing.assert_array_equal(found.scales[chosen], want.scales[chosen], "steps and minima")
    codes = truth.unpack(found.codes, q.bits)
    compared = want.held[..., None] & ~want.poisoned
    np.testing.assert_array_equal(codes[compared], want.codes[compared], "codes")
    assert not found.codes[~want.held].any()
    if found.channels is not None and want.channels is not None:
        np.testing.assert_array_equal(found.channels[filled], want.channels[filled], "channel factors")
    return want


def _codec_of(q: Quantized) -> str:
    width = q.codes.shape[3] * 8 // q.bits
    group = None if q.axis == 0 or q.scales.shape[4] == 1 else width // q.scales.shape[4]
    return next(name for name, codec in CODECS.items() if codec == (q.axis, group, q.channels is not None))


def check_restored(core: ModuleType, device: str, q: Quantized, index: Array | None, out: Tokens) -> None:
    """Tokens that have codes are written within bounds, and nothing else is."""
    found = core.kv_dequantize(place(core, device), q.argument(core), index, out.argument(core))
    want = q.restored()
    expected, error = out.values(), np.zeros(out.shape)
    for b, h, slot in np.argwhere(want.held):
        token = slot if index is None else index[b, h, slot]
        expected[b, h, token], error[b, h, token] = want.x.value[b, h, slot], want.x.error[b, h, slot]
    stored = Bounded(expected, error).stored(out.dtype)
    with np.errstate(invalid="ignore"):
        off = np.abs(out.values(found) - stored.value)
    right = (off <= np.where(error > 0, stored.error, 0.0)) | (np.isnan(out.values(found)) & np.isnan(expected))
    assert bool(right.all()), f"{int((~right).sum())} elements are off"
    out.check_room(found)


def check(
    core: ModuleType,
    device: str,
    x: Tokens,
    starts: Sequence[int],
    counts: Sequence[Sequence[int]],
    bits: int,
    codec: str,
    index: Array | None = None,
    misalignment: int = 0,
) -> Quantized:
    room = Quantized.room(x.shape, starts, counts, bits, codec, misalignment)
    q = quantize(core, device, x, index, room)
    check_codes(q, x, index)
    check_restored(core, device, q, index, Tokens.of(np.full(x.shape, 5.0), x.dtype, x.room))
    return q


@each_device
@each_bits
@each_codec
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(core: ModuleType, device: str, dtype: str, codec: str, bits: int) -> None:
    x = Tokens.of(drawn((2, 2, 43, 32)), dtype)
    check(core, device, x, (0, 32, 33, 43), ((32, 1, 10), (5, 0, 9)), bits, codec)


@each_device
@each_bits
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(core: ModuleType, device: str, width: int, bits: int) -> None:
    x = Tokens.of(drawn((1, 2, 9, width)), "bfloat16")
    for codec in CODECS:
        check(core, device, x, (0, 7, 9), ((7, 2),), bits, codec)


@each_device
@each_codec
@pytest.mark.parametrize("room", ROOMS)
def test_places_in_memory(core: ModuleType, device: str, room: str, codec: str) -> None:
    for dtype in DTYPES:
        x = Tokens.of(drawn((2, 2, 13, 32)), dtype, ROOMS[room])
        for bits in (2, 8):
            misalignment = ROOMS[room].misalignment
            check(core, device, x, (0, 8, 13), ((8, 5),) * 2, bits, codec, misalignment=misalignment)


@each_device
@each_bits
@each_codec
def test_gathered_tokens(core: ModuleType, device: str, codec: str, bits: int) -> None:
    """Each head has tokens of its own, which the way back puts in their places."""
    rng = np.random.default_rng(1)
    index = np.stack([rng.permutation(30)[:21] for _ in range(4)]).reshape(2, 2, 21).astype(np.int32)
    x = Tokens.of(drawn((2, 2, 30, 48)), "float16")
    check(core, device, x, (0, 16, 17, 21), ((16, 1, 4), (2, 0, 1)), bits, codec, index)


@each_device
@each_codec
def test_long_blocks(core: ModuleType, device: str, codec: str) -> None:
    """More tokens than a thread block takes in one turn, and than one thread block takes."""
    x = Tokens.of(drawn((1, 1, 1500, 16)), "float32")
    check(core, device, x, (0, 1400, 1500), ((1399, 100),), 4, codec)
    x = Tokens.of(drawn((1, 1, 150, 512)), "bfloat16")
    check(core, device, x, (0, 150), ((150,),), 8, codec)


@each_device
@each_bits
@each_codec
def test_special_values(core: ModuleType, device: str, codec: str, bits: int) -> None:
    values = drawn((1, 1, 40, 32))
    values[0, 0, :, 5], values[0, 0, :, 6], values[0, 0, 7], values[0, 0, 8] = 2.0, -0.0, -0.25, 0.0
    values[0, 0, 20:22, 9] = 1e-12, 1e30
    values[0, 0, 23, 10], values[0, 0, 24, 11], values[0, 0, 25, 12] = np.nan, np.inf, -np.inf
    values[0, 0, 30:] = np.where(np.arange(32) % 2, 65504.0, -70000.0)
    values[0, 0, 31] = 0.1
    for dtype in ("float32", "bfloat16"):
        check(core, device, Tokens.of(values, dtype), (0, 8, 16, 24, 40), ((8, 8, 8, 16),), bits, codec)
    for constant in (0.0, -0.0, 1.0, -3.5, 65504.0, -65504.0, 2.0**-24, 0.1, -1e-3, 1e-12):
        x = Tokens.of(np.full((1, 1, 3, 32), constant), "float32")
        q = check(core, device, x, (0, 2, 3), ((2, 1),), bits, codec)
        assert not np.signbit(q.inside().scales[q.inside().scales == 0]).any()


@each_device
@each_codec
def test_nothing_to_do(core: ModuleType, device: str, codec: str) -> None:
    x = Tokens.of(drawn((2, 2, 3, 16)), "float32")
    for starts, counts in (((0,), ((), ())), ((0, 0, 0), ((0, 0),) * 2), ((0, 3), ((0,), (0,)))):
        q = check(core, device, x, starts, counts, 4, codec)
        assert not q.inside().codes.any()
    none = Tokens.of(np.zeros((0, 2, 3, 16)), "float32")
    check(core, device, none, (0, 3), (), 4, codec)


@each_codec
def test_schedules_and_engines_do_not_matter(core: ModuleType, codec: str) -> None:
    x = Tokens.of(drawn((2, 2, 70, 80)), "bfloat16")
    made = []
    for seed in range(4):
        core.set_seed(seed)
        device = "cpu" if seed == 3 else "simt"
        q = check(core, device, x, (0, 64, 70), ((64, 6), (63, 0)), 2, codec)
        made.append([q.codes, q.scales] + ([] if q.channels is None else [q.channels]))
    for other in made[1:]:
        assert_same_bits(made[0], other)


def test_launches(core: ModuleType) -> None:
    x = Tokens.of(drawn((2, 2, 20, 16)), "float32")
    before = core.launches()
    check(core, "simt", x, (0, 16, 20), ((16, 4),) * 2, 4, "separable")
    assert core.launches() - before == 2
