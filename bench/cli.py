# SPDX-License-Identifier: Apache-2.0
"""`singlepass bench {list,run,compare,plot,table}`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import checks, results, tables
from .registry import FAMILIES, Case, cases, dtype_name
from .runner import Runner, Stage, plan
from .timing import FULL, QUICK

if TYPE_CHECKING:
    from rich.console import Console

# The default run stays under five minutes on two cores, the last stage that it starts included.
BUDGET_SECONDS = 240.0
DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/gpu-proof.md",
    "docs/kv.md",
    "docs/performance.md",
    "docs/spectral.md",
)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 0 for success, others as `singlepass bench COMMAND --help` says."""
    arguments = parser().parse_args(argv)
    try:
        need("rich")
        status: int = arguments.command(arguments)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    return status


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def need(package: str) -> None:
    if not installed(package):
        raise ValueError(
            f"bench: expected the package {package}; got none. Install it: pip install 'singlepass[bench]'"
        )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="singlepass bench", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="{list,run,compare,plot,table}")

    def add(name: str, command: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    for name, command, text in (
        ("list", list_cases, "show cases and providers"),
        ("run", run, "measure, show tables, save a result file"),
    ):
        sub = add(name, command, text)
        sub.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda if there is one)")
        for option in ("family", "op", "size", "dtype", "provider"):
            sub.add_argument(f"--{option}", default="*", help=f"choose by {option}: patterns such as 'a*', with commas")
    sub.add_argument("--full", action="store_true", help="measure everything, however long it takes")
    sub.add_argument(
        "--budget",
        type=float,
        default=BUDGET_SECONDS,
        help="seconds (default: %(default)g); what comes later is skipped",
    )
    sub.add_argument("--threads", type=int, default=None, help="CPU threads (default: as torch decides)")
    sub.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"timed seconds for each provider (default: {QUICK.seconds:g}, with --full {FULL.seconds:g})",
    )
    sub.add_argument(
        "--check", action="store_true", help="judge the bars: exit status 1 if any fails, 2 if any is not measured"
    )
    sub.add_argument(
        "--results", type=Path, default=results.RESULTS, help="folder for result files (default: %(default)s)"
    )
    sub.add_argument("--no-save", action="store_true", help="write no result file and no plot")

    sub = add("compare", compare, "compare two result files; exit status 1 if anything got slower than allowed")
    sub.add_argument("before", type=Path)
    sub.add_argument("after", type=Path)
    sub.add_argument(
        "--fail-above", type=float, default=5.0, help="allowed slow-down in percent (default: %(default)g)"
    )

    sub = add("plot", plot, "draw a result file")
    sub.add_argument("result", type=Path, nargs="?", help="result file (default: the newest)")
    sub.add_argument("--output", type=Path, default=Path("bench.svg"), help="image file (default: %(default)s)")
    sub.add_argument("--family", default=FAMILIES[0], choices=FAMILIES, help="default: %(default)s")
    sub.add_argument("--size", default=None, help="default: the first that was measured")
    sub.add_argument("--dtype", default="float32")

    sub = add(
        "table", table, "show the tables of a result file, or write tables and plots into marked blocks of documents"
    )
    sub.add_argument(
        "result", type=Path, nargs="*", help="result files (default: the newest of each family for CPU and for GPU)"
    )
    sub.add_argument(
        "--check", action="store_true", help="judge the bars: exit status 1 if any fails, 2 if any is not measured"
    )
    sub.add_argument(
        "--write", type=Path, nargs="*", metavar="FILE", help=f"documents to fill (default: {', '.join(DOCUMENTS)})"
    )
    return top


def console() -> Console:
    from rich.console import Console

    # A pipe has no width: tables then take what they need.
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 180))


def show(grids: Iterable[tables.Grid], to: Console) -> None:
    from rich.table import Table

    for grid in grids:
        shown = Table(title=grid.title, title_justify="left")
        for i, name in enumerate(grid.head):
            shown.add_column(
                name.strip("*"), justify="right" if i else "left", style="bold" if name.startswith("**") else None
            )
        for line in grid.lines:
            shown.add_row(*(text.replace("[", r"\[") for text in line))
        to.print(shown)
        for note in grid.notes:
            to.print(note, markup=False)


