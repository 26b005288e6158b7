# SPDX-License-Identifier: Apache-2.0
"""The product's scaling and HyboNet's map, as CUDA kernels on the CPU and in C++, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from .arrays import DTYPES, Array, assert_same_bits, decode, encode
from .spectral import Floats, Lorentz, check, options, scale

each_device = pytest.mark.parametrize("device", ["simt", "cpu"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

GAP = 8  # elements between rows that nothing may touch
SIZES = [0, 1, 7, 31, 33, 127, 129, 1000]
SHAPES = [(5, values) for values in SIZES] + [(tokens, 40) for tokens in SIZES] + [(70, 264), (33, 8), (600, 16)]
MAPS = [(rows, 9) for rows in (0, 1, 7, 17)] + [(3, columns) for columns in (2, 7, 31, 33, 127, 129, 1000, 1288)]
MAPS += [(40, 16), (5, 512), (2, 520)]


class Product:
    """q and t with a gap after each row, and s."""

    def __init__(self, core: ModuleType, tokens: int, values: int, dtype: str, gap: int = GAP, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.core, self.values, self.dtype = core, values, dtype
        self.q, self.t = (encode(rng.standard_normal((tokens, values + gap)), dtype) for _ in range(2))
        self.s = encode(np.abs(rng.standard_normal(values)), "float32")

    def run(self, place: Any) -> tuple[Array, Array]:
        q, sums = self.core.spectral_scale(self.q, self.t, self.s, place)
        assert_same_bits([q[:, self.values :].copy()], [self.q[:, self.values :].copy()])
        return np.ascontiguousarray(q[:, : self.values]), sums

    def check(self, place: Any) -> None:
        q, sums = self.run(place)
        expected = scale(decode(self.q)[:, : self.values], decode(self.t)[:, : self.values], decode(self.s))
        check(q, expected[0], self.dtype, "q")
        check(sums, expected[1], "float32", "sums")


@each_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale(core: ModuleType, device: str, dtype: str, shape: tuple[int, int]) -> None:
    for misalignment, gap in ((0, GAP), (1, GAP), (0, 3)):
        product = Product(core, *shape, dtype, gap)
        product.check(options(core, device, misalignment=misalignment))


@each_device
def test_many_rows_are_summed_in_double(core: ModuleType, device: str) -> None:
    """The bound knows of 32 roundings, however many rows there are; float32 would lose the ones."""
    product = Product(core, 20000, 8, "float32")
    product.q[:], product.t[:] = 1.0, 1.0
    product.q[0] = 2.0**30
    product.t[-1] = 2.0
    assert product.run(options(core, device))[1].tolist() == [float(np.float32(2.0**30 + 20000.0))] * 8
    Product(core, 9000, 8, "bfloat16").check(options(core, device))


@each_dtype
def test_cuts_of_the_product_change_sums_alone(core: ModuleType, dtype: str) -> None:
    product = Product(core, 333, 40, dtype)
    first = product.run(options(core, "simt"))[0]
    for blocks in (1, 3, 1024):
        place = options(core, "simt", blocks=blocks)
        product.check(place)
        assert_same_bits([product.run(place)[0]], [first])


@each_device
def test_schedules_and_threads_do_not_matter(core: ModuleType, device: str) -> None:
    product, map_ = Product(core, 500, 72, "bfloat16"), Map(core, 70, 24, "float16")
    results = []
    for seed in range(5):
        core.set_seed(seed)
        place = options(core, device, workers=1 + seed)
        results.append([*product.run(place), *map_.run(place), *map_.run(place, backward=True)])
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_launches(core: ModuleType) -> None:
    place = options(core, "simt")
    before = core.launches()
    Product(core, 100, 24, "float32").run(place)
    assert core.launches() - before == 2
    Map(core, 9, 9, "float32").run(place)
    assert core.launches() - before == 3
    Map(core, 9, 9, "float32").run(place, backward=True)
    assert core.launches() - before == 5


class Map:
    """HyboNet's map of random rows, some of which are too short to be rescaled."""

    def __init__(self, core: ModuleType, rows: int, columns: int, dtype: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.core, self.dtype, self.log_scale = core, dtype, float(np.float32(0.7))
        z = rng.standard_normal((rows, columns))
        z[2::5, 1:] *= 1e-6
        z[3::5, 1:] = 0.0
        # So small that the gradients of short rows do not overflow float16.
        self.z, self.grad = encode(z, dtype), encode(0.25 * rng.standard_normal((rows, columns)), dtype)

    def run(self, place: Any, backward: bool = False) -> list[Array]:
        grad = self.grad if backward else None
        offset = float(np.float32(1.1))
        out, grad_scale = self.core.lorentz(grad, self.z, self.log_scale, 1.0, offset, place)
        return [out, np.float32(grad_scale).reshape(1)] if backward else [out]

    def check(self, place: Any) -> None:
        truth = Lorentz(decode(self.z), self.log_scale, offset=float(np.float32(1.1)))
        check(self.run(place)[0], truth.forward(), self.dtype, "x")
        grad_z, grad_scale = self.run(place, backward=True)
        expected = truth.backward(decode(self.grad))
        check(grad_z, expected[0], self.dtype, "gradient of z")
        check(grad_scale, expected[1], "float32", "gradient of log_scale")


@each_device
@each_dtype
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_lorentz(core: ModuleType, device: str, dtype: str, shape: tuple[int, int]) -> None:
    for misalignment in (0, 1):
        Map(core, *shape, dtype).check(options(core, device, misalignment=misalignment))


def test_launch_shapes_of_the_map_change_the_sum_alone(core: ModuleType) -> None:
    for columns in (24, 33):
        map_ = Map(core, 50, columns, "float32")
        results = []
        for threads in (32, 96, 256):
            place = options(core, "simt", threads=threads)
            map_.check(place)
            results.append([*map_.run(place), map_.run(place, backward=True)[0]])
        for other in results[1:]:
            assert_same_bits(results[0], other)


def test_derivatives_of_the_map_are_those_of_its_differences() -> None:
    """The truth's own derivatives, of which the forward pass knows nothing."""
    rng = np.random.default_rng(1)
    z, grad, step = rng.standard_normal((4, 6)), rng.standard_normal((4, 6)), 1e-6

    def loss(z: Floats, log_scale: float) -> float:
        return float((Lorentz(z, log_scale).forward().value * grad).sum())

    grad_z, grad_scale = Lorentz(z, 0.3).backward(grad)
    for i in np.ndindex(z.shape):
        moved = np.zeros_like(z)
        moved[i] = step
        slope = (loss(z + moved, 0.3) - loss(z - moved, 0.3)) / (2.0 * step)
        assert grad_z.value[i] == pytest.approx(slope, rel=1e-6, abs=1e-7)
    slope = (loss(z, 0.3 + step) - loss(z, 0.3 - step)) / (2.0 * step)
    assert float(grad_scale.value) == pytest.approx(slope, rel=1e-6)


@each_device
def test_points_lie_on_the_hyperboloid(core: ModuleType, device: str) -> None:
    x = decode(Map(core, 40, 65, "float32").run(options(core, device))[0])
    rows = np.delete(np.arange(40), np.s_[3::5])  # rows of zeros have no direction
    rows = rows[rows % 5 != 2]
    product = (x[rows, 1:] ** 2).sum(1) - x[rows, 0] ** 2
    np.testing.assert_allclose(product, -1.0, atol=1e-5)


@each_device
def test_rows_that_are_not_finite_do_not_touch_others(core: ModuleType, device: str) -> None:
    map_ = Map(core, 20, 33, "float32")
    clean = map_.run(options(core, device))[0]
    map_.z[7, 5], map_.z[9, 0] = np.nan, np.inf
    x = map_.run(options(core, device))[0]
    others = np.delete(np.arange(20), [7, 9])
    assert_same_bits([x[others]], [clean[others]])
    assert bool(np.isnan(x[7, 1:]).all())
    product = Product(core, 40, 24, "float32")
    product.q[3, 5] = np.inf
    q, sums = product.run(options(core, device))
    assert np.isfinite(np.delete(q.ravel(), 3 * 24 + 5)).all()
    assert np.flatnonzero(~np.isfinite(sums)).tolist() == [5]
