# SPDX-License-Identifier: Apache-2.0
"""Draws of singular vectors and their exchange, as CUDA kernels on the CPU and in C++."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from .arrays import DTYPES, Array, assert_same_bits, decode, encode
from .spectral import decoded, exchange, factors, options, race_times, spread

each_device = pytest.mark.parametrize("device", ["simt", "cpu"])
SEED = 2**40 + 7

# Places of a layer, and how many are drawn.
LAYERS = [(1, 1), (2, 1), (7, 3), (31, 31), (33, 5), (127, 64), (129, 128), (1000, 200)]
COLUMNS = [1, 7, 8, 31, 33, 127, 128, 129, 136, 264, 1000]


def singular_values(sizes: list[int], dtype: str = "float32", seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [encode(rng.standard_normal(size) ** 2, dtype) for size in sizes]


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1.0])
def test_draws_are_those_of_the_contract(core: ModuleType, device: str, dtype: str, uniform: float) -> None:
    s = singular_values([count for count, _ in LAYERS], dtype)
    ranks, ids = [rank for _, rank in LAYERS], [i * 1000 + 3 for i in range(len(LAYERS))]
    for misalignment, draw in ((0, 0), (1, 5)):
        place = options(core, device, misalignment=misalignment)
        drawn = core.spectral_sample(s, ranks, ids, SEED, draw, uniform, place)
        for values, rank, layer, found in zip(s, ranks, ids, drawn, strict=True):
            times = race_times(decode(values), SEED, (draw << 32) + layer, uniform)
            assert found.tolist() == exchange(times, rank).tolist()


@each_device
def test_places_without_weight(core: ModuleType, device: str) -> None:
    """Values that are negative or not finite count as zero; what has no weight is drawn last, the lowest first."""
    s = np.array([0.0, 3.0, np.nan, 1.0, -2.0, np.inf, 0.5, 0.0, -np.inf, 0.0], np.float32)
    place = options(core, device)
    for values in (s, np.zeros(10, np.float32), -np.abs(s)):
        for rank in range(1, 11):
            for uniform in (0.0, 0.2):
                (found,) = core.spectral_sample([values], [rank], [0], SEED, 1, uniform, place)
                times = race_times(values.astype(np.float64), SEED, 1 << 32, uniform)
                assert found.tolist() == exchange(times, rank).tolist()
    (found,) = core.spectral_sample([s], [5], [0], SEED, 1, 0.0, place)
    assert found.tolist() == [-1, -1, -1, -1, 1]  # 1, 3 and 6 have weight; then 0 and 2


def test_large_layers_are_drawn_alike(core: ModuleType) -> None:
    s = singular_values([32768, 5000])
    drawn = [core.spectral_sample(s, [8192, 100], [0, 1], 1, 2, 0.5, options(core, "cpu"))]
    for threads in (256, 1024):
        core.set_seed(threads)
        drawn.append(core.spectral_sample(s, [8192, 100], [0, 1], 1, 2, 0.5, options(core, "simt", threads=threads)))
    for other in drawn[1:]:
        assert_same_bits(drawn[0], other)
    times = race_times(decode(s[0]), 1, 2 << 32, 0.5)
    assert drawn[0][0].tolist() == exchange(times, 8192).tolist()


def test_draws_do_not_depend_on_schedules_threads_and_company(core: ModuleType) -> None:
    s = singular_values([50 + i for i in range(150)])
    ranks, ids = [10 + i % 40 for i in range(150)], list(range(150))
    drawn = core.spectral_sample(s, ranks, ids, SEED, 3, 0.5, options(core, "cpu"))
    for seed, threads in enumerate((32, 64, 96)):
        core.set_seed(seed)
        before = core.launches()
        other = core.spectral_sample(s, ranks, ids, SEED, 3, 0.5, options(core, "simt", threads=threads))
        assert core.launches() - before == 3  # 68 layers fit into the arguments of a launch
        assert_same_bits(drawn, other)
    (alone,) = core.spectral_sample(s[80:81], ranks[80:81], ids[80:81], SEED, 3, 0.5, options(core, "simt"))
    assert_same_bits([alone], drawn[80:81])


def drawn_exchange(rng: np.random.Generator, rank: int, rows: int) -> Array:
    """About half of the places take a row, each another one."""
    found = np.full(rank, -1, np.int64)
    leaving = np.flatnonzero(rng.random(rank) < 0.5)[:rows]
    found[leaving] = np.sort(rng.permutation(rows)[: len(leaving)])
    return found


@each_device
@pytest.mark.parametrize("active_dtype", DTYPES)
@pytest.mark.parametrize("frozen_dtype", DTYPES)
def test_rows_are_exchanged(core: ModuleType, device: str, active_dtype: str, frozen_dtype: str) -> None:
    rng = np.random.default_rng(3)
    shapes = [(5, 9, (columns,)) for columns in COLUMNS] + [(40, 8, ()), (1, 1, (16,)), (3, 4, (0,))]
    active = [encode(rng.standard_normal((rank, *rest)), active_dtype) for rank, _, rest in shapes]
    frozen = [encode(rng.standard_normal((rows, *rest)), frozen_dtype) for _, rows, rest in shapes]
    changes = [drawn_exchange(rng, rank, rows) for rank, rows, _ in shapes]
    none = [np.zeros(0, np.float32)] * len(shapes)
    expected_active, expected_frozen = [a.copy() for a in active], [f.copy() for f in frozen]
    for a, f, new_a, new_f, change in zip(active, frozen, expected_active, expected_frozen, changes, strict=True):
        slots = np.flatnonzero(change >= 0)
        new_a[slots] = encode(decode(f[change[slots]]), active_dtype)
        new_f[change[slots]] = encode(decode(a[slots]), frozen_dtype)
    for misalignment in (0, 1):
        place = options(core, device, misalignment=misalignment)
        found = core.spectral_swap(active, frozen, none, changes, place)
        assert_same_bits(found[0], expected_active)
        assert_same_bits(found[1], expected_frozen)


def coded(rng: np.random.Generator, rows: int, columns: int) -> tuple[Array, Array]:
    blocks = -(-columns // 128)
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    return codes, rng.random((rows, blocks)).astype(np.float32) * np.float32(0.01)


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_exchanged_for_codes(core: ModuleType, device: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    active = [encode(rng.standard_normal((6, columns)), dtype) for columns in COLUMNS]
    active[3][:, 0] = 0
    active[5][1] = 0  # a row that has no largest magnitude
    frozen, scales = map(list, zip(*(coded(rng, 7, columns) for columns in COLUMNS), strict=True))
    changes = [drawn_exchange(rng, 6, 7) for _ in COLUMNS]
    changes[5][1], changes[5][changes[5] == 6] = 6, -1
    for misalignment in (0, 1):
        found = core.spectral_swap(active, frozen, scales, changes, options(core, device, misalignment=misalignment))
        for i, change in enumerate(changes):
            new_active, new_codes, new_scales = (part[i] for part in found)
            slots = np.flatnonzero(change >= 0)
            rows, others = change[slots], np.setdiff1d(np.arange(7), change[slots])
            stay = np.flatnonzero(change < 0)
            before = [active[i][stay], frozen[i][others], scales[i][others]]
            assert_same_bits([new_active[stay], new_codes[others], new_scales[others]], before)
            assert_same_bits([new_active[slots]], [decoded(frozen[i][rows], scales[i][rows], dtype)])
            leaving = decode(active[i][slots])
            assert_same_bits([new_scales[rows]], [factors(leaving)])
            step = spread(new_scales[rows], COLUMNS[i]).astype(np.float64)
            exact = np.divide(leaving, step, where=step > 0.0, out=np.zeros_like(leaving))
            # The inverse of a factor and its product are rounded before the code is.
            assert np.abs(new_codes[rows] - exact).max(initial=0.0) <= 0.5 + 127.0 * 2.0**-22


@each_device
def test_codes_are_rounded_to_nearest_even(core: ModuleType, device: str) -> None:
    halves = np.arange(-254, 255) / 2.0  # with the largest at 127 the factor is one
    columns = 128
    rows = np.zeros((5, columns))
    rows.flat[: len(halves)] = halves
    rows[:, -1] = 127.0
    frozen, scales = np.zeros((5, columns), np.int8), np.ones((5, 1), np.float32)
    found = core.spectral_swap(
        [rows.astype(np.float32)], [frozen], [scales], [np.arange(5, dtype=np.int64)], options(core, device)
    )
    assert found[2][0].tolist() == [[1.0]] * 5
    assert found[1][0].tolist() == np.rint(rows).astype(np.int8).tolist()
    assert not found[0][0].any()


def test_schedules_threads_and_company_do_not_matter(core: ModuleType) -> None:
    """More pairs than fit into the arguments of a launch."""
    rng = np.random.default_rng(5)
    sizes = [1 + i % 9 for i in range(140)]
    active = [encode(rng.standard_normal((size, 24)), "bfloat16") for size in sizes]
    frozen, scales = map(list, zip(*(coded(rng, size, 24) for size in sizes), strict=True))
    changes = [drawn_exchange(rng, size, size) for size in sizes]
    expected = core.spectral_swap(active, frozen, scales, changes, options(core, "cpu", workers=3))
    for seed, threads in enumerate((32, 64, 256)):
        core.set_seed(seed)
        before = core.launches()
        found = core.spectral_swap(active, frozen, scales, changes, options(core, "simt", threads=threads))
        assert core.launches() - before == 3
        for parts in zip(expected, found, strict=True):
            assert_same_bits(*parts)
