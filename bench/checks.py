# SPDX-License-Identifier: Apache-2.0
"""The bars that a run must clear, judged from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .models import GPT2_SMALL, MANY_SMALL, TENSORS_300, VIT_B16
from .results import Row, Run

# CPU
TIMES_FLOOR = 1.25
TIMES_EAGER = 3.0
TIMES_FUSED_ADAMW_MANY = 2.0
# GPU
SHARE_OF_COPY = 0.85
LARGE_ELEMENTS = 100_000_000
HOST_MICROSECONDS = 100.0
LAUNCHES = {"LAMB": 2, "LARS": 2}  # all others: one
# Extra memory does not grow with the model: at most a thousandth of it, and what a process's resident set varies by.
EXTRA_SHARE = 1e-3
EXTRA_BYTES = 1 << 20

LARGE_MODELS = (GPT2_SMALL.name, VIT_B16.name)


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
    def verdict(self) -> str:
        return {True: "holds", False: "FAILS", None: "not measured"}[self.holds]


def fastest(rows: Iterable[Row]) -> float | None:
    """The lowest multiple of the floor. Rows whose turns were minutes apart are compared through the floor measured in
    the turns of each: a shared machine's bandwidth drifts by more than the rows differ."""
    return min((row.times_floor for row in rows if row.times_floor is not None), default=None)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def check(run: Run) -> list[Check]:
    """Every bar for the optimizers on the run's kind of device."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.find(family="optim"):
        cases.setdefault((row.op, row.size, row.dtype), []).append(row)
    judge = _cpu if run.machine["kind"] == "cpu" else _cuda
    return [c for (op, size, dtype), rows in cases.items() for c in judge(run, op, size, f"{op} {size} {dtype}", rows)]


def _select(rows: list[Row], wanted: Callable[[str], bool]) -> list[Row]:
    return [row for row in rows if wanted(row.provider)]


def _cpu(run: Run, op: str, size: str, case: str, rows: list[Row]) -> Iterator[Check]:
    def rivals(prefix: str) -> list[Row]:
        return _select(rows, lambda name: name.startswith(prefix))

    def over(bar: str, prefix: str, limit: float) -> Check:
        """Our time over that of the fastest rival."""
        found = rivals(prefix)
        skipped = any(row.status == "skipped" for row in found)
        return Check(bar, case, ratio(ours, fastest(found)), limit, partial=skipped)

    native = next(iter(_select(rows, "native".__eq__)), None)
    ours = native.times_floor if native else None
    if size in LARGE_MODELS:
        yield Check("times the floor", case, ours, TIMES_FLOOR)
        if op == "AdamW":
            yield over("time over torch fused", "torch-fused", 1.0)
        else:
            yield Check(
                "times faster than eager", case, ratio(fastest(rivals("eager")), ours), TIMES_EAGER, at_least=True
            )
            yield over("time over pytorch_optimizer's best", "pytorch_optimizer", 1.0)
            yield over("time over torch.compile", "compile", 1.0)
        yield _extra_memory(case, native)
    elif size == MANY_SMALL.name:
        yield over("time over torch fused AdamW", "torch-fused", TIMES_FUSED_ADAMW_MANY)


def _cuda(run: Run, op: str, size: str, case: str, rows: list[Row]) -> Iterator[Check]:
    native = next(iter(_select(rows, "native".__eq__)), None)
    measured = native is not None and native.status == "ok"
    if rows[0].elements >= LARGE_ELEMENTS:
        share = native.gbps / run.copy_gbps if native and native.gbps else None
        yield Check("share of copy bandwidth", case, share, SHARE_OF_COPY, at_least=True)
        yield _extra_memory(case, native)
    if size == TENSORS_300.name:
        yield Check("launches", case, native.launches if measured and native else None, LAUNCHES.get(op, 1))
        yield Check("host microseconds", case, native.host_us if measured and native else None, HOST_MICROSECONDS)


def _extra_memory(case: str, native: Row | None) -> Check:
    """Extra memory over what is allowed for a model of this size."""
    allowed = EXTRA_SHARE * native.input_bytes + EXTRA_BYTES if native else None
    extra = native.extra_bytes if native else None
    return Check("extra memory over allowed", case, ratio(extra, allowed), 1.0)


def exit_status(checks: list[Check]) -> int:
    """0: all bars hold. 1: some fail. 2: none fails, but some were not measured."""
    if any(c.holds is False for c in checks):
        return 1
    return 2 if not checks or any(c.holds is None for c in checks) else 0
