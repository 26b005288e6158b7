# SPDX-License-Identifier: Apache-2.0
"""More than 2^31 elements in one tensor: offsets of 32 bits would wrap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..memory import need
from ..simt.truth import CASES
from ..tolerances import assert_same_bits
from .steps import Place, Tensors, call, rule_of

pytestmark = pytest.mark.large

N = 2**31 + 9
WINDOWS = [slice(0, 64), slice(2**30 - 32, 2**30 + 32), slice(N - 64, N)]  # the last one spans 2^31


def pattern(dtype: torch.dtype, device: str) -> Tensor:
    """Ones, but for some elements of the windows."""
    x = torch.ones(N, dtype=dtype, device=device)
    for window in WINDOWS:
        x[window][::3] = -1.0
        x[window][1::5] = 0.0
    return x


CASES_BY_RULE = {case.rule: case for case in CASES if not case.label}


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        pytest.param("lion", Place("native"), id="lion-native"),
        pytest.param("lion", Place("native", "cuda"), id="lion-native-cuda", marks=pytest.mark.gpu),
        pytest.param("lion", Place("triton", "cuda"), id="lion-triton-cuda", marks=pytest.mark.gpu),
        pytest.param("adamw", Place("native", "cuda"), id="adamw-native-cuda", marks=pytest.mark.gpu),
        pytest.param("adamw", Place("triton", "cuda"), id="adamw-triton-cuda", marks=pytest.mark.gpu),
    ],
)
def test_every_element_is_updated_once(rule: str, place: Place) -> None:
    case, dtype = CASES_BY_RULE[rule], torch.bfloat16
    state_count = 1 if rule == "lion" else 2
    need(place.device, (2 + state_count) * N * 2)
    p = torch.zeros(N, dtype=dtype, device=place.device)
    g = pattern(dtype, place.device)
    states = [torch.zeros(N, dtype=dtype, device=place.device) for _ in range(state_count)]
    tensors = Tensors([p], [g], [[s] for s in states], [], [torch.zeros((), device=place.device)])

    def window(part: slice) -> Tensors:
        step = torch.zeros((), device=place.device)
        return Tensors([p[part].clone()], [g[part].clone()], [[s[part].clone()] for s in states], [], [step])

    expected = [window(part) for part in WINDOWS]
    function = place.function(rule_of(case).name)
    for values in (tensors, *expected):
        for _ in range(2):
            call(function, case, values)
    for part, values in zip(WINDOWS, expected, strict=True):
        for actual, wanted in zip((p, *states), (values.params[0], *(s[0] for s in values.states)), strict=True):
            assert_same_bits(actual[part], wanted, f"elements {part}")
    between = [slice(WINDOWS[k].stop, WINDOWS[k + 1].start) for k in range(2)]
    for part in between:
        low, high = p[part].aminmax()
        assert low == high < 0.0, f"elements {part}"


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place("native"), id="native"),
        pytest.param(Place("native", "cuda"), id="native-cuda", marks=pytest.mark.gpu),
        pytest.param(Place("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    ],
)
def test_the_norm_reaches_the_last_element(place: Place) -> None:
    need(place.device, N * 2)
    g = torch.zeros(N, dtype=torch.bfloat16, device=place.device)
    g[-1], g[2**31], g[5] = 3.0, 4.0, 12.0
    assert place.function("grad_norm")([g])[0].item() == 13.0
    g[-1] = float("inf")
    assert place.function("grad_norm")([g])[2].item() == 1.0
