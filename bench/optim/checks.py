# SPDX-License-Identifier: Apache-2.0
"""Bars for the optimizers."""

from __future__ import annotations

from collections.abc import Iterator

from ..bars import Check, ours, ratio, select, share_of_copy, time_over, times_faster
from ..results import Row, Run
from .models import GPT2_SMALL, MANY_SMALL, ONE_ELEMENT, TENSORS_300, VIT_B16

# CPU
TIMES_FLOOR = 1.2
TIMES_EAGER = 3.0
TIMES_FUSED_MANY = 0.6  # AdamW
TIMES_FUSED_ADAMW_MANY = 2.0  # all others
TIMES_PYTHON_OP = 2.0
# GPU
LARGE_ELEMENTS = 100_000_000
HOST_MICROSECONDS = 100.0
LAUNCHES = {"LAMB": 2, "LARS": 2}  # all others: one
# Extra memory does not grow with the model: at most a thousandth of it, and what a process's resident set varies by.
EXTRA_SHARE = 1e-3
EXTRA_BYTES = 1 << 20

LARGE_MODELS = (GPT2_SMALL.name, VIT_B16.name)


def case_of(row: Row) -> str:
    return f"{row.op} {row.size} {row.dtype}"


def cpu(run: Run, rows: list[Row]) -> Iterator[Check]:
    def rivals(prefix: str) -> list[Row]:
        return select(rows, lambda name: name.startswith(prefix))

    def over(bar: str, prefix: str, limit: float) -> Check:
        return time_over(bar, case, native, rivals(prefix), limit)

    case, op, size = case_of(rows[0]), rows[0].op, rows[0].size
    native = ours(rows)
    times_floor = native.times_floor if native else None
    if size in LARGE_MODELS:
        yield Check("times the floor", case, times_floor, TIMES_FLOOR)
        if op == "AdamW":
            yield over("time over torch fused", "torch-fused", 1.0)
        else:
            yield times_faster("times faster than eager", case, native, rivals("eager"), TIMES_EAGER)
            yield over("time over pytorch_optimizer's best", "pytorch_optimizer", 1.0)
            yield over("time over torch.compile", "compile", 1.0)
        yield extra_memory(case, native)
    elif size == MANY_SMALL.name:
        most = TIMES_FUSED_MANY if op == "AdamW" else TIMES_FUSED_ADAMW_MANY
        yield over("time over torch fused AdamW", "torch-fused", most)
    elif size == ONE_ELEMENT.name:
        yield over("time over an op in Python", "python-op", TIMES_PYTHON_OP)


def cuda(run: Run, rows: list[Row]) -> Iterator[Check]:
    case, op, size = case_of(rows[0]), rows[0].op, rows[0].size
    native = ours(rows)
    measured = native is not None and native.status == "ok"
    if rows[0].elements >= LARGE_ELEMENTS:
        yield share_of_copy(case, native.gbps if native else None, run)
        yield extra_memory(case, native)
    if size == TENSORS_300.name:
        yield Check("launches", case, native.launches if measured and native else None, LAUNCHES.get(op, 1))
        yield Check("host microseconds", case, native.host_us if measured and native else None, HOST_MICROSECONDS)


def extra_memory(case: str, native: Row | None) -> Check:
    """Extra memory over what is allowed for a model of this size."""
    allowed = EXTRA_SHARE * native.input_bytes + EXTRA_BYTES if native else None
    extra = native.extra_bytes if native else None
    return Check("extra memory over allowed", case, ratio(extra, allowed), 1.0)
