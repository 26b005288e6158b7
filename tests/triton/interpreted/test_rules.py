# SPDX-License-Identifier: Apache-2.0
"""Every rule against its equations in float64, and bit for bit against C++."""

from __future__ import annotations

import pytest
import torch

from singlepass._ops import OPS

from ...optim.steps import Mix, Place, call, each_case, make_tensors, rule_of, set_grads, step_and_check
from ...simt.truth import CASES, Case
from ...tolerances import assert_same_bits

PLACE = Place("triton", "cpu")
# An empty tensor, one element, and two chunks of which the second is a full tile and a tail.
SHAPES = [(0,), (1,), (2, 777)]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("case", [case for case in CASES if case.id == case.rule], ids=lambda case: case.id)
def test_ten_steps_in_float32(case: Case) -> None:
    tensors = make_tensors(case, SHAPES, Mix())
    for t in range(1, 11):
        set_grads(tensors, t)
        step_and_check(PLACE, case, tensors, t)


@pytest.mark.parametrize(
    ("mix", "steps"),
    [(Mix(), 3), (Mix(BF16, BF16), 3), (Mix(torch.float32, BF16, BF16), 3), (Mix(FP16, FP16, FP16), 10)],
    ids=lambda value: str(value),
)
@each_case
def test_same_bits_as_cpp(case: Case, mix: Mix, steps: int) -> None:
    op_name = rule_of(case).name
    ours = make_tensors(case, [(7,), (1000,)], mix)
    cpp = ours.clone()
    for t in range(1, steps + 1):
        set_grads(ours, t)
        set_grads(cpp, t)
        options = {"seed": 1234567890123, "ids": [3, 0]} if mix.param == BF16 else {}
        call(PLACE.function(op_name), case, ours, **options)
        call(OPS[op_name].on("native"), case, cpp, **options)
        for a, b in zip(ours.written(), cpp.written(), strict=True):
            assert_same_bits(a, b, f"{case.id}, step {t}")


@pytest.mark.parametrize("finished", [999, 1_000_000, 2**24 - 1])
def test_same_bits_as_cpp_late(finished: int) -> None:
    case = next(case for case in CASES if case.id == "adan")
    ours = make_tensors(case, [(7,)], Mix())
    ours.steps[0].fill_(finished)
    cpp = ours.clone()
    call(PLACE.function("adan_step_"), case, ours)
    call(OPS["adan_step_"].on("native"), case, cpp)
    for a, b in zip(ours.written(), cpp.written(), strict=True):
        assert_same_bits(a, b)
