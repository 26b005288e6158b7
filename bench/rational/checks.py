# SPDX-License-Identifier: Apache-2.0
"""Bars for the rational activations."""

from __future__ import annotations

from collections.abc import Iterator

from ..bars import Check, ours, select, share_of_copy, time_over, times_faster
from ..results import Row, Run
from .activations import BACKWARD, FORWARD, TITLES

# CPU
TIMES_GELU = 1.0
TIMES_EAGER = 20.0
TIMES_COMPILE = 4.0
# GPU: the KAT-B shapes and the KAT paper's own. Below, a launch costs as much as the bytes do.
LARGE_ELEMENTS = 16_000_000


def case_of(row: Row) -> str:
    return f"{TITLES[row.op]}, {row.size} {row.dtype}"


def cpu(run: Run, rows: list[Row]) -> Iterator[Check]:
    case, op, native = case_of(rows[0]), rows[0].op, ours(rows)
    yield time_over("time over gelu", case, native, select(rows, "gelu".__eq__), TIMES_GELU)
    if op == BACKWARD:
        yield times_faster("times faster than eager", case, native, select(rows, "eager".__eq__), TIMES_EAGER)
        compiled = select(rows, "compile".__eq__)
        yield times_faster("times faster than torch.compile", case, native, compiled, TIMES_COMPILE)


def cuda(run: Run, rows: list[Row]) -> Iterator[Check]:
    case, op, native = case_of(rows[0]), rows[0].op, ours(rows)
    if rows[0].elements >= LARGE_ELEMENTS:
        yield share_of_copy(case, native.gbps if native else None, run)
        if op == BACKWARD:
            alone = case.replace(TITLES[BACKWARD], "backward alone")
            yield share_of_copy(alone, backward_gbps(run, native), run)
    peers = [row for row in rows if row.column == "peer"]
    yield time_over("time over the best peer", case, native, peers, 1.0)


def backward_gbps(run: Run, both: Row | None) -> float | None:
    """Floor bytes over time of a backward pass: what the forward pass, measured by itself, leaves of both."""
    if both is None:
        return None
    found = run.find(op=FORWARD, size=both.size, dtype=both.dtype, provider=both.provider)
    forward = found[0] if found else None
    if forward is None or forward.median is None or both.median is None or both.median <= forward.median:
        return None
    return (both.bytes - forward.bytes) / (both.median - forward.median) / 1e6
