# SPDX-License-Identifier: Apache-2.0
"""The one read of all gradients: norm, divisor, and whether any element is infinite or NaN."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from singlepass.optim._norm import moved
from singlepass.reference.optim import finish_grad_norm

from ..tolerances import assert_close
from .steps import DTYPES, Place, each_kernel, each_place, normal

SHAPES = [(1,), (), (0,), (7,), (33, 31), (40000,)]


def gradients(dtypes: tuple[torch.dtype, ...], device: str) -> list[Tensor]:
    return [normal(shape, i, dtype, device) for i, (shape, dtype) in enumerate(zip(SHAPES, itertools.cycle(dtypes)))]


def truth(grads: list[Tensor], max_norm: float, eps: float, scale: float) -> Tensor:
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads)) / scale
    clip = min(1.0, max_norm / (norm + eps)) if max_norm > 0.0 else 1.0
    return torch.tensor([norm, scale / clip, 0.0], dtype=torch.float64)


def check(
    grads: list[Tensor], place: Place, max_norm: float = 0.0, eps: float = 0.0, scale: float | None = None
) -> None:
    grad_scale = None if scale is None else torch.tensor([scale], device=place.device)
    options = {"max_norm": max_norm, "eps": eps, "grad_scale": grad_scale}
    actual, eager = (Place(b, place.device).function("grad_norm")(grads, **options) for b in (place.backend, "eager"))
    assert actual.device.type == place.device
    assert_close("grad_norm", actual, eager, truth(grads, max_norm, eps, scale or 1.0))


@each_kernel
@pytest.mark.parametrize("scale", [None, 3.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(("max_norm", "eps"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1e-2), (1e9, 0.0)])
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
def test_norm_and_divisor(
    dtypes: tuple[torch.dtype, ...], max_norm: float, eps: float, scale: float | None, place: Place
) -> None:
    check(gradients(dtypes, place.device), place, max_norm, eps, scale)


@each_kernel
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
def test_sum_of_squares(dtypes: tuple[torch.dtype, ...], place: Place) -> None:
    grads = gradients(dtypes, place.device)
    truth = sum(g.double().square().sum() for g in grads)
    for where in (place, Place("eager", place.device)):
        squares = where.function("grad_squares")(grads)
        assert (squares.dtype, squares.shape) == (torch.float64, (1,))
        # Exact products, added in float64.
        torch.testing.assert_close(squares.sum(), truth, rtol=1e-12, atol=0.0)


@each_place
@pytest.mark.parametrize("scale", [None, 3.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize(("max_norm", "eps"), [(0.0, 0.0), (1.0, 1e-2), (1e9, 0.0)])
def test_shards_whose_squares_are_added_have_the_norm_of_the_whole(
    max_norm: float, eps: float, scale: float | None, place: Place
) -> None:
    grads = gradients(DTYPES, place.device)
    grad_scale = None if scale is None else torch.tensor([scale], device=place.device)
    options = {"max_norm": max_norm, "eps": eps, "grad_scale": grad_scale}
    squares = place.function("grad_squares")
    parts = squares([*grads[:5], grads[5][:12345]]) + squares([grads[5][12345:]])
    actual = finish_grad_norm(parts, **options)
    # Both are the float32 next to numbers that differ by the order of a float64 sum.
    torch.testing.assert_close(actual, place.function("grad_norm")(grads, **options), rtol=2.0**-23, atol=0.0)


@each_place
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_sum_of_squares_that_is_not_finite_says_so(value: float, place: Place) -> None:
    grads = gradients(DTYPES, place.device)
    squares = place.function("grad_squares")
    assert finish_grad_norm(squares(grads))[2] == 0.0
    grads[-1][12345] = value
    assert finish_grad_norm(squares(grads))[2] == 1.0


@each_kernel
@pytest.mark.parametrize("value", [1e-30, 1e-8, 1e30], ids=str)
def test_squares_that_float32_cannot_hold(value: float, place: Place) -> None:
    check([torch.full((1000,), value, device=place.device)], place)


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
def test_the_largest_gradients_are_finite(place: Place) -> None:
    largest = torch.full((1000,), torch.finfo(torch.float32).max, device=place.device)
    assert place.function("grad_norm")([largest])[2] == 0.0


@each_kernel
def test_any_strides(place: Place) -> None:
    x = normal((6, 8, 10), 3, device=place.device)
    for view in (x.permute(2, 0, 1), x[:, ::2], x[1:, 2:, 3:], x[:, :1].expand(6, 8, 10), x.mT):
        check([view], place)
        squares = place.function("grad_squares")([view]).sum()
        torch.testing.assert_close(squares, view.double().square().sum(), rtol=1e-12, atol=0.0)


@each_place
@pytest.mark.parametrize("name", ["grad_norm", "grad_squares"])
def test_no_gradients_at_all_are_refused(name: str, place: Place) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected at least one gradient"):
        place.function(name)([])


@pytest.mark.serial
@each_place
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads(count: int, place: Place) -> None:
    grads = gradients(DTYPES, place.device) * 4
    torch.set_num_threads(1)
    expected, squares = place.function("grad_norm")(grads, max_norm=1.0), place.function("grad_squares")(grads)
    torch.set_num_threads(count)
    assert torch.equal(place.function("grad_norm")(grads, max_norm=1.0), expected)
    assert torch.equal(place.function("grad_squares")(grads), squares)


@pytest.mark.parametrize(("kind", "waits"), [("cpu", True), ("cuda", False)])
def test_the_host_waits_for_what_comes_to_the_cpu_alone(kind: str, waits: bool) -> None:
    """It would read it before it is there."""
    value, device = mock.Mock(), torch.device(kind)
    moved(value, device)
    value.to.assert_called_once_with(device, non_blocking=not waits)
