# SPDX-License-Identifier: Apache-2.0
"""The gradient norm, against eager and bit for bit against C++."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass._ops import OPS

from ...optim import test_grad_norm as optim_test
from ...optim.steps import Place, normal
from ...tolerances import assert_same_bits

triton_norm = OPS["grad_norm"].on("triton")
native_norm = OPS["grad_norm"].on("native")


def gradients() -> list[Tensor]:
    """Empty, small and of two chunks; all dtypes; misaligned, transposed and with gaps."""
    return [
        normal((2, 777), 0),
        normal((0,), 1),
        normal((7,), 2, torch.bfloat16),
        normal((1554,), 3, torch.float16),
        normal((1555,), 4)[1:],
        normal((6, 8), 5).mT,
        normal((6, 8), 6)[:, ::2],
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 1.0},
        {"max_norm": 1e6, "eps": 1e-6},
        {"max_norm": 0.5, "grad_scale": torch.tensor(8.0)},
        {"grad_scale": torch.tensor([1024.0])},
    ],
    ids=str,
)
def test_same_as_cpp(options: dict[str, Any]) -> None:
    for _ in range(2):
        assert_same_bits(triton_norm(gradients(), **options), native_norm(gradients(), **options))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float16, torch.float32)], ids=str)
def test_sum_of_squares(dtypes: tuple[torch.dtype, ...]) -> None:
    place = Place("triton", "cpu")
    optim_test.test_sum_of_squares(dtypes, place)
    optim_test.test_shards_whose_squares_are_added_have_the_norm_of_the_whole(1.0, 1e-2, 3.0, place)
    optim_test.test_a_sum_of_squares_that_is_not_finite_says_so(float("nan"), place)
    optim_test.test_no_gradients_at_all_are_refused("grad_squares", place)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite(value: float) -> None:
    grads = gradients()
    assert triton_norm(grads)[2] == 0.0
    grads[0][1, 700] = value
    assert triton_norm(grads)[2] == 1.0


def test_no_overflow() -> None:
    grads = [torch.full((1554,), 3e38), torch.full((5,), 1e-40)]
    assert_same_bits(triton_norm(grads), native_norm(grads))
    assert_same_bits(triton_norm(grads[1:]), native_norm(grads[1:]))
    assert float(triton_norm(grads[1:])[0]) > 0.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^grad_norm: expected at least one gradient; got none"):
        triton_norm([])
    with pytest.raises(ValueError, match=r"^grad_norm: expected float32, .* tensors; got torch\.float64"):
        triton_norm([torch.ones(3, dtype=torch.float64)])
