# SPDX-License-Identifier: Apache-2.0
"""Tables of a run: one text grid, shown by rich or written as Markdown between marker comments of the docs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import activations, caches, layers
from .checks import Check, check
from .registry import FAMILIES, dtype_name
from .results import Row, Run, newest_proof

NOT_MEASURED = "not measured"

MARKER = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+)(?P<options>(?: [\w-]+=\S+)*) -->\n)(?P<old>.*?)(<!-- /bench -->)", re.S
)


@dataclass
class Grid:
    title: str
    head: list[str]
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: bool = True  # in all columns but the first

    def markdown(self) -> str:
        align = [":--"] + ["--:" if self.numbers else ":--"] * (len(self.head) - 1)
        rows = [self.head, align, *self.lines]
        text = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join(text + ([""] + [f"{note}  " for note in self.notes] if self.notes else [])) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "–"
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits - 1
    return f"{value:,.{decimals}f}"


def size_of(count: int | None) -> str:
    """Bytes in MiB, as memory is allocated."""
    return "–" if count is None else f"{count / 2**20:,.1f} MiB"


def times(a: float | None, b: float | None, digits: int = 1) -> str:
    return f"{a / b:.{digits}f}x" if a and b else "–"


class Notes:
    """Footnotes in the order of their first use; equal ones share a mark."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"


def cell(rows: list[Row], notes: Notes, show_name: bool = False) -> str:
    """The fastest of the rows, or why there is none."""
    done = [row for row in rows if row.median is not None]
    if not done:
        reasons = dict.fromkeys(row.reason or row.status for row in rows)
        return "; ".join(r if len(r) < 24 else "failed" + notes.mark(r) for r in reasons) or "–"
    best = min(done, key=lambda row: row.median or 0.0)
    name = f" ({best.provider})" if show_name else ""
    differs = notes.mark(f"{best.provider} computes something else: {best.differs}.") if best.differs else ""
    return f"{number(best.median)}{name}{differs}"


def optimizer_grid(run: Run, size: str, dtype: str) -> Grid:
    """Milliseconds of one step by provider, for one model."""
    rows = run.find(family="optim", size=size, dtype=dtype)
    on_gpu = run.machine["kind"] == "cuda"
    many = any(row.column == "yardstick" for row in rows)
    columns = {"eager": "eager", "torch.optim": "torch.optim", "torch.compile": "torch.compile", "peer": "best peer"}
    if on_gpu:
        columns = {"triton": "Triton"} | columns
    if many:
        columns["yardstick"] = "torch fused AdamW"
    head = [
        "optimizer",
        "floor",
        "**singlepass**",
        "x floor",
        "GB/s",
        *columns.values(),
        "eager / ours",
        "extra memory",
        "eager's",
    ]
    if on_gpu:
        head += ["launches", "host us"]
    grid, notes = Grid(f"{size}, {dtype}: ms per step", head), Notes()
    for op in dict.fromkeys(row.op for row in rows):
        by_column: dict[str, list[Row]] = {}
        for row in rows:
            if row.op == op:
                by_column.setdefault(row.column, []).append(row)
        native, eager = (next(iter(by_column.get(name, [])), None) for name in ("native", "eager"))
        measured = native if native and native.median else None
        line = [op, number(measured.floor_ms["q50"] if measured and measured.floor_ms else None)]
        line += [cell(by_column.get("native", []), notes), number(measured.times_floor if measured else None)]
        line += [number(measured.gbps if measured else None)]
        line += [cell(by_column.get(name, []), notes, name in ("torch.optim", "peer")) for name in columns]
        line += [times(eager.median if eager else None, measured.median if measured else None)]
        line += [size_of(row.extra_bytes if row else None) for row in (native, eager)]
        if on_gpu:
            line += [number(measured.launches if measured else None), number(measured.host_us if measured else None)]
        grid.lines.append(line)
    grid.notes = [f"[{i}] {text}" for i, text in enumerate(notes.texts, 1)]
    return grid


@dataclass(frozen=True)
class Calls:
    """How the table of a family of functions reads: the first column's head, what an op is called, what the yardstick
    is and whether it is one of several, and what peers are, if there are some on a CPU."""

    first: str
    titles: dict[str, str]
    yardstick: str
    several: bool = False
    cpu_peers: str | None = None


CALLS = {
    "rational": Calls("x, pass", activations.TITLES, "gelu"),
    "kv": Calls("batch x tokens, op", caches.TITLES, "uncompressed", several=True, cpu_peers="best peer"),
    "spectral": Calls("width x tokens, op", layers.TITLES, "full rank", cpu_peers="products alone"),
}


