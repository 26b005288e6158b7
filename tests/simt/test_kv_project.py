# SPDX-License-Identifier: Apache-2.0
"""Tokens in coordinates of bases, by the CUDA kernels on the CPU and by the C++ engine, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import pytest

from ..kv import truth
from .arrays import DTYPES, Array, assert_same_bits, decode, encode
from .bounded import Bounded
from .kv import DENSE, Room, Tokens, drawn, each_device, place

Groups = tuple[tuple[int, int], ...]  # heads and rank of each
GROUPS: Groups = ((1, 16), (3, 48))
HEADS = [2, 0, 3, 1]
Turns = tuple[Array, Array]


@dataclass
class Case:
    """A call of kv_project_: sources of tokens, the bases of each, cosines and sines for the first."""

    x: list[Tokens]
    bases: list[list[Array]]
    turns: Turns | None = None
    heads: list[int] = field(default_factory=lambda: HEADS)
    room: Room = DENSE  # of the results

    def run(self, core: ModuleType, device: str) -> list[Array]:
        out = []
        for x, own in zip(self.x, self.bases, strict=True):
            batch, heads, length, _ = x.shape
            for basis in own:
                empty = np.full((batch, len(basis) * heads // len(self.heads), length, basis.shape[2]), np.nan)
                out.append(Tokens.of(empty, x.dtype, self.room))
        found = core.kv_project(
            place(core, device),
            [x.argument(core) for x in self.x],
            [basis for own in self.bases for basis in own],
            self.turns,
            [tokens.argument(core) for tokens in out],
            self.heads,
            misalignment=self.room.misalignment,
        )
        values = [tokens.values(array).copy() for tokens, array in zip(out, found, strict=True)]
        for tokens, array in zip(out, found, strict=True):
            tokens.check_room(array)
        return values

    def check(self, core: ModuleType, device: str) -> list[Array]:
        found = self.run(core, device)
        for i, (got, bound) in enumerate(zip(found, self.bounds(), strict=True)):
            wrong = ~(np.abs(got - bound.value) <= bound.error)
            assert not wrong.any(), f"output {i}: {int(wrong.sum())} of {wrong.size} numbers are off"
        return found

    def bounds(self) -> list[Bounded]:
        bounds = []
        for i, (x, own) in enumerate(zip(self.x, self.bases, strict=True)):
            batch, heads, length, width = x.shape
            group = heads // len(self.heads)
            rows = x.values().reshape(batch, len(self.heads), group, length, width)
            cos, sin = (None, None) if self.turns is None or i > 0 else map(decode, self.turns)
            first = 0
            for basis in own:
                chosen = rows[:, self.heads[first : first + len(basis)]].reshape(
                    batch, len(basis) * group, length, width
                )
                repeated = basis.astype(np.float64).repeat(group, 0)
                bounds.append(truth.project(chosen, repeated, cos, sin).stored(x.dtype))
                first += len(basis)
        return bounds


def bases(width: int, groups: Groups = GROUPS, seed: int = 1) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((heads, width, rank)).astype(np.float32) for heads, rank in groups]


def turns(batch: int, length: int, channels: int, dtype: str) -> Turns:
    angles = np.random.default_rng(3).random((batch, length, channels)) * 7.0
    return encode(np.cos(angles), dtype), encode(np.sin(angles), dtype)


def case(group: int = 1, length: int = 37, dtype: str = "float32", room: Room = DENSE, batch: int = 2) -> Case:
    """Keys, which are rotated, and values of other channels."""
    heads = len(HEADS) * group
    k, v = drawn((batch, heads, length, 64)), drawn((batch, heads, length, 48), 9)
    x = [Tokens.of(k, dtype, room), Tokens.of(v, dtype, room)]
    return Case(x, [bases(64), bases(48, seed=7)], turns(1, length, 64, dtype), room=room)


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
@pytest.mark.parametrize(("group", "length"), [(1, 0), (1, 1), (2, 8), (1, 17), (3, 30)])
def test_rows(core: ModuleType, device: str, group: int, length: int) -> None:
    case(group, length, "bfloat16").check(core, device)


@each_device
@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.parametrize("width", [16, 80, 128, 272, 512])
def test_widths_and_ranks(core: ModuleType, device: str, width: int, length: int) -> None:
    x = Tokens.of(drawn((1, 2, length, width)), "float16")
    Case([x], [bases(width, ((1, 144), (1, min(width, 96))))], heads=[1, 0]).check(core, device)


@each_device
@pytest.mark.parametrize("channels", [2, 24, 32, 64])
def test_parts_of_the_channels_are_rotated(core: ModuleType, device: str, channels: int) -> None:
    for dtype in ("bfloat16", "float32"):
        replace(case(dtype="bfloat16"), turns=turns(2, 37, channels, dtype)).check(core, device)


@each_device
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e5, 3.4028e38])
def test_bases_of_any_size(core: ModuleType, device: str, size: float) -> None:
    """Also such as rounding to fewer bits would make infinite."""
    for dtype in DTYPES if size < 1e6 else DTYPES[:2]:
        x = Tokens.of(drawn((1, 4, 20, 16)) / 64.0, dtype)
        signs = [np.sign(basis) * np.float32(size) for basis in bases(16)]
        Case([x], [signs]).check(core, device)


def test_a_sequence_knows_nothing_of_the_others_nor_of_the_schedule(core: ModuleType) -> None:
    for length in (1, 20):
        whole = case(1, length, "bfloat16")
        found = whole.run(core, "simt")
        for seed in range(3):
            core.set_seed(seed)
            assert_same_bits(whole.run(core, "simt"), found)
        parts = [Tokens(t.array[1:], (1, *t.shape[1:]), t.dtype) for t in whole.x]
        assert_same_bits(replace(whole, x=parts).run(core, "simt"), [array[1:] for array in found])


def test_launches(core: ModuleType) -> None:
    """One for keys and values, two for more heads than a launch's arguments hold."""
    before = core.launches()
    case().run(core, "simt")
    assert core.launches() - before == 1
    x = Tokens.of(drawn((1, 40, 2, 16)), "float32")
    Case([x], [bases(16, ((40, 16),))], heads=list(range(39, -1, -1))).check(core, "simt")
    assert core.launches() - before == 3
