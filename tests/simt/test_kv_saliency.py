# SPDX-License-Identifier: Apache-2.0
"""How much attention tokens get from probes, by the CUDA kernels on the CPU and by the C++ engine, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest

from ..kv import truth
from .arrays import DTYPES, Array, assert_same_bits
from .kv import DENSE, Room, Tokens, drawn, each_device, place

POSITIONS = [36, 3, 17, 17, 0, 30, 31, 36]  # in no order, some twice


@dataclass
class Case:
    """A call of kv_saliency."""

    q: Tokens
    k: Tokens
    positions: Array
    mask: Array | None = None
    lse: Array | None = None
    scale: float = 0.125
    softcap: float = 0.0

    def run(self, core: ModuleType, device: str) -> Array:
        tokens = (self.q.argument(core), self.k.argument(core))
        options = {"scale": self.scale, "softcap": self.softcap}
        return core.kv_saliency(place(core, device), *tokens, self.positions, self.mask, self.lse, **options)

    def check(self, core: ModuleType, device: str, label: str = "") -> Array:
        found = self.run(core, device)
        arrays = (self.q.values(), self.k.values(), self.positions, self.mask, self.lse)
        bound = truth.saliency(*arrays, self.scale, self.softcap).stored("float32")
        wrong = ~(np.abs(found.astype(np.float64) - bound.value) <= bound.error)
        assert not wrong.any(), f"{label}: {int(wrong.sum())} of {wrong.size} sums are off"
        return found


def case(
    group: int = 4,
    width: int = 64,
    dtype: str = "float32",
    room: Room = DENSE,
    heads: int = 2,
    length: int = 37,
    positions: list[int] = POSITIONS,
    batch: int = 2,
) -> Case:
    k = Tokens.of(drawn((batch, heads, length, width)), dtype, room)
    q = Tokens.of(drawn((batch, heads * group, len(positions), width), 9), dtype, room)
    return Case(q, k, np.array(positions, np.int64), scale=width**-0.5)


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "room",
    [DENSE, Room(heads=1, tokens=2), Room(channels=1), Room(transposed=True), Room(misalignment=1)],
    ids=["dense", "heads and tokens", "channels", "transposed", "misaligned"],
)
def test_against_float64(core: ModuleType, device: str, room: Room, dtype: str) -> None:
    case(dtype=dtype, room=room).check(core, device)


@each_device
def test_dtypes_may_differ(core: ModuleType, device: str) -> None:
    for first, second in (("float16", "bfloat16"), ("float32", "float16")):
        one, other = case(dtype=first), case(dtype=second)
        one.k = other.k
        one.check(core, device, f"{first} {second}")


@each_device
@pytest.mark.parametrize("group", [1, 2, 7, 8, 16])
def test_groups_of_query_heads(core: ModuleType, device: str, group: int) -> None:
    case(group, heads=1, batch=1, dtype="bfloat16").check(core, device)


@each_device
@pytest.mark.parametrize("width", [16, 48, 80, 96, 128, 512])
def test_widths(core: ModuleType, device: str, width: int) -> None:
    for dtype in ("float32", "float16"):
        case(2, width, dtype, heads=1, batch=1).check(core, device, dtype)


@each_device
@pytest.mark.parametrize("scale", [0.01, 3.0, -0.2, 0.0])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 20.0])
def test_scale_and_cap(core: ModuleType, device: str, scale: float, softcap: float) -> None:
    for dtype in ("float32", "bfloat16"):
        one = case(heads=1, width=32, dtype=dtype)
        one.scale, one.softcap = scale, softcap
        one.check(core, device, dtype)


@each_device
def test_padding(core: ModuleType, device: str) -> None:
    """What stands in padding does not matter; a probe that is padding counts for nothing; all may be padding."""
    one = case(batch=3)
    mask = np.ones((3, 37), bool)
    mask[0, :5], mask[1, [9, 17, 36]], mask[2] = False, False, False
    one.mask = mask
    clean = one.check(core, device)
    assert not clean[np.broadcast_to(~mask[:, None], clean.shape)].any()
    k = np.where(mask[:, None, :, None], one.k.values(), np.nan)
    q = np.where(mask[:, one.positions][:, None, :, None], one.q.values(), np.nan)
    one.k, one.q = Tokens.of(k, "float32"), Tokens.of(q, "float32")
    assert_same_bits([one.run(core, device)], [clean])


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_more_than_the_keys(core: ModuleType, device: str, dtype: str) -> None:
    one = case(dtype=dtype)
    one.lse = (12.0 + 3.0 * np.random.default_rng(0).random((2, 8, 8))).astype(np.float32)
    one.check(core, device)
    one.lse[0, 3] = -np.inf  # a row that saw nothing
    found = one.run(core, device)
    assert bool(np.isfinite(found).all())


@each_device
def test_one_token_and_none(core: ModuleType, device: str) -> None:
    one = case(length=1, positions=[0])
    np.testing.assert_array_equal(one.check(core, device), np.full((2, 2, 1), 4.0, np.float32))
    assert not case(positions=[]).run(core, device).any()
    assert case(length=0, positions=[]).run(core, device).shape == (2, 2, 0)


@each_device
@pytest.mark.parametrize(("width", "dtype"), [(16, "bfloat16"), (160, "float16"), (80, "float32")])
def test_many_tokens(core: ModuleType, device: str, width: int, dtype: str) -> None:
    """More than a tile of rows, and more tokens than a thread block sums over; sums over a row are one. Neighbouring
    probes stand far apart, so that tiles are seen by some of their rows."""
    positions = np.random.default_rng(1).permutation(700)[:40].tolist()
    one = case(4, width, dtype, heads=1, length=700, positions=positions, batch=1)
    found = one.check(core, device)
    assert float(found.sum()) == pytest.approx(160.0, rel=1e-4)


@each_device
def test_poison_that_is_seen_shows(core: ModuleType, device: str) -> None:
    one = case()
    values = one.k.values().copy()
    values[1, 0, 20, 5] = np.nan
    one.k = Tokens.of(values, "float32")
    found = one.run(core, device)
    assert bool(np.isnan(found[1, 0, :37]).all())  # probes after it see all of them
    assert not np.isnan(found[0]).any()
    assert not np.isnan(found[1, 1]).any()


def test_a_sequence_knows_nothing_of_the_others_nor_of_the_schedule(core: ModuleType) -> None:
    whole = case(dtype="bfloat16", length=70)
    found = whole.run(core, "simt")
    for seed in range(3):
        core.set_seed(seed)
        assert_same_bits([whole.run(core, "simt")], [found])
    parts = [Tokens(t.array[1:], (1, *t.shape[1:]), t.dtype) for t in (whole.q, whole.k)]
    alone = Case(parts[0], parts[1], whole.positions, scale=whole.scale)
    assert_same_bits([alone.run(core, "simt")], [found[1:]])


def test_launches(core: ModuleType) -> None:
    one = case()
    before = core.launches()
    one.run(core, "simt")
    assert core.launches() - before == 2
    one.lse = np.full((2, 8, 8), 30.0, np.float32)
    one.run(core, "simt")
    assert core.launches() - before == 3


def test_what_is_not_aligned_or_of_another_dtype_is_copied_first(core: ModuleType) -> None:
    one, other = case(dtype="bfloat16"), case(dtype="float32")
    for q, k, launches in ((one.q, one.k, 2), (other.q, one.k, 3), (case(room=Room(misalignment=1)).q, other.k, 3)):
        before = core.launches()
        Case(q, k, one.positions).run(core, "simt")
        assert core.launches() - before == launches
