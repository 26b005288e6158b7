# SPDX-License-Identifier: Apache-2.0
"""The bars that a run must clear, judged from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator

from .bars import Check, exit_status
from .kv import checks as kv
from .optim import checks as optim
from .rational import checks as rational
from .results import Row, Run
from .spectral import checks as spectral

__all__ = ["Check", "below", "check", "exit_status"]

FAMILIES = {"optim": optim, "rational": rational, "kv": kv, "spectral": spectral}


def judged(run: Run, family: str | None = None) -> Iterator[tuple[str, list[Check]]]:
    """Every bar for one family, or for all of them, on the run's kind of device, by the names of cases."""
    for name, bars in FAMILIES.items():
        if family not in (None, name):
            continue
        cases: dict[tuple[str, str, str], list[Row]] = {}
        for row in run.find(family=name):
            cases.setdefault((row.op, row.size, row.dtype), []).append(row)
        judge = bars.cpu if run.machine["kind"] == "cpu" else bars.cuda
        for case, rows in cases.items():
            yield "/".join((name, *case)), list(judge(run, rows))


def check(run: Run, family: str | None = None) -> list[Check]:
    """All bars, one after the other."""
    return [bar for _, bars in judged(run, family) for bar in bars]


def below(run: Run) -> dict[str, list[Check]]:
    """By the names of cases, the bars that they miss."""
    missed = {case: [bar for bar in bars if bar.holds is False] for case, bars in judged(run)}
    return {case: bars for case, bars in missed.items() if bars}
