# SPDX-License-Identifier: Apache-2.0
"""The bars that a run must clear, judged from its rows alone."""

from __future__ import annotations

from ..results import Row, Run
from . import kv, optim, rational, spectral
from .bars import Check, exit_status

__all__ = ["Check", "check", "exit_status"]

FAMILIES = {"optim": optim, "rational": rational, "kv": kv, "spectral": spectral}


def check(run: Run, family: str | None = None) -> list[Check]:
    """Every bar for one family, or for all of them, on the run's kind of device."""
    found = []
    for name, bars in FAMILIES.items():
        if family not in (None, name):
            continue
        cases: dict[tuple[str, str, str], list[Row]] = {}
        for row in run.find(family=name):
            cases.setdefault((row.op, row.size, row.dtype), []).append(row)
        judge = bars.cpu if run.machine["kind"] == "cpu" else bars.cuda
        for rows in cases.values():
            found += judge(run, rows)
    return found
