# SPDX-License-Identifier: Apache-2.0
"""`singlepass bench run`: probe the machine, plan, measure, show, save."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from . import checks, cli, results, screen, tables
from .memory import keep_freed_memory
from .probe import probe
from .registry import Case, Provider, Tier, cases, quick_cases
from .runner import Entry, Runner, plan
from .timing import FULL, QUICK

Wanted = Callable[[Case], bool]


def run(device: torch.device, arguments: argparse.Namespace, wanted: Wanted, rival: Callable[[Provider], bool]) -> int:
    """Returns the exit status: 0; with ``--check`` that of the targets; 130 if it was interrupted."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Compiling would warn, once for each graph, that it leaves a profiler's label out.
    torch._logging.set_logs(dynamo=40, inductor=40)
    import singlepass  # noqa: F401 - registers the ops, the floor's among them

    from .floor import require_stream

    require_stream(device)
    keeps_freed_memory = keep_freed_memory()
    every = [case for case in cases(device) if wanted(case)]
    to = screen.console(record=True)
    with to.status("probing the machine: bandwidth, matrix products, a compilation"):
        found = probe(device)
    quick = [case for case in quick_cases(device, found) if wanted(case)]
    chosen = every if arguments.full or arguments.check or not quick else quick
    cli.require_some(chosen)
    full = arguments.full or chosen is every
    entries = plan(chosen, device, lambda provider: rival(provider) and (full or provider.tier < Tier.SLOW))
    effort = FULL if arguments.full else QUICK
    if arguments.seconds is not None:
        effort = replace(effort, seconds=arguments.seconds)
    runner = Runner(device, effort, found, None if arguments.full else arguments.budget)
    out = results.start(device, found, runner.budget)
    out.machine["keeps_freed_memory"] = keeps_freed_memory
    to.print(tables.machine_line(out), markup=False)
    if (load := out.machine["load_average"]) > 0.5 * out.machine["cores"]:
        to.print(f"The load average is {load:.1f}: other programs slow down some of these steps.", style="red")
    measure(runner, entries, out, to)
    out.left_out = len({case.name for case in every} - {"/".join(row.key[:-1]) for row in out.rows})
    show_results(out, to)
    verdicts = checks.check(out)
    if arguments.check:
        screen.show([tables.check_grid(verdicts)], to)
    if not arguments.no_save:
        save(out, arguments.results, to)
    if out.interrupted:
        return 130
    return checks.exit_status(verdicts) if arguments.check else 0


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: what was measured is shown and saved."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(runner: Runner, entries: list[Entry], out: results.Run, to: Console) -> None:
    begin = time.perf_counter()
    try:
        with termination_as_interrupt(), screen.advancing(len(entries), to) as advance:
            for row in runner.run(entries, advance):
                out.rows.append(row)
    except KeyboardInterrupt:
        out.interrupted = True
        to.print("Interrupted: this is what was measured until then.", style="red")
    out.seconds = time.perf_counter() - begin


def show_results(out: results.Run, to: Console) -> None:
    to.print(f"Measured for {out.seconds:.0f} s.\n")
    screen.show(tables.grids(out), to)
    to.print(
        "In parentheses: time over the floor, the time in which this machine moves the bytes of the call once, measured"
        ' in turn with it. "none": nobody ships it, or it failed. eager is this package\'s reference in plain PyTorch.'
    )
    if out.left_out:
        everything = "All of it: singlepass bench run --full"
        to.print(f"Left out: {out.left_out} cases, and what compiles for minutes. {everything}")
    to.print()
    screen.show([tables.summary_grid(lambda family: out)], to)


def save(out: results.Run, folder: Path, to: Console) -> None:
    from .report import write_report

    path = out.save(folder)
    to.print(f"results:  {path}", markup=False, soft_wrap=True)
    for picture in save_plots(out, path):
        to.print(f"picture:  {picture}", markup=False, soft_wrap=True)
    to.print(f"report:   {write_report(to, path)}", markup=False, soft_wrap=True)


def save_plots(out: results.Run, path: Path) -> Iterator[Path]:
    """A picture for each family beside the result file, of the first input that was measured.

    Without matplotlib nothing is drawn: what was measured is kept, and can be drawn elsewhere.
    """
    if not cli.installed("matplotlib"):
        return
    from .plot import draw

    for family in dict.fromkeys(row.family for row in out.rows):
        row = results.first_measured(out, family)
        if row is not None:
            picture = path.with_name(f"{path.stem}-{family}.svg")
            draw(out, picture, row.size, row.dtype, family)
            yield picture
