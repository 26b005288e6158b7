# SPDX-License-Identifier: Apache-2.0
"""What a bar is, and what the families' bars are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .results import Row, Run

SHARE_OF_COPY = 0.85  # GPU


@dataclass(frozen=True)
class Check:
    """One bar for one case.

    `value`, None where not measured, must not exceed `limit` or, with `at_least`, not fall below it. It is judged to
    two decimals, as it is shown. `partial`: some of what it is compared to was left out, so it can fail but not hold.
    """

    bar: str
    case: str
    value: float | None
    limit: float
    at_least: bool = False
    partial: bool = False

    @property
    def holds(self) -> bool | None:
        if self.value is None:
            return None
        value = round(self.value, 2)
        clears = value >= self.limit if self.at_least else value <= self.limit
        return None if clears and self.partial else clears

    @property
    def missed_by(self) -> float:
        """How many times further from its limit than allowed; at most 1 where the bar holds, 0 where not measured."""
        if not self.value:
            return 0.0
        return self.limit / self.value if self.at_least else self.value / self.limit

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "FAILS", None: "not measured"}[self.holds]


def fastest(rows: Iterable[Row]) -> float | None:
    """The lowest multiple of the floor. Rows whose turns were minutes apart are compared through the floor measured in
    the turns of each: a shared machine's bandwidth drifts by more than the rows differ."""
    return min((row.times_floor for row in rows if row.times_floor is not None), default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def select(rows: list[Row], wanted: Callable[[str], bool]) -> list[Row]:
    """Rows by the name of their provider."""
    return [row for row in rows if wanted(row.provider)]


def ours(rows: list[Row]) -> Row | None:
    """The native row of a case."""
    return next(iter(select(rows, "native".__eq__)), None)


def time_over(bar: str, case: str, native: Row | None, rivals: list[Row], limit: float) -> Check:
    """Our time over that of the fastest rival."""
    value = ratio(native.times_floor if native else None, fastest(rivals))
    return Check(bar, case, value, limit, partial=some_skipped(rivals))


def times_faster(bar: str, case: str, native: Row | None, rivals: list[Row], limit: float) -> Check:
    """The time of the fastest rival over ours."""
    value = ratio(fastest(rivals), native.times_floor if native else None)
    return Check(bar, case, value, limit, at_least=True, partial=some_skipped(rivals))


def some_skipped(rows: list[Row]) -> bool:
    return any(row.status == "skipped" for row in rows)


def share_of_copy(case: str, gbps: float | None, run: Run, limit: float = SHARE_OF_COPY) -> Check:
    return Check("share of copy bandwidth", case, ratio(gbps, run.copy_gbps), limit, at_least=True)


def exit_status(checks: list[Check]) -> int:
    """0: all bars hold. 1: some fail. 2: none fails, but some were not measured."""
    if any(c.holds is False for c in checks):
        return 1
    return 2 if not checks or any(c.holds is None for c in checks) else 0
