# SPDX-License-Identifier: Apache-2.0
"""Tokens in coordinates of bases, rotated or not, against float64."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singlepass._ops import OPS

from ..placed import implementation
from ..tolerances import assert_same_bits
from . import truth
from .inputs import (
    INTERPRETED,
    NAN,
    WIDTHS,
    check_bounds,
    each_backend,
    each_dtype,
    each_layout,
    exact,
    generator,
    tokens,
)

HEADS = [2, 0, 3, 1]
RAGGED = ((1, 16), (3, 32))  # heads and rank of each group


def bases(width: int, groups: tuple[tuple[int, int], ...] = RAGGED, seed: int = 1) -> list[Tensor]:
    return [torch.randn(n, width, rank, generator=generator(seed + i)) for i, (n, rank) in enumerate(groups)]


def room(x: Tensor, its: list[Tensor]) -> list[Tensor]:
    """Places between others, full of nonsense."""
    n = x.shape[1] // len(HEADS)
    shapes = [(len(x), len(basis) * n, x.shape[2] + 3, basis.shape[2]) for basis in its]
    return [torch.full(shape, NAN, dtype=x.dtype)[:, :, 1:-2] for shape in shapes]


def turns(x: Tensor, channels: int, batch: int = 1, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings, halves alike, and so between others."""
    angles = 7.0 * torch.rand(batch, x.shape[2], channels // 2, generator=generator(3)).repeat(1, 1, 2)
    padded = torch.nn.functional.pad(angles, (0, 4)).to(torch.float32)
    return tuple(f(padded).to(dtype or x.dtype)[..., :channels] for f in (torch.cos, torch.sin))


def check(backend: str, x: list[Tensor], its: list[list[Tensor]], rotary: tuple[Tensor, Tensor] | None = None) -> None:
    out = [room(tokens, own) for tokens, own in zip(x, its, strict=True)]
    cos, sin = rotary or (None, None)
    flat = [t for own in its for t in own], [t for own in out for t in own]
    implementation("kv_project_", backend)(x, flat[0], cos, sin, flat[1], heads=HEADS)
    for i, (source, own, places) in enumerate(zip(x, its, out, strict=True)):
        turned = [None if t is None or i > 0 else exact(t).astype(np.float64) for t in (cos, sin)]
        rows = source.unflatten(1, (len(HEADS), -1))
        ends = list(accumulate(len(basis) for basis in own))
        for basis, place, end in zip(own, places, ends, strict=True):
            n = rows.shape[2]
            chosen = exact(rows[:, HEADS[end - len(basis) : end]].flatten(1, 2)).astype(np.float64)
            want = truth.project(chosen, exact(basis.double()).repeat(n, 0), *turned)
            check_bounds(place, want, f"{backend} {i}")
            around = place.as_strided((len(place), place.shape[1], 1), (place.stride(0), place.stride(1), 1), 0)
            assert bool(around.isnan().all())


@each_backend
@each_dtype
@each_layout
def test_against_float64(backend: str, dtype: torch.dtype, layout: str) -> None:
    """Keys, which are rotated, and values of other channels."""
    k, v = tokens((2, 4, 37, 64), dtype, layout), tokens((2, 4, 37, 48), dtype, layout, seed=5)
    check(backend, [k, v], [bases(64), bases(48, seed=7)], turns(k, 64))


@each_backend
@pytest.mark.parametrize("length", [0, 1, 5, 70])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_queries(backend: str, group: int, length: int) -> None:
    q = tokens((2, 4 * group, length, 32))
    check(backend, [q], [bases(32)], turns(q, 32, batch=2))


@each_backend
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_and_ranks(backend: str, width: int) -> None:
    x = tokens((1, 4, 9, width))
    check(backend, [x], [bases(width, ((3, 16), (1, width)))])


@each_backend
@pytest.mark.parametrize("channels", [2, 24, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_channels_are_rotated(backend: str, channels: int, dtype: torch.dtype) -> None:
    """With cosines in the dtype of the tokens, or in float32."""
    x = tokens((2, 4, 9, 48), dtype)
    for other in (dtype, torch.float32):
        check(backend, [x], [bases(48)], turns(x, channels, 2, other))


@each_backend
def test_infinities_and_nan_stay_in_their_row(backend: str) -> None:
    x = tokens((1, 4, 9, 32))
    clean, dirty = room(x, bases(32)), room(x, bases(32))
    run = implementation("kv_project_", backend)
    run([x], bases(32), None, None, clean, heads=HEADS)
    x[0, 2, 4, 3], x[0, 0, 7, 1] = NAN, float("inf")
    run([x], bases(32), None, None, dirty, heads=HEADS)
    assert bool(dirty[0][0, 0, 4].isnan().all())
    assert not bool(dirty[1][0, 0, 7].isfinite().any())
    dirty[0][0, 0, 4], dirty[1][0, 0, 7] = clean[0][0, 0, 4], clean[1][0, 0, 7]
    for a, b in zip(clean, dirty, strict=True):
        assert_same_bits(b, a)


def test_threads_change_nothing(each_thread_count: tuple[int, ...]) -> None:
    x = tokens((2, 8, 700, 64))
    found = []
    for threads in each_thread_count:
        torch.set_num_threads(threads)
        out = room(x, bases(64))
        OPS["kv_project_"].on("native")([x], bases(64), *turns(x, 64), out, heads=HEADS)
        found.append(out)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert_same_bits(b.contiguous(), a.contiguous())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads twice": ({"heads": [0, 0, 1, 2]}, "heads 0 to 3, each once"),
    "too few heads": ({"heads": [0, 1, 2]}, "3 heads"),
    "no heads": ({"heads": []}, "heads"),
    "a basis less": ({"bases": bases(32)[:1]}, "as many bases as outputs"),
    "other channels": ({"bases": bases(48)}, r"bases \("),
    "float64 bases": ({"bases": [t.double() for t in bases(32)]}, r"bases \("),
    "a rank too high": ({"bases": bases(32, ((1, 16), (3, 16)))}, "out "),
    "another dtype": ({"out": [torch.zeros(2, n, 9, r, dtype=torch.float16) for n, r in RAGGED]}, "out "),
    "cos alone": ({"cos": torch.ones(1, 9, 32)}, "both cos and sin"),
    "other tokens": ({"cos": torch.ones(1, 8, 32), "sin": torch.ones(1, 8, 32)}, "cos "),
    "odd channels": ({"cos": torch.ones(1, 9, 3), "sin": torch.ones(1, 9, 3)}, "cos "),
    "other channels of sin": ({"cos": torch.ones(1, 9, 32), "sin": torch.ones(1, 9, 16)}, "sin "),
    "nothing": ({"x": []}, "tokens"),
}


@pytest.mark.parametrize("backend", ["triton"] if INTERPRETED else ["native", "simt"])
@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_arguments_are_refused(case: str, backend: str) -> None:
    x = tokens((2, 4, 9, 32))
    its, (changes, contract) = bases(32), WRONG[case]
    out = [torch.zeros(2, n, 9, rank) for n, rank in RAGGED]
    arguments = {"x": [x], "bases": its, "cos": None, "sin": None, "out": out, "heads": HEADS} | changes
    heads = arguments.pop("heads")
    with pytest.raises((ValueError, RuntimeError), match=contract):
        implementation("kv_project_", backend)(*arguments.values(), heads=heads)
    assert all(bool((t == 0).all()) for t in out)
