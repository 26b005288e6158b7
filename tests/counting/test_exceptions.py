# SPDX-License-Identifier: Apache-2.0
"""The list of exceptions is right, and can only get shorter."""

from __future__ import annotations

import pytest

from . import exceptions
from .budgets import ALLOCATED, ARCHS, ATEN, BUDGETS, COPIED, HOST_BUDGETS
from .exceptions import EXCEPTIONS, Excess, faults
from .traffic_row import MEASURES
from .traffic_table import ROWS, TRITON_ROWS

# What is counted, by kind.
OF_TRAFFIC = [*map(str, ROWS), *(f"triton {row}" for row in TRITON_ROWS)]
OF_INSTRUCTIONS = [f"{budget.subject} {arch}" for budget in BUDGETS for arch in ARCHS]
OF_THE_HOST = [budget.entry for budget in HOST_BUDGETS]


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda e: f"{e.subject}, {e.measure}")
def test_every_exception_is_of_something_that_is_counted(exception: Excess) -> None:
    if exception.measure in MEASURES:
        subjects = OF_TRAFFIC
    else:
        subjects = OF_THE_HOST if exception.measure in (ATEN, ALLOCATED, COPIED) else OF_INSTRUCTIONS
    assert any(exception.concerns(subject, exception.measure) for subject in subjects)


@pytest.mark.parametrize(
    ("subject", "count", "expected"),
    [
        ("lion_step_: bfloat16", 1.2, []),
        ("lion_step_: bfloat16", 1.3, ["expected at most 1.2 wavefronts; got 1.3. Mend the kernel."]),
        ("lion_step_: float32", 2.01, []),
        ("lion_step_: float32", 2.1, ["expected 2.0 wavefronts, as excepted; got 2.1. Mend the kernel."]),
        ("lion_step_: float32", 1.9, ["expected 2.0 wavefronts, as excepted; got 1.9. Lower the exception."]),
        ("lion_step_: float32", 1.2, ["wavefronts are down to 1.2. Remove the exception, which allows 2.0."]),
    ],
)
def test_counts_and_exceptions(
    subject: str, count: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exceptions, "EXCEPTIONS", (Excess("*: float32", "wavefronts", 2.0, "banks"),))
    assert faults(subject, {"wavefronts": (count, 1.2)}) == [f"{subject}: {fault}" for fault in expected]


def test_two_exceptions_for_one_count_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Excess("lion_step_: *", "wavefronts", 2.0, "banks"), Excess("*: float32", "wavefronts", 2.0, "banks")
    monkeypatch.setattr(exceptions, "EXCEPTIONS", listed)
    (fault,) = faults("lion_step_: float32", {"wavefronts": (2.0, 1.2)})
    assert fault == "lion_step_: float32: expected one exception for wavefronts; got 2. Narrow their subjects."
