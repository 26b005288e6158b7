# SPDX-License-Identifier: Apache-2.0
"""Writes ``tables.json``: ``python -m singlepass.rational._make_tables``."""

from __future__ import annotations

from . import _tables as tables
from ._fit import fit_rational

DEGREES = (5, 4)
INTERVAL = (-3.0, 3.0)
# On [-3, 3] the best gelu is nearer, 1.3e-3 instead of 3.4e-3, but grows quadratically beyond, where inputs go too.
INTERVALS = {"gelu": (-8.0, 8.0), "quick_gelu": (-8.0, 8.0)}
WORST = 5e-2  # a table further off than this is none: better an error than a wrong activation


def make() -> dict[tuple[str, str], tables.Table]:
    """Every target in every form, by name and form, where it holds."""
    pairs = [(name, form) for name in tables.TARGETS for form in "ABC"]
    fitted = {
        (name, form): fit_rational(tables.TARGETS[name], form, DEGREES, INTERVALS.get(name, INTERVAL))
        for name, form in pairs
    }
    return {key: entry for key, entry in fitted.items() if entry.max_error is not None and entry.max_error <= WORST}


if __name__ == "__main__":
    tables.FILE.write_text(tables.dump(make()), encoding="utf-8")
