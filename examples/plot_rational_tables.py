# SPDX-License-Identifier: Apache-2.0
"""Draw the rational functions that activations start as, beside what they stand for, and print how far they are off.

    pip install ".[examples]"
    python examples/plot_rational_tables.py

docs/images/rational-tables.svg and the table in docs/rational.md are this script's output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _report import PICTURES, ROOT, picture

from singlepass.rational._tables import TARGETS, Table, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMS = "ABC"
WIDER = (5.0, 8.0)  # how far from zero errors are told beyond the interval of the fit
POINTS = 20001
PICTURE = ROOT / "docs" / "images" / "rational-tables.svg"
COLOURS = {"A": "#0072b2", "B": "#e69f00", "C": "#009e73"}
DASHES = {"A": "solid", "B": (0, (5, 3)), "C": (0, (1, 2))}

FORMULAS = {
    "geglu": "x gelu(x)",
    "gelu": "x Φ(x)",
    "identity": "x",
    "leaky_relu": "max(x, 0.01 x)",
    "mish": "x tanh(softplus(x))",
    "quick_gelu": "x sigmoid(1.702 x)",
    "relu": "max(x, 0)",
    "relu_squared": "max(x, 0)²",
    "sigmoid": "1 / (1 + e⁻ˣ)",
    "silu": "x sigmoid(x)",
    "swiglu": "x silu(x)",
    "tanh": "tanh(x)",
}


def number(value: float) -> str:
    """Two significant digits."""
    if value == 0.0 or value >= 0.01:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def error(name: str, entry: Table, reach: float) -> float:
    """The largest on [-reach, reach]."""
    x = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    return float((entry(x) - TARGETS[name](x)).abs().max())


def markdown() -> str:
    """A row for each table."""
    head = ["name", "function", *(f"form {form}" for form in FORMS), *(f"A, to ±{reach:g}" for reach in WIDER), "gain"]
    lines = [head, [":--", ":--"] + ["--:"] * (len(head) - 2)]
    for name, formula in FORMULAS.items():
        entries = [table(name, form) for form in FORMS]
        errors = [entry.max_error or 0.0 for entry in entries] + [error(name, entries[0], reach) for reach in WIDER]
        lines.append([f"`{name}`", formula, *map(number, errors), f"{entries[0].gain:.4f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw_table(axes: Axes, name: str) -> None:
    x = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    target = TARGETS[name](x)
    low, high = table(name).interval or (0.0, 0.0)
    axes.axvspan(low, high, color="#eeeeee", linewidth=0, label="where the tables are fitted")
    axes.plot(x, target, color="#b0b0b0", linewidth=5, label="the function")
    for form in FORMS:
        style = {"color": COLOURS[form], "linestyle": DASHES[form], "linewidth": 1.3}
        axes.plot(x, table(name, form)(x), label=f"form {form}", **style)
    inside = target[(x >= -5.0) & (x <= 5.0)]
    margin = 0.15 * float(inside.max() - inside.min())
    axes.set_ylim(float(inside.min()) - margin, float(inside.max()) + margin)
    axes.set_xlim(-8.0, 8.0)
    axes.set_xticks([-6, -3, 0, 3, 6])
    axes.set_title(name, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> None:
    names = [name for name in FORMULAS if name != "identity"]  # which all forms have exactly
    with picture(path, 2, (len(names) + 1) // 2, (12.0, 5.4), dpi=160) as (figure, grid):
        for axes, name in zip(grid.flat, names, strict=False):
            draw_table(axes, name)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    if args.out.suffix not in PICTURES:
        parser.error(f"--out: expected a name that ends in .png, .svg or .pdf; got {args.out}")
    draw(args.out)
    print(markdown(), end="")


if __name__ == "__main__":
    main()