def choose_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: expected a CUDA device; got none. Leave out --device to measure on the CPU")
    return device


def matches(value: str, patterns: str) -> bool:
    return any(fnmatch(value.lower(), pattern.lower()) for pattern in patterns.split(","))


def chosen_cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    found = [
        case
        for case in cases(device)
        if matches(case.family, arguments.family)
        and matches(case.op, arguments.op)
        and matches(case.size, arguments.size)
        and matches(dtype_name(case.dtype), arguments.dtype)
    ]
    if not found:
        raise ValueError("bench: expected a choice that fits some case; got none. See singlepass bench list")
    return found


def list_cases(arguments: argparse.Namespace) -> int:
    device = choose_device(arguments.device)
    grid = tables.Grid(f"Cases on {device}", ["case", "tensors", "elements", "floor bytes", "flops/byte", "providers"])
    for case in chosen_cases(arguments, device):
        names = [
            p.name + (f" ({why})" if (why := p.why_not(device)) else "")
            for p in case.providers
            if matches(p.name, arguments.provider)
        ]
        facts = [f"{case.tensors:,}", f"{case.elements:,}", f"{case.bytes:,}", f"{case.flops / case.bytes:.2f}"]
        grid.lines.append([case.name, *facts, ", ".join(names)])
    show([grid], console())
    return 0


def run(arguments: argparse.Namespace) -> int:
    device = choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Compiling would warn, once for each graph, that it leaves a profiler's label out.
    torch._logging.set_logs(dynamo=40, inductor=40)
    import singlepass  # noqa: F401 - registers the ops, the floor's among them

    from .floor import copy_bandwidth, matrix_rate, require_stream

    require_stream(device)
    stages = plan(chosen_cases(arguments, device), lambda provider: matches(provider.name, arguments.provider))
    budget = None if arguments.full else arguments.budget
    effort = FULL if arguments.full else QUICK
    if arguments.seconds is not None:
        effort = replace(effort, seconds=arguments.seconds)
    runner = Runner(device, effort, budget)
    out = results.start(device, copy_bandwidth(device), matrix_rate(device), budget)
    to = console()
    to.print(tables.machine_line(out), markup=False)
    if (load := out.machine["load_average"]) > 0.5 * out.machine["cores"]:
        to.print(
            f"The load average is {load:.1f}: other programs slow some of these steps more than others.", style="red"
        )
    measure(runner, stages, out, to)
    show(tables.grids(out), to)
    verdicts = checks.check(out)
    if arguments.check:
        show([tables.check_grid(verdicts)], to)
    if not arguments.no_save:
        path = out.save(arguments.results)
        to.print(f"results: {path}", markup=False)
        for picture in save_plots(out, path.with_suffix(".svg")):
            to.print(f"plot:    {picture}", markup=False)
    return checks.exit_status(verdicts) if arguments.check else 0


