# SPDX-License-Identifier: Apache-2.0
"""Every rule, in every mix of dtypes, against its equations in float64, step by step."""

from __future__ import annotations

import pytest
import torch

from ..simt.truth import CASES, Case
from .steps import MIXES, Mix, Place, each_case, each_kernel, make_tensors, rule_of, set_grads, step_and_check
from singlepass._ops.optim import RULES

STEPS = 10
SHAPES = [(1,), (9, 115)]


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