def call_grid(run: Run, family: str, dtype: str, **want: str) -> Grid:
    """Milliseconds of one call by provider, for all sizes and ops of a family."""
    words, rows = CALLS[family], run.find(family=family, dtype=dtype, **want)
    on_gpu = run.machine["kind"] == "cuda"
    columns = {"eager": "eager", "torch.compile": "torch.compile"}
    if on_gpu:
        columns = {"triton": "Triton"} | columns
    if on_gpu or words.cpu_peers:
        columns |= {"peer": words.cpu_peers or "best peer"}
    columns = {name: title for name, title in columns.items() if any(row.column == name for row in rows)}
    head = [words.first, "floor", "**singlepass**", "x floor", "GB/s", words.yardstick, f"ours / {words.yardstick}"]
    head += [*columns.values(), "eager / ours", "extra memory", f"{words.yardstick}'s", "eager's"]
    head += ["launches", "host us"] if on_gpu else []
    grid, notes = Grid(f"{family}, {dtype}: ms per call", head), Notes()
    for size, op in dict.fromkeys((row.size, row.op) for row in rows):
        by_column: dict[str, list[Row]] = {}
        for row in rows:
            if (row.size, row.op) == (size, op):
                by_column.setdefault(row.column, []).append(row)
        native, eager = (next(iter(by_column.get(name, [])), None) for name in ("native", "eager"))
        yardsticks = by_column.get("yardstick", [])
        best = min((row for row in yardsticks if row.median), key=lambda row: row.median or 0.0, default=None)
        ours = native.median if native else None
        line = [f"{size}, {words.titles.get(op, op)}"]
        line += [number(native.floor_ms["q50"] if native and native.floor_ms else None)]
        line += [cell(by_column.get("native", []), notes), number(native.times_floor if native else None)]
        line += [number(native.gbps if native else None), cell(yardsticks, notes, words.several)]
        line += [times(ours, best.median if best else None, 2)]
        line += [cell(by_column.get(name, []), notes, name == "peer") for name in columns]
        line += [times(eager.median if eager else None, ours)]
        line += [size_of(row.extra_bytes if row else None) for row in (native, best, eager)]
        if on_gpu:
            line += [number(native.launches if native else None), number(native.host_us if native else None)]
        grid.lines.append(line)
    grid.notes = [f"[{i}] {text}" for i, text in enumerate(notes.texts, 1)]
    return grid


def grids(run: Run, family: str | None = None, **want: str) -> list[Grid]:
    """The grids of a family, or of all: one for each model and dtype of a run, or for those that are wanted."""
    found = []
    if family in (None, "optim"):
        models = dict.fromkeys((row.size, row.dtype) for row in run.find(family="optim", **want))
        found += [optimizer_grid(run, size, dtype) for size, dtype in models]
    for name in CALLS if family is None else CALLS.keys() & {family}:
        dtypes = dict.fromkeys(row.dtype for row in run.find(family=name, **want))
        found += [call_grid(run, name, **(want | {"dtype": dtype})) for dtype in dtypes]
    return found


def check_grid(checks: list[Check]) -> Grid:
    grid = Grid("Bars", ["bar", "case", "measured", "allowed", "verdict"])
    for c in checks:
        grid.lines.append([c.bar, c.case, number(c.value), f"{'>=' if c.at_least else '<='} {c.limit:g}", c.verdict])
    return grid


def traffic_grid() -> Grid:
    """The passes of each optimizer's floor and their bytes for a parameter."""
    from .cases.optim import RULES

    dtypes = (torch.float32, torch.bfloat16)
    head = ["optimizer", "passes: read only / read and written", *(f"p, g, h in {dtype_name(d)}" for d in dtypes)]
    grid = Grid("Bytes of a step for each parameter", head)
    for rule in RULES:
        passes = "; ".join(" / ".join(" ".join(letters) or "–" for letters in p) for p in rule.passes)
        grid.lines.append([rule.name, passes, *(str(sum(p.bytes for p in rule.traffic(1, d))) for d in dtypes)])
    return grid


def cache_grid(tokens: int = 32768, width: int = 128) -> Grid:
    """Bytes of a token's key and value in one head, counted by the cache itself."""
    from singlepass.kv import Codec, cache_nbytes

    own, kivi, flat = Codec.zipcache(), Codec.kivi(), Codec.per_token_head()
    caches = (
        ("ZipCache, 60 % in 4 bits, the rest in 2", 0.6, 4, 2, own),
        ("ZipCache, 60 %, regular blocks of 16", 0.6, 4, 2, Codec(regular_block=16)),
        ("ZipCache, 60 %, blocks of 128", 0.6, 4, 2, Codec(regular_block=128)),
        ("ZipCache, 60 %, one block for the prompt", 0.6, 4, 2, Codec.zipcache(None)),
        ("ZipCache, 40 %", 0.4, 4, 2, own),
        ("ZipCache, 80 %", 0.8, 4, 2, own),
        ("8 bits for each token and head", 1.0, 8, 8, flat),
        ("4 bits for each token and head", 1.0, 4, 4, flat),
        ("ZipCache's codec, all in 4 bits", 1.0, 4, 4, own),
        ("ZipCache's codec, all in 2 bits", 0.0, 4, 2, own),
        ("KIVI, 4 bits, groups of 32", 1.0, 4, 4, kivi),
        ("KIVI, 2 bits, groups of 32", 0.0, 2, 2, kivi),
    )
    head = ["cache", "bytes per token and head", "bits per number", "times smaller than 16 bits"]
    grid = Grid(f"A prompt of {tokens:,} tokens, head_dim {width}", head)
    grid.lines.append(["16 bits", str(4 * width), "16.00", "1.00"])
    for name, ratio, salient, regular, codec in caches:
        options: dict[str, Any] = {"salient_ratio": ratio, "salient_bits": salient, "regular_bits": regular}
        per_token = cache_nbytes(tokens, head_dim=width, codec=codec, **options) / tokens
        numbers = (per_token, 8 * per_token / (2 * width), 4 * width / per_token)
        grid.lines.append([name, *(f"{n:.{digits}f}" for n, digits in zip(numbers, (1, 2, 2), strict=True))])
    return grid


