# SPDX-License-Identifier: Apache-2.0
"""Tables of a run: each provider's time, and that time in multiples of the floor that was timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .checks import Check
from .grid import Grid, number, size_of, times
from .kv import caches
from .optim.models import MANY_SMALL, ONE_ELEMENT
from .rational import activations
from .registry import FAMILIES
from .results import Row, Run
from .spectral import layers


@dataclass(frozen=True)
class Yardstick:
    """What a table compares with in place of torch's version of the same op.

    title: of its column. itself: the provider of torch's own of which it is one, which fills the column where the op is
    the yardstick's; torch's column, which would hold nothing else, is then left out.
    """

    title: str
    itself: str | None = None


@dataclass(frozen=True)
class Words:
    """How the tables of a family read.

    first: the head of the first column. titles: what ops are called there. torch: the columns of providers that are
    torch's own, what they are called, and what they are. yardsticks: others than torch's own, by sizes that have them.
    rivals: the columns of those that a user could take instead.
    """

    first: str
    torch: tuple[str, str]
    what: str
    titles: dict[str, str] = field(default_factory=dict)
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)
    peer: str = "best peer"
    rivals: tuple[str, ...] = ("torch.optim", "yardstick", "torch.compile", "peer")
    no_rivals: tuple[str, ...] = ()  # ops whose yardstick is no rival
    host_bound: tuple[str, ...] = ()  # sizes at which a call is not bound by what it moves
    note: str = ""


WORDS = {
    "optim": Words(  # AdamW, the yardstick of other rules, computes something else
        "optimizer",
        ("torch.optim", "torch"),
        "one optimizer step",
        yardsticks={
            MANY_SMALL.name: Yardstick("torch fused AdamW", itself="torch-fused"),
            ONE_ELEMENT.name: Yardstick("op in Python"),
        },
        rivals=("torch.optim", "torch.compile", "peer"),
        host_bound=(ONE_ELEMENT.name,),
    ),
    "rational": Words("x, pass", ("yardstick", "torch GELU"), "rational activation", activations.TITLES),
    "kv": Words(
        "batch x tokens, op",
        ("yardstick", "torch, 16/32 bits"),
        "compressed KV cache",
        caches.TITLES,
        no_rivals=(caches.QUANTIZE,),
    ),
    "spectral": Words(
        "width x tokens, op",
        ("yardstick", "torch, full rank"),
        "sparse spectral training",
        layers.TITLES,
        peer="products alone",
        rivals=("yardstick", "torch.compile"),
        note="A training step is bound by matrix products, not by moving bytes: compare it with its products alone.",
    ),
}


class Notes:
    """Footnotes in the order of their first use; equal ones share a mark."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"[{i}] {text}" for i, text in enumerate(self.texts, 1)]


def fastest(rows: list[Row]) -> Row | None:
    return min((row for row in rows if row.median is not None), key=lambda row: row.times_floor or 0.0, default=None)


def cell(rows: list[Row], notes: Notes, name: bool = False) -> str:
    """Milliseconds of the fastest of the rows and its multiple of the floor; or "none", and why if that is known."""
    best = fastest(rows)
    if best is None:
        reasons = [row.reason for row in rows if row.reason and row.reason != "not installed"]
        return "none" + (notes.mark(reasons[0][:160]) if reasons else "")
    says = [best.provider] * name + [f"computes something else: {best.differs}"] * (best.differs is not None)
    return f"{number(best.median)} ({times(best.times_floor)})" + (notes.mark("; ".join(says) + ".") if says else "")


def title_of(row: Row) -> str:
    """A row of the family's table."""
    titles = WORDS[row.family].titles
    return f"{row.size}, {titles[row.op]}" if row.op in titles else row.op


def family_grid(run: Run, family: str, dtype: str, **want: str) -> Grid:
    """Milliseconds of one call by each provider, and multiples of its floor; ours, torch's and peers' first."""
    words, rows = WORDS[family], run.find(family=family, dtype=dtype, **want)
    columns = {"native": "**singlepass**", words.torch[0]: words.torch[1]}
    measured = any(row.column == "yardstick" for row in rows)
    if yardstick := words.yardsticks.get(want.get("size", "")) if measured else None:
        if yardstick.itself is not None:
            del columns[words.torch[0]]
        columns["yardstick"] = yardstick.title
    if run.machine["kind"] == "cuda":
        columns = {"native": "**singlepass**", "triton": "Triton"} | columns
    columns |= {"peer": words.peer, "torch.compile": "torch.compile", "eager": "eager"}
    columns = {key: title for key, title in columns.items() if any(row.column == key for row in rows)}
    heads = [words.first, *columns.values()]
    if run.machine["kind"] == "cuda":
        heads += ["launches", "host us"]
    # A note names the peer, and where several compete in a column the fastest of them.
    competitors = {column: {row.provider for row in rows if row.column == column} for column in columns}
    named = [column for column, names in competitors.items() if column == "peer" or len(names) > 1]
    of = f"{want['size']}, " if "size" in want else ""
    grid, notes = Grid(f"{of}{words.what}, {dtype}: ms (multiple of the floor)", heads), Notes()
    for key in dict.fromkeys((row.size, row.op) for row in rows):
        some = [row for row in rows if (row.size, row.op) == key]
        by_column = {column: [row for row in some if row.column == column] for column in columns}
        if yardstick and not by_column["yardstick"]:
            by_column["yardstick"] = [row for row in some if row.provider == yardstick.itself]
        line = [title_of(some[0])]
        line += [cell(found, notes, column in named) for column, found in by_column.items()]
        if run.machine["kind"] == "cuda":
            ours = fastest(by_column["native"])
            line += [number(ours.launches if ours else None), number(ours.host_us if ours else None)]
        grid.lines.append(line)
    grid.notes = [*notes.lines(), *([words.note] if words.note else [])]
    return grid


