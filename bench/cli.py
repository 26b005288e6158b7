# SPDX-License-Identifier: Apache-2.0
"""Measures every op against eager PyTorch, torch.compile and peers, relative to the time of moving its bytes once."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from singlepass._ops import requested

from . import checks, documents, results, tables
from .grid import Grid, number, times
from .registry import FAMILIES, Case, Provider, cases, dtype_name
from .timing import FULL, QUICK

# The default run stays under five minutes, the last case that it starts included.
BUDGET_SECONDS = 255.0
DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/gpu-proof.md",
    "docs/index.md",
    "docs/kv.md",
    "docs/optim.md",
    "docs/performance.md",
    "docs/rational.md",
    "docs/spectral.md",
    "docs/trust.md",
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
            f'bench: expected the package {package}; got none. Install it: pip install ".[bench]" in a clone, '
            f"or pip install {package}"
        )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="singlepass bench", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="{list,run,compare,plot,publish,table}")

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
        help="seconds (default: %(default)g) in which cases are begun; what is left out is counted",
    )
    sub.add_argument("--threads", type=int, default=None, help="CPU threads (default: as torch decides)")
    sub.add_argument(
        "--seconds",
        type=float,
        default=None,
        help=f"timed seconds for each provider (default: {QUICK.seconds:g}, with --full {FULL.seconds:g})",
    )
    sub.add_argument(
        "--check",
        action="store_true",
        help="judge the performance targets, which are for the sizes of a full run: exit status 1 if any is missed, "
        "2 if any was not measured",
    )
    sub.add_argument(
        "--results", type=Path, default=results.LOCAL, help="folder for result files (default: %(default)s)"
    )
    sub.add_argument("--no-save", action="store_true", help="write no result file, pictures or report")

    sub = add(
        "compare",
        compare,
        "compare two result files (of two machines: by multiples of the floor); exit status 1 if anything got slower "
        "than allowed",
    )
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

    sub = add("publish", publish, f"copy a result file and its pictures to {results.RESULTS}, which documents quote")
    sub.add_argument("result", type=Path, nargs="?", help="result file (default: the newest)")

    sub = add(
        "table", table, "show the tables of a result file, or write tables and plots into marked blocks of documents"
    )
    sub.add_argument(
        "result", type=Path, nargs="*", help="result files (default: the newest of each family for CPU and for GPU)"
    )
    sub.add_argument(
        "--check",
        action="store_true",
        help="judge the performance targets: exit status 1 if any is missed, 2 if any was not measured",
    )
    sub.add_argument(
        "--write", type=Path, nargs="*", metavar="FILE", help=f"documents to fill (default: {', '.join(DOCUMENTS)})"
    )
    return top


def choose_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: expected a CUDA device; got none. Leave out --device to measure on the CPU")
    return device


def matches(value: str, patterns: str) -> bool:
    return any(fnmatch(value.lower(), pattern.lower()) for pattern in patterns.split(","))


def wanted_cases(arguments: argparse.Namespace) -> Callable[[Case], bool]:
    return lambda case: (
        matches(case.family, arguments.family)
        and matches(case.op, arguments.op)
        and matches(case.size, arguments.size)
        and matches(dtype_name(case.dtype), arguments.dtype)
    )


def wanted_providers(arguments: argparse.Namespace) -> Callable[[Provider], bool]:
    return lambda provider: matches(provider.name, arguments.provider)


def list_cases(arguments: argparse.Namespace) -> int:
    from . import screen

    device = choose_device(arguments.device)
    grid = Grid(f"Cases of a full run on {device}", ["case", "elements", "floor bytes", "providers"], numbers=False)
    is_wanted, competes = wanted_cases(arguments), wanted_providers(arguments)
    for case in filter(is_wanted, cases(device)):
        names = [p.name + (f" ({why})" if (why := p.why_not(device)) else "") for p in filter(competes, case.providers)]
        grid.lines.append([case.name, f"{case.elements:,}", f"{case.bytes:,}", ", ".join(names)])
    require_some(grid.lines)
    screen.show([grid], screen.console())
    return 0


def require_some(chosen: Sequence[object]) -> None:
    if not chosen:
        raise ValueError("bench: expected a choice that fits some case; got none. See singlepass bench list")


def run(arguments: argparse.Namespace) -> int:
    from .run import run as measure

    requested(None)  # each provider names its backend, so that nothing else would look at what was set
    return measure(choose_device(arguments.device), arguments, wanted_cases(arguments), wanted_providers(arguments))


def publish(arguments: argparse.Namespace) -> int:
    path = arguments.result or results.newest_path(results.LOCAL)
    if path is None:
        raise ValueError(
            f"bench: expected a result file in {results.LOCAL}; got none. Measure with singlepass bench run"
        )
    folder = results.RESULTS / results.slug(results.load(path).machine)
    folder.mkdir(parents=True, exist_ok=True)
    for source in (path, *sorted(path.parent.glob(f"{path.stem}-*.svg"))):
        print(shutil.copy(source, folder))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from . import screen

    before, after = results.load(arguments.before), results.load(arguments.after)
    same = all(before.machine[key] == after.machine[key] for key in ("device", "threads"))
    if before.machine["kind"] != after.machine["kind"]:
        raise ValueError(
            f"bench compare: expected runs on one kind of device; got {before.device_line} and {after.device_line}. "
            "Compare CPUs with CPUs"
        )
    unit = "ms per call" if same else "multiples of the floor, as the machines differ"
    grid = Grid(unit, ["case", "provider", "before", "after", "change"])
    if not same:
        grid.notes = [f"before: {before.device_line}", f"after: {after.device_line}"]
    if before.machine.get("keeps_freed_memory") != after.machine.get("keeps_freed_memory"):
        grid.notes.append("Only one of the two kept freed memory, which large results depend on: docs/benchmarks.md")
    slower = False
    old = {row.key: row for row in before.rows}
    for row in after.rows:
        base = old.get(row.key)
        if base is None or base.ms is None or base.floor_ms is None or row.ms is None or row.floor_ms is None:
            continue
        units = (1.0, 1.0) if same else (base.floor_ms["q50"], row.floor_ms["q50"])
        values = base.ms["q50"] / units[0], row.ms["q50"] / units[1]
        change = 100 * (values[1] / values[0] - 1)
        # Beyond the other run's quantiles: a shift that its own spread does not explain.
        regressed = change > arguments.fail_above and values[1] > base.ms["q80"] / units[0]
        slower |= regressed
        shown = [number(value) if same else times(value) for value in values]
        grid.lines.append(["/".join(row.key[:-1]), row.provider, *shown, f"{change:+.1f} %" + " SLOWER" * regressed])
    screen.show([grid], screen.console())
    return int(slower)


def need_run(path: Path | None, family: str | None = None) -> results.Run:
    """The run of a file, or the newest: of those that were made here, else of those that are published."""
    if path is not None:
        return results.load(path)
    for folder in (results.LOCAL, results.RESULTS):
        for kind in ("cuda", "cpu"):
            if found := results.newest(kind, folder, family):
                return found
    raise ValueError(f"bench: expected a result file in {results.LOCAL}; got none. Measure with singlepass bench run")


def plot(arguments: argparse.Namespace) -> int:
    need("matplotlib")
    from .plot import draw

    family, dtype = arguments.family, arguments.dtype
    out = need_run(arguments.result, family)
    draw(out, arguments.output, arguments.size or default_size(out, family, dtype), dtype, family)
    print(arguments.output)
    return 0


def default_size(out: results.Run, family: str, dtype: str) -> str:
    row = results.first_measured(out, family, dtype=dtype)
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
    from . import screen

    given = [results.load(path) for path in arguments.result]
    to = screen.console()
    if arguments.write is None:
        out = given[0] if given else need_run(None)
        to.print(tables.machine_line(out), markup=False)
        verdicts = checks.check(out)
        targets = [tables.check_grid(verdicts)] if arguments.check else []
        screen.show([*tables.grids(out), tables.summary_grid(lambda family: out), *targets], to)
        return checks.exit_status(verdicts) if arguments.check else 0

    def find(kind: str, family: str) -> results.Run | None:
        fits = (r for r in given if r.machine["kind"] == kind and r.find(family=family))
        return next(fits, None) or results.newest(kind, family=family)

    for document in arguments.write or map(Path, DOCUMENTS):
        if not document.is_file():
            contract = f"bench table: expected the document {document}; got none. "
            raise ValueError(contract + "Run it in a clone, or name documents after --write")
        print(f"{document}: {documents.inject(document, find, draw_beside)} blocks")
    return 0