def measure(runner: Runner, stages: list[Stage], out: results.Run, to: Console) -> None:
    """Run all stages under a progress bar."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.perf_counter()
    # A bar that redraws often would take time from what is measured.
    with Progress(*columns, console=to, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(stages))
        done = -1

        def advance(stage: Stage) -> None:
            nonlocal done
            done += 1
            what = ", ".join(p.name for p in stage.providers)
            progress.update(task, completed=done, description=f"{stage.case.name}: {what}"[:90])

        out.rows.extend(runner.run(stages, advance))
        progress.update(task, completed=len(stages), description="done")
    out.seconds = time.perf_counter() - begin


def first_measured(out: results.Run, family: str, **want: str) -> results.Row | None:
    return next((row for row in out.find(family=family, **want) if row.median is not None), None)


def save_plots(out: results.Run, path: Path) -> Iterator[Path]:
    """Draw the first input that was measured, for each family; the name of a family goes into all names but one.

    Without matplotlib nothing is drawn: what was measured is kept, and drawn elsewhere.
    """
    if not installed("matplotlib"):
        return
    from .plot import draw

    for family in FAMILIES:
        row = first_measured(out, family)
        if row is not None:
            picture = path if family == FAMILIES[0] else path.with_name(f"{path.stem}-{family}{path.suffix}")
            draw(out, picture, row.size, row.dtype, family)
            yield picture


def compare(arguments: argparse.Namespace) -> int:
    before, after = results.load(arguments.before), results.load(arguments.after)
    if before.machine["device"] != after.machine["device"] or before.machine["threads"] != after.machine["threads"]:
        raise ValueError(
            f"bench compare: expected runs of one device; got {before.device_line} and {after.device_line}. "
            "Measure both on the same one"
        )
    old = {row.key: row for row in before.rows}
    grid = tables.Grid("ms per call", ["case", "provider", "before", "after", "change"])
    slower = False
    for row in after.rows:
        base = old.get(row.key)
        if base is None or base.median is None or row.median is None:
            continue
        change = 100 * (row.median / base.median - 1)
        # A median outside of the other run's quantiles: a shift that its own spread does not explain.
        regressed = change > arguments.fail_above and base.ms is not None and row.median > base.ms["q80"]
        slower |= regressed
        case = "/".join(row.key[:-1])
        grid.lines.append(
            [
                case,
                row.provider,
                tables.number(base.median),
                tables.number(row.median),
                f"{change:+.1f} %" + " SLOWER" * regressed,
            ]
        )
    show([grid], console())
    return int(slower)


def need_run(path: Path | None, family: str | None = None) -> results.Run:
    if path is not None:
        return results.load(path)
    found = results.newest("cuda", family=family) or results.newest("cpu", family=family)
    if found is None:
        raise ValueError(
            f"bench: expected a result file in {results.RESULTS}; got none. Measure with singlepass bench run"
        )
    return found


def plot(arguments: argparse.Namespace) -> int:
    need("matplotlib")
    from .plot import draw

    family, dtype = arguments.family, arguments.dtype
    out = need_run(arguments.result, family)
    draw(out, arguments.output, arguments.size or default_size(out, family, dtype), dtype, family)
    console().print(arguments.output, markup=False)
    return 0


def default_size(out: results.Run, family: str, dtype: str) -> str:
    row = first_measured(out, family, dtype=dtype)
    if row is None:
        raise ValueError(f"bench plot: expected rows of family {family} in {dtype}; got none. See singlepass bench run")
    return row.size


def draw_beside(document: Path, out: results.Run, options: dict[str, str]) -> str:
    """Draw the plot that a document's marker asks for and return the Markdown that shows it."""
    need("matplotlib")
    from .plot import TITLES, WORDS, draw

    family, dtype = options["family"], options.get("dtype", "float32")
    size = options.get("size") or default_size(out, family, dtype)
    path = Path(options.get("path", f"docs/images/{family}-{out.machine['kind']}-{size}-{dtype}.svg"))
    draw(out, path, size, dtype, family)
    what = f"{TITLES.get(size, size)}, {dtype}, {out.device_line}"
    words = f"{WORDS[family][0]}, time relative to the memory floor: {what}"
    return f"![{words}]({os.path.relpath(path, document.parent)})"


def table(arguments: argparse.Namespace) -> int:
    given = [results.load(path) for path in arguments.result]
    if arguments.write is None:
        out = given[0] if given else need_run(None)
        to = console()
        to.print(tables.machine_line(out), markup=False)
        verdicts = checks.check(out)
        show([*tables.grids(out), *([tables.check_grid(verdicts)] if arguments.check else [])], to)
        return checks.exit_status(verdicts) if arguments.check else 0

    def find(kind: str, family: str) -> results.Run | None:
        fits = (r for r in given if r.machine["kind"] == kind and r.find(family=family))
        return next(fits, None) or results.newest(kind, family=family)

    for document in arguments.write or map(Path, DOCUMENTS):
        filled = tables.inject(document, find, draw_beside)
        console().print(f"{document}: {filled} blocks", markup=False)
    return 0
