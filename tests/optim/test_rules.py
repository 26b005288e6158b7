# SPDX-License-Identifier: Apache-2.0
"""Every rule, in every mix of dtypes, against its equations in float64, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from singlepass._ops.optim import RULES

from ..simt.truth import CASES, Case
from .steps import MIXES, Mix, Place, call, each_case, each_kernel, make_tensors, rule_of, set_grads, step_and_check

STEPS = 10
SHAPES = [(9, 57)]


def test_every_rule_has_a_case() -> None:
    assert {rule_of(case).rule for case in CASES} == set(RULES)


@each_kernel
@pytest.mark.parametrize("mix", MIXES, ids=str)
@each_case
def test_ten_steps_in_every_mix_of_dtypes(case: Case, mix: Mix, place: Place) -> None:
    tensors = make_tensors(case, SHAPES, mix, device=place.device)
    for t in range(1, STEPS + 1):
        set_grads(tensors, t)
        step_and_check(place, case, tensors, t)


@each_kernel
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@each_case
def test_gradients_that_are_not_finite_spoil_what_they_spoil_in_eager(case: Case, value: float, place: Place) -> None:
    tensors = make_tensors(case, [(40,), (8,)], Mix(), device=place.device)
    set_grads(tensors, 1)
    tensors.grads[0][17] = value
    eager = tensors.clone()
    op_name = rule_of(case).name
    for _ in range(2):
        call(place.function(op_name), case, tensors)
        call(Place("eager", place.device).function(op_name), case, eager)
    for actual, expected in zip(tensors.written(), eager.written(), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


@dataclass(frozen=True)
class Slightly(Place):
    """Native, with a learning rate that is off by a hundred-thousandth."""

    def function(self, op_name: str) -> Callable[..., None]:
        native = super().function(op_name)

        def step(*args: object, **options: object) -> None:
            *lists, lr = args
            assert isinstance(lr, torch.Tensor)
            native(*lists, lr * (1.0 + 1e-5), **options)

        return step


@each_case
def test_what_is_slightly_wrong_is_noticed(case: Case) -> None:
    with pytest.raises(AssertionError, match="elements are wrong"):
        test_ten_steps_in_every_mix_of_dtypes(case, Mix(), Slightly("native"))


@each_case
def test_rules_that_do_not_read_the_step_say_so(case: Case) -> None:
    """Else a parameter's state has a counter that nobody needs."""
    counted, uncounted = (make_tensors(case, [(7,)], Mix()) for _ in range(2))
    uncounted.steps = []
    for t in range(1, 9):  # rectified AdaBelief first moves at step 6
        for tensors in (counted, uncounted):
            set_grads(tensors, t)
            call(rule_of(case).on("eager"), case, tensors)
    same = all(map(torch.equal, counted.params, uncounted.params))
    assert same != rule_of(case).counts
