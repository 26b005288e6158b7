# SPDX-License-Identifier: Apache-2.0
"""The norm, clip factor and non-finite check that one read of the gradients gives."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from .arrays import DTYPES, Array, decode, encode

SIZES = [0, 1, 2, 7, 8, 9, 1000, 65537]
PLACE = {"threads": 128, "chunk": 4096, "workers": 2, "misalignment": 0}
# max_norm, eps, grad_scale
CLIPS = [(0.0, 0.0, None), (1.0, 1e-6, None), (1e9, 1e-6, None), (1.0, 1e-6, 1024.0), (0.0, 0.0, 3.0)]


def gradients(dtype: str, scale: float = 1.0) -> list[Array]:
    rng = np.random.default_rng(0)
    return [encode(scale * rng.standard_normal(size), dtype) for size in SIZES]


@pytest.mark.parametrize("device", ["simt", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("misalignment", [0, 1, 2, 4])
def test_norm_and_clip_factor(core: ModuleType, device: str, dtype: str, misalignment: int) -> None:
    grads = gradients(dtype)
    truth = np.sqrt(sum(np.sum(decode(g) ** 2) for g in grads))
    place = PLACE | {"misalignment": misalignment}
    for max_norm, eps, scale in CLIPS:
        norm, divisor, found_inf = core.grad_norm(device, grads, max_norm=max_norm, eps=eps, grad_scale=scale, **place)
        unscaled = truth / (scale or 1.0)
        clip = min(1.0, max_norm / (unscaled + eps)) if max_norm > 0.0 else 1.0
        np.testing.assert_allclose(norm, unscaled, rtol=2.0**-24)
        np.testing.assert_allclose(divisor, (scale or 1.0) / clip, rtol=2.0**-24)
        assert found_inf == 0.0


@pytest.mark.parametrize("device", ["simt", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_that_is_not_finite_is_found(core: ModuleType, device: str, dtype: str) -> None:
    for bad in (np.inf, -np.inf, np.nan):
        for tensor, element in [(1, 0), (4, 7), (5, 8), (6, 999), (7, 0), (7, 4096), (7, 65536)]:
            grads = gradients(dtype)
            grads[tensor][element] = encode([bad], dtype)[0]
            *_, found_inf = core.grad_norm(device, grads, max_norm=1.0, eps=1e-6, grad_scale=None, **PLACE)
            assert found_inf == 1.0


@pytest.mark.parametrize("device", ["simt", "cpu"])
def test_large_and_small_gradients_neither_overflow_nor_vanish(core: ModuleType, device: str) -> None:
    for dtype, scale in [("float32", 1e30), ("float32", 1e-30), ("float16", 1e4), ("bfloat16", 1e-30)]:
        grads = gradients(dtype, scale)
        truth = np.sqrt(sum(np.sum(decode(g) ** 2) for g in grads))
        norm, _, found_inf = core.grad_norm(device, grads, max_norm=0.0, eps=0.0, grad_scale=None, **PLACE)
        np.testing.assert_allclose(norm, truth, rtol=2.0**-24)
        assert found_inf == 0.0


def test_schedules_do_not_matter(core: ModuleType) -> None:
    grads = gradients("float32")
    results = set()
    for seed in range(10):
        core.set_seed(seed)
        results.add(core.grad_norm("simt", grads, max_norm=1.0, eps=1e-6, grad_scale=None, **PLACE))
    assert len(results) == 1


@pytest.mark.parametrize("device", ["simt", "cpu"])
def test_empty_tensors_have_norm_zero(core: ModuleType, device: str) -> None:
    empty = [np.zeros(0, np.float32)] * 3
    assert core.grad_norm(device, empty, max_norm=1.0, eps=1e-6, grad_scale=None, **PLACE) == (0.0, 1.0, 0.0)
