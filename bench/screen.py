# SPDX-License-Identifier: Apache-2.0
"""What a person sees: tables in at most 100 columns, and how far a run has come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .grid import Grid

if TYPE_CHECKING:
    from .runner import Entry

WIDTH = 100


def console(record: bool = False) -> Console:
    found = Console(record=record, highlight=False)
    # A pipe has no width of its own; a wider terminal would make lines that are hard to follow.
    found.width = min(found.width, WIDTH) if found.is_terminal else WIDTH
    return found


def show(grids: Iterable[Grid], to: Console) -> None:
    for grid in grids:
        shown = Table(title=grid.title, title_justify="left", padding=(0, 1), pad_edge=False)
        for i, name in enumerate(grid.head):
            right = grid.numbers and i > 0
            style = "bold" if name.startswith("**") else None
            shown.add_column(name.strip("*"), justify="right" if right else "left", style=style, no_wrap=i == 0)
        for line in grid.lines:
            shown.add_row(*(text.replace("[", r"\[") for text in line))
        to.print(shown)
        for note in grid.notes:
            to.print(note, markup=False, style="dim")
        to.print()


class Advance:
    """Says which case is measured, and how many are left. Where there is no terminal, one line for each case."""

    def __init__(self, total: int, to: Console, progress: Progress | None) -> None:
        self._total, self._to, self._progress = total, to, progress
        self._task = progress.add_task("", total=total) if progress else None
        self._begin, self._done = time.perf_counter(), 0

    def __call__(self, entry: Entry) -> None:
        what = f"{entry.case.name}: {', '.join(provider.name for provider in entry.available)}"
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self._done, description=what[: WIDTH - 42])
        else:
            left = self._total - self._done - 1
            seconds = time.perf_counter() - self._begin
            self._to.print(f"{seconds:4.0f} s, {left} more: {what}"[:WIDTH], markup=False)
        self._done += 1


@contextmanager
def advancing(total: int, to: Console) -> Iterator[Advance]:
    if not to.is_terminal:
        yield Advance(total, to, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    # A bar that redraws often would take time from what is measured.
    with Progress(*columns, console=to, refresh_per_second=1, transient=True) as progress:
        yield Advance(total, to, progress)
