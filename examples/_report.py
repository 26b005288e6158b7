# SPDX-License-Identifier: Apache-2.0
"""Result files of the examples, and what is made of them: tables, pictures, and text in the documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, RESULTS = ROOT / "examples" / "output", ROOT / "examples" / "results"
PICTURES = (".png", ".svg", ".pdf")


def provenance() -> dict[str, Any]:
    """When, from which commit, where and with what a result is made."""
    from singlepass.bench.results import git_state, machine, versions

    commit, dirty = git_state()
    made = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit, "dirty": dirty}
    return made | {"machine": machine(torch.device("cpu")), "versions": versions()}


def save(result: dict[str, Any], path: Path, lists: Sequence[str] = ("rows",)) -> None:
    """As JSON, each row of these lists on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | dict.fromkeys(lists), indent=1)
    for name in lists:
        rows = ",\n  ".join(json.dumps(row) for row in result[name])
        text = text.replace(f'"{name}": null', f'"{name}": [\n  {rows}\n ]')
    path.write_text(text + "\n", encoding="utf-8")


def markdown_section(head: list[str], lines: list[list[str]], found: Iterable[str], made: str = "") -> str:
    """A table whose first column is text, what was found, and how it was made."""
    rows = [head, [":--"] + ["--:"] * (len(head) - 1), *lines]
    table, end = (f"| {' | '.join(row)} |" for row in rows), ["", f"{made}."] if made else []
    return "\n".join([*table, "", *(f"* {line}" for line in found), *end]) + "\n"


def rich_table(title: str, caption: str, head: list[str], lines: list[list[str]]) -> Table:
    from rich.table import Table

    table = Table(head[0], title=title, caption=caption)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def fill_in(document: Path, name: str, text: str) -> None:
    """Between the markers of this name."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    page = document.read_text(encoding="utf-8")
    document.write_text(marked.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")


@contextmanager
def picture(
    path: Path, rows: int, columns: int, size: tuple[float, float], dpi: int = 150
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its panels, to be drawn into; then it is written, the same each time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[str, Any] = {"font.family": "sans-serif", "font.size": 9}
    style |= {"svg.hashsalt": "singlepass", "svg.fonttype": "none"}
    with matplotlib.rc_context(style):
        figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained")
        yield figure, panels
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
