# SPDX-License-Identifier: Apache-2.0
"""The same bits, whenever and on however many threads a step runs."""

from __future__ import annotations

import pytest
import torch

from ..simt.truth import Case
from ..tolerances import assert_same_bits
from .steps import Place, each_case, each_kernel
from .trajectory import contents, make_optimizer, make_params, train

# One tensor over many chunks, one just beyond a chunk, and many small ones.
SHAPES = [(70001,), (32769,), *[(37,)] * 20, (3, 5), ()]


def run(case: Case, dtype: torch.dtype, place: Place) -> dict[str, torch.Tensor]:
    params = make_params(SHAPES, (dtype,), place.device)
    optimizer = make_optimizer(case, params, backend=place.backend)
    train(optimizer, 2)
    return contents(optimizer)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_twice_the_same_bits(case: Case, dtype: torch.dtype, place: Place) -> None:
    first, second = run(case, dtype, place), run(case, dtype, place)
    for name, value in first.items():
        assert_same_bits(second[name], value, name)


@pytest.mark.serial
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_the_number_of_threads_does_not_matter(case: Case, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = run(case, dtype, Place("native"))
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, value in run(case, dtype, Place("native")).items():
            assert_same_bits(value, expected[name], f"{count} threads: {name}")