def token_grid(run: Run) -> Grid:
    """What a user of a whole model feels, with ZipCache and with an uncompressed cache."""
    grid = Grid("SmolLM2-135M", ["tokens of the prompt", "cache", "first token after, s", "then tokens per second"])
    for size in dict.fromkeys(row.size for row in run.find(family="kv", op=caches.NEXT_TOKEN)):
        for column, title in (("yardstick", "uncompressed"), ("native", "**ZipCache**")):
            first, following = (
                fastest(run.find(family="kv", op=op, size=size, column=column))
                for op in (caches.FIRST_TOKEN, caches.NEXT_TOKEN)
            )
            seconds = first.median / 1e3 if first and first.median else None
            rate = 1e3 / following.median if following and following.median else None
            grid.lines.append([f"{int(size.split('x')[1]):,}", title, number(seconds), number(rate)])
    return grid


def memory_grid(run: Run, family: str, dtype: str, **want: str) -> Grid:
    """Memory that a call takes beside its inputs (an optimizer's: parameters, gradients and states)."""
    words, rows = WORDS[family], run.find(family=family, dtype=dtype, **want)
    columns = {"native": "**singlepass**", words.torch[0]: words.torch[1], "eager": "eager"}
    of = f"{want['size']}, " if "size" in want else ""
    title = f"{of}{words.what}, {dtype}: extra memory at the peak of a call"
    grid = Grid(title, [words.first, *columns.values()])
    for key in dict.fromkeys((row.size, row.op) for row in rows):
        some = [row for row in rows if (row.size, row.op) == key]
        found = (fastest([row for row in some if row.column == column]) for column in columns)
        grid.lines.append([title_of(some[0]), *(size_of(row.extra_bytes if row else None) for row in found)])
    return grid


def parts(run: Run, family: str | None = None, **want: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The tables of a family, or of all: one for each dtype, and for each model that optimizers are run on."""
    for name in FAMILIES if family is None else (family,):
        rows = run.find(family=name, **want)
        if name == "optim":
            sizes = dict.fromkeys((row.dtype, row.size) for row in rows)
            yield from ((name, {"dtype": dtype, "size": size}) for dtype, size in sizes)
        else:
            yield from ((name, want | {"dtype": dtype}) for dtype in dict.fromkeys(row.dtype for row in rows))


def grids(run: Run, family: str | None = None, **want: str) -> list[Grid]:
    return [family_grid(run, name, **which) for name, which in parts(run, family, **want)]


def memory_grids(run: Run, family: str | None = None, **want: str) -> list[Grid]:
    return [memory_grid(run, name, **which) for name, which in parts(run, family, **want)]


def summary_grid(run_of: Callable[[str], Run | None]) -> Grid:
    """One line for each family, from its run: how much faster than torch and than the best rival, and where we lose."""
    heads = ["family", "faster than torch", "than the best rival", "over the floor", "where we lose"]
    grid = Grid("Summary: median of the cases (lowest-highest)", heads, numbers=False)
    for family in FAMILIES:
        against_torch, against_rivals, floors, losses = [], [], [], []
        run = run_of(family)
        rows = run.find(family=family) if run else []
        for key in dict.fromkeys((row.op, row.size, row.dtype) for row in rows):
            some = [row for row in rows if (row.op, row.size, row.dtype) == key]
            ours = fastest([row for row in some if row.column in ("native", "triton")])
            if ours is None or not ours.times_floor:
                continue
            if ours.size not in WORDS[family].host_bound:
                floors.append(ours.times_floor)
            rivals = [] if key[0] in WORDS[family].no_rivals else some
            torchs = fastest([row for row in rivals if row.column == WORDS[family].torch[0]])
            best = fastest([row for row in rivals if row.column in WORDS[family].rivals])
            if torchs and torchs.times_floor:
                against_torch.append(torchs.times_floor / ours.times_floor)
            if best and best.times_floor:
                against_rivals.append(best.times_floor / ours.times_floor)
                if against_rivals[-1] < 0.98:
                    losses.append(f"{title_of(ours)}: {times(against_rivals[-1])} of {best.provider}")
        if floors or against_rivals:
            shown = "; ".join(losses[:3]) + (f"; {len(losses) - 3} more" if len(losses) > 3 else "")
            line = [spread(values) for values in (against_torch, against_rivals, floors)]
            grid.lines.append([family, *line, shown or "none"])
    return grid


def spread(values: list[float]) -> str:
    """The median, and from where to where."""
    if not values:
        return "–"
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2] if len(ordered) % 2 else sum(ordered[len(ordered) // 2 - 1 :][:2]) / 2
    return times(middle) + (f" ({times(ordered[0])}-{times(ordered[-1])})" if len(ordered) > 1 else "")


def check_grid(checks: list[Check]) -> Grid:
    grid = Grid("Performance targets", ["target", "case", "measured", "allowed", "verdict"])
    for c in checks:
        grid.lines.append([c.bar, c.case, number(c.value), f"{'>=' if c.at_least else '<='} {c.limit:g}", c.verdict])
    return grid


def machine_line(run: Run) -> str:
    commit = f"commit {run.commit}{' with local changes' if run.dirty else ''}" if run.commit else "no commit"
    rate = f", matrix products {number(run.matrix_tflops)} TFLOP/s" if run.matrix_tflops else ""
    return f"{run.device_line}; copy bandwidth {run.copy_gbps:.0f} GB/s{rate}; {commit}."
