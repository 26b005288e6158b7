# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: how far each implementation is from the one-pass floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kv import caches
from .optim import models
from .rational import activations
from .results import Row, Run
from .spectral import layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REST = {
    "torch.compile": ("torch.compile of eager", "#f2d492"),
    "peer": ("best other package", "#c9b3d9"),
    "eager": ("eager PyTorch", "#c8c8c8"),
}
_OURS = {"native": ("singlepass", "#0072b2"), "triton": ("singlepass (Triton)", "#56b4e9")}
# Columns of each family in the order of the bars: ours in a strong colour, the others lighter.
STYLES = {
    "optim": _OURS | {"torch.optim": ("torch.optim", "#e69f00")} | _REST,
    "rational": _OURS | {"yardstick": ("gelu of torch", "#e69f00")} | _REST,
    "kv": _OURS | {"yardstick": ("uncompressed, or a copy", "#e69f00")} | _REST,
    "spectral": _OURS
    | {"yardstick": ("full rank, AdamW", "#e69f00")}
    | _REST
    | {"peer": ("its matrix products alone", "#c9b3d9")},
}
MODELS = (models.GPT2_SMALL, models.VIT_B16, models.MANY_SMALL, models.ONE_ELEMENT, models.TENSORS_300)
TITLES = {model.name: model.title for model in MODELS}
TITLES |= {model.name: model.title for model in map(models.gpt2_blocks, models.BLOCK_COUNTS)}
TITLES |= {a.name: a.title for some in activations.ACTIVATIONS.values() for a in some}
TITLES |= {shape.name: shape.title for some in caches.SHAPES.values() for shape in some}
TITLES |= {shape.name: shape.title for some in layers.SHAPES.values() for shape in some}
TITLES[layers.MODEL_NAME] = "12 blocks of width 768"
CALLS = activations.TITLES | caches.TITLES | layers.TITLES
# What is timed: in a plot's title, and in the line under its axis.
WORDS = {
    "optim": ("One optimizer step", "a step"),
    "rational": ("Rational activation", "a call"),
    "kv": ("Compressed KV cache", "a call"),
    "spectral": ("Sparse spectral training", "a call"),
}


def bars(run: Run, family: str, size: str, dtype: str) -> dict[str, list[Row]]:
    """The fastest row of each column, by optimizer or pass. Eager PyTorch, often fifty times slower than all others and
    no choice of anybody, is shown only where there is no other rival."""
    picked: dict[str, list[Row]] = {}
    rows = [row for row in run.find(family=family, size=size, dtype=dtype) if row.median is not None]
    for op in dict.fromkeys(row.op for row in rows):
        best: list[Row] = []
        for column in STYLES[family]:
            found = [row for row in rows if row.op == op and row.column == column]
            if found and (column != "eager" or {row.column for row in best} <= _OURS.keys()):
                best.append(min(found, key=lambda row: row.median or 0.0))
        picked[CALLS.get(op, op)] = best
    return picked


def draw(
    run: Run, path: Path, size: str = models.GPT2_SMALL.name, dtype: str = "float32", family: str = "optim"
) -> None:
    """Write a bar chart as SVG, PNG or whatever else the suffix of `path` says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = bars(run, family, size, dtype)
    if not groups:
        raise ValueError(f"bench plot: expected rows of {size} in {dtype}; got none. Run singlepass bench run first")
    count = sum(map(len, groups.values()))
    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.hashsalt": "singlepass",
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(figsize=(8, 1.6 + 0.17 * count + 0.12 * len(groups)), layout="constrained")
        _bars(axes, groups, STYLES[family])
        what, call = WORDS[family]
        axes.set_xlabel(f"time of {call}, in multiples of the time that this machine takes to move its bytes once")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        shown = [label for label, _ in STYLES[family].values() if label in handles]
        figure.legend([handles[label] for label in shown], shown, loc="outside lower center", ncols=3, frameon=False)
        title = TITLES.get(size, size)
        axes.set_title(f"{what}, {title}, {dtype}", loc="left", fontsize=12, fontweight="bold", pad=24)
        axes.text(0, 1.012, run.device_line, transform=axes.transAxes, color="#555555", va="bottom")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _bars(axes: Axes, groups: dict[str, list[Row]], style: dict[str, tuple[str, str]]) -> None:
    y, ticks, seen = 0.0, [], set()
    for rows in groups.values():
        top = y
        for row in rows:
            label, colour = style[row.column]
            times = row.times_floor or 0.0
            axes.barh(y, times, height=0.9, color=colour, label=None if label in seen else label)
            strong = "bold" if row.column == "native" else "normal"
            axes.annotate(
                f"{times:.2f}x" if times < 10 else f"{times:.0f}x",
                (times, y),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                fontweight=strong,
            )
            seen.add(label)
            y += 1
        ticks.append((top + y - 1) / 2)
        y += 0.7
    axes.axvline(1.0, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("memory floor", (1.0, -1.0), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(ticks, list(groups))
    axes.set_ylim(y - 0.7, -1.4)
    axes.margins(x=0.06)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
