# SPDX-License-Identifier: Apache-2.0
"""The one read of all gradients: norm, divisor, and whether any element is infinite or NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ..tolerances import assert_close
from .steps import DTYPES, Place, each_kernel, each_place, normal

SHAPES = [(1,), (), (0,), (7,), (33, 31), (40000,)]


def gradients(dtypes: tuple[torch.dtype, ...], device: str) -> list[Tensor]:
    return [normal(shape, i, dtype, device) for i, (shape, dtype) in enumerate(zip(SHAPES, itertools.cycle(dtypes)))]


def truth(grads: list[Tensor], max_norm: float, eps: float, scale: float) -> Tensor:
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads)) / scale
    clip = min(1.0, max_norm / (norm + eps)) if max_norm > 0.0 else 1.0
    return torch.tensor([norm, scale / clip, 0.0], dtype=torch.float64)


@each_kernel
@pytest.mark.parametrize("scale", [None, 3.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(("max_norm", "eps"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1e-2), (1e9, 0.0)])
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
def test_norm_and_divisor(
    dtypes: tuple[torch.dtype, ...], max_norm: float, eps: float, scale: float | None, place: Place
) -> None:
    grads = gradients(dtypes, place.device)
    grad_scale = None if scale is None else torch.tensor([scale], device=place.device)
    options = {"max_norm": max_norm, "eps": eps, "grad_scale": grad_scale}
    actual = place.function("grad_norm")(grads, **options)
    eager = Place("eager", place.device).function("grad_norm")(grads, **options)
    assert actual.device.type == place.device
    assert_close("grad_norm", actual, eager, truth(grads, max_norm, eps, scale or 1.0))


@each_place
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 32767, 39999])
def test_one_element_that_is_not_finite_is_found(where: int, dtype: torch.dtype, value: float, place: Place) -> None:
    grads = gradients((dtype,), place.device)
    assert place.function("grad_norm")(grads)[2] == 0.0
    grads[-1][where] = value
    assert place.function("grad_norm")(grads)[2] == 1.0


@each_place
def test_large_and_tiny_finite_gradients_are_finite(place: Place) -> None:
    largest = torch.full((1000,), torch.finfo(torch.float32).max, device=place.device)
    assert place.function("grad_norm")([largest])[2] == 0.0
    tiny = torch.full((4,), 1e-30, device=place.device)
    torch.testing.assert_close(place.function("grad_norm")([tiny])[0].cpu(), torch.tensor(2e-30), rtol=1e-6, atol=0.0)


@each_place
def test_any_strides(place: Place) -> None:
    x = normal((6, 8, 10), 3, device=place.device)
    views = [x.permute(2, 0, 1), x[:, ::2], x[1:, 2:, 3:], x.flip(0).t() if x.dim() == 2 else x[:, :1].expand(6, 8, 10)]
    for view in views:
        of_view, of_copy = (place.function("grad_norm")([g]) for g in (view, view.contiguous()))
        torch.testing.assert_close(of_view, of_copy, rtol=1e-6, atol=0.0)


@each_place
def test_no_gradients_at_all_are_refused(place: Place) -> None:
    with pytest.raises((RuntimeError, ValueError), match="grad_norm: expected at least one gradient"):
        place.function("grad_norm")([])


@each_place
@pytest.mark.parametrize("threads_", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads(threads_: int, place: Place, threads: None) -> None:
    grads = gradients(DTYPES, place.device) * 4
    torch.set_num_threads(1)
    expected = place.function("grad_norm")(grads, max_norm=1.0)
    torch.set_num_threads(threads_)
    assert torch.equal(place.function("grad_norm")(grads, max_norm=1.0), expected)
