# SPDX-License-Identifier: Apache-2.0
"""Every rule, in every mix of dtypes, against its equations in float64, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from singlepass._ops.optim import RULES

from ..simt.truth import CASES, Case
from .steps import MIXES, Mix, Place, each_case, each_kernel, make_tensors, rule_of, set_grads, step_and_check

STEPS = 10
SHAPES = [(9, 57)]


def test_every_rule_has_a_case() -> None:
    assert {rule_of(case).name for case in CASES} == set(RULES)


@each_kernel
@pytest.mark.parametrize("mix", MIXES, ids=str)
@each_case
def test_ten_steps_in_every_mix_of_dtypes(case: Case, mix: Mix, place: Place) -> None:
    tensors = make_tensors(case, SHAPES, mix, device=place.device)
    for t in range(1, STEPS + 1):
        set_grads(tensors, t)
        step_and_check(place, case, tensors, t)


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