def training_grid(width: int = 2048, rank: int = 128) -> Grid:
    """Bytes that training a square layer keeps, counted on its tensors; GaLore's by its formula."""
    from singlepass.spectral import SSTLinear, training_nbytes

    layer = partial(SSTLinear, width, width, rank, False, device="meta")
    dense = training_nbytes(torch.nn.Linear(width, width, False, device="meta"))
    rows = {"full rank, AdamW": dense}
    # galore-torch: the dense weight and gradient, a projector, and two moments of rank rows.
    galore = {"weights": dense["weights"], "gradients": dense["gradients"], "states": 3 * rank * width * 4}
    rows["GaLore, float32"] = galore | {"total": sum(galore.values())}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16), ("int8", torch.int8)):
        rows[f"SST, frozen vectors in {name}"] = training_nbytes(layer(frozen_dtype=dtype))
    parts = list(dense)
    grid = Grid(f"MiB that training a {width} x {width} layer keeps, rank {rank}", ["", *parts, "of full rank"])
    for name, counts in rows.items():
        grid.lines.append([name, *(number(counts[part] / 2**20) for part in parts)])
        grid.lines[-1].append(f"{100 * counts['total'] / dense['total']:.0f} %")
    return grid


def machine_line(run: Run) -> str:
    commit = f"commit {run.commit}{' with local changes' if run.dirty else ''}" if run.commit else "no commit"
    rate = f", matrix products {number(run.matrix_tflops)} TFLOP/s" if run.matrix_tflops else ""
    return f"{run.device_line}; copy bandwidth {run.copy_gbps:.0f} GB/s{rate}; {commit}."


def block(name: str, options: dict[str, str], run: Run | None, draw: Callable[[Run, dict[str, str]], str]) -> str:
    """The generated text of one marker, whose options name a family. `draw` makes a plot and returns the Markdown that
    shows it."""
    if name == "traffic":
        return traffic_grid().markdown()
    if name == "caches":
        return cache_grid().markdown()
    if name == "training-memory":
        return training_grid().markdown()
    if name in ("proof", "support"):
        from . import proofs

        grid = proofs.proof_grid if name == "proof" else proofs.support_grid
        return grid(newest_proof()).markdown()
    if run is None:
        return f"{NOT_MEASURED}\n"
    if name == "machine":
        return machine_line(run) + "\n"
    if name == "checks":
        return check_grid(check(run, options["family"])).markdown()
    if name == "plot":
        return draw(run, options) + "\n"
    if name in FAMILIES:
        picked = grids(run, **{key: value for key, value in options.items() if key in ("family", "size", "dtype")})
        return "\n".join(g.markdown() for g in picked) or f"{NOT_MEASURED}\n"
    raise ValueError(
        "bench table: expected a marker machine, checks, traffic, caches, training-memory, proof, support, plot, "
        f"{', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}; got {name!r}. Correct the marker"
    )


def inject(path: Path, find: Callable[[str, str], Run | None], draw: Callable[[Path, Run, dict[str, str]], str]) -> int:
    """Rewrite every marked block of a file; returns how many there are.

    A marker reads `<!-- bench:NAME device=cpu size=gpt2-small -->` and ends at `<!-- /bench -->`. `find` gives the run
    of a kind of device and a family, or None where there is none.
    """
    found = 0

    def fill(match: re.Match[str]) -> str:
        nonlocal found
        found += 1
        options = dict(option.split("=", 1) for option in match["options"].split())
        name = match["name"]
        options["family"] = name if name in FAMILIES else options.get("family", FAMILIES[0])
        run = find(options.get("device", "cpu"), options["family"])
        return match[1] + block(name, options, run, lambda r, o: draw(path, r, o)) + match[5]

    text = MARKER.sub(fill, path.read_text())
    path.write_text(text)
    return found
