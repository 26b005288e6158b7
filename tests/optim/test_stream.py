# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' floor: it moves every byte that it claims to move, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from ..tolerances import assert_same_bits
from .steps import GPU_PLACES, NATIVE, Place, normal

each_place = pytest.mark.parametrize("place", [NATIVE, GPU_PLACES[0]])
SIZES = [0, 1, 3, 4, 1023, 32768, 32769, 70001]


@each_place
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("reads", "updates"), [(1, 0), (0, 1), (1, 2), (3, 8)], ids=str)
def test_values_stay(reads: int, updates: int, n: int, place: Place) -> None:
    tensors = [normal((n,), i, device=place.device) for i in range(reads + updates)]
    before = [t.clone() for t in tensors]
    place.function("stream_")(tensors[:reads], tensors[reads:])
    for t, old in zip(tensors, before, strict=True):
        assert_same_bits(t, old)


@each_place
@pytest.mark.parametrize("where", [0, 1, 32767, 32768, 70000])
def test_every_element_is_read_and_written(where: int, place: Place) -> None:
    """A NaN among the reads shows in the same element of every update, and nowhere else."""
    tensors = [normal((70001,), i, device=place.device) for i in range(5)]
    for source in range(2):
        reads, updates = [t.clone() for t in tensors[:2]], [t.clone() for t in tensors[2:]]
        reads[source][where] = math.nan
        place.function("stream_")(reads, updates)
        for u, old in zip(updates, tensors[2:], strict=True):
            assert u[where].isnan()
            u[where] = old[where]
            assert_same_bits(u, old)


@pytest.mark.parametrize(
    ("reads", "updates"),
    [
        ([(4,)] * 4, [(4,)]),
        ([(4,)], [(4,)] * 9),
        ([(4,)], [(5,)]),
    ],
    ids=["four-reads", "nine-updates", "other-sizes"],
)
def test_what_it_cannot_take_is_refused(reads: list[tuple[int, ...]], updates: list[tuple[int, ...]]) -> None:
    tensors = [[torch.ones(shape) for shape in shapes] for shapes in (reads, updates)]
    with pytest.raises(RuntimeError, match=r"stream_: expected .*; got .*\. .*\."):
        Place("native").function("stream_")(*tensors)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="stream_: expected contiguous float32"):
        Place("native").function("stream_")([torch.ones(4, dtype=torch.bfloat16)], [])
