# SPDX-License-Identifier: Apache-2.0
"""Tables of the newest prediction of times on GPUs, and how far it was off where a GPU has measured the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from .grid import Grid, number, times
from .results import Run

NOT_COUNTED = "not counted"


def model_grid(model: dict[str, Any] | None, runs: Iterable[Run], family: str, size: str | None = None) -> Grid:
    """A line for each case of a family, or of one of its sizes, and a column for each GPU. Below each, the same in
    Triton, which older files do not have."""
    gpus = list(model["gpus"]) if model else []
    grid = Grid(f"{family}, predicted from counts, not measured: µs (share of the floor, limit)", ["case", *gpus])
    if model is None:
        return grid
    for row in model["rows"]:
        if row["family"] == family and size in (None, row["size"]):
            lines = [(f"{row['op']}, {row['size']}, {row['dtype']}", row["gpus"])]
            lines += [("– in Triton", row["triton"])] if "triton" in row else []
            grid.lines += [[label, *(shown(of_gpus[gpu]) for gpu in gpus)] for label, of_gpus in lines]
    grid.notes = [origin(model), *calibration(model, runs)]
    if any(NOT_COUNTED in line for line in grid.lines):
        cells = (cell for row in model["rows"] for cell in row["triton"].values())
        reasons = {cell["not_counted"] for cell in cells if "us" not in cell}
        grid.notes.insert(1, f"Not counted: {'; '.join(sorted(reasons))}.")
    return grid


def origin(model: dict[str, Any]) -> str:
    compilers = f"nvcc {model['nvcc']}" + (f" and Triton {model['triton']}" if "triton" in model else "")
    return f"Counted at commit {model['commit']} with {compilers}."


def fallback_grid(model: dict[str, Any] | None) -> Grid:
    """Triton's time over CUDA's, a line for each op: the least and the most of its cases."""
    gpus = list(model["gpus"]) if model else []
    grid = Grid("Triton, predicted from counts, not measured: times CUDA's time, lowest to highest", ["op", *gpus])
    ratios: dict[str, dict[str, list[float]]] = {}
    for row in model["rows"] if model else []:
        for gpu, cell in row.get("triton", {}).items():
            if "us" in cell:
                of_op = ratios.setdefault(f"{row['family']}: {row['op']}", {})
                of_op.setdefault(gpu, []).append(cell["us"] / row["gpus"][gpu]["us"])
    if model is not None and ratios:
        grid.notes = [origin(model)]
    for op, of_gpus in ratios.items():
        grid.lines.append([op, *(span(of_gpus.get(gpu, [])) for gpu in gpus)])
    return grid


def span(ratios: list[float]) -> str:
    if not ratios:
        return NOT_COUNTED
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low} to {high}"


def shown(cell: dict[str, Any]) -> str:
    if "us" not in cell:
        return NOT_COUNTED
    return f"{number(cell['us'])} ({cell['share']:.2f}, {cell['binds']})"


def errors(model: dict[str, Any], run: Run) -> dict[str, list[float]]:
    """By GPU, and by GPU in Triton, the predicted over the measured time of each case of ours that this run has on it,
    less 1."""
    found: dict[str, list[float]] = {}
    predicted: dict[tuple[str, ...], dict[str, Any]]
    predicted = {
        (r["family"], r["op"], r["size"], r["dtype"], backend): r.get(key, {})
        for r in model["rows"]
        for key, backend in (("gpus", "native"), ("triton", "triton"))
    }
    for row in run.rows:
        for gpu, cell in predicted.get(row.key, {}).items():
            if row.median is not None and gpu in run.machine["device"] and "us" in cell:
                name = f"{gpu} in Triton" if row.provider == "triton" else gpu
                found.setdefault(name, []).append(cell["us"] / (1e3 * row.median) - 1.0)
    return found


def calibration(model: dict[str, Any], runs: Iterable[Run]) -> list[str]:
    """What measuring has said of the prediction."""
    notes = [
        f"{gpu}, measured on {run.date[:10]}: the predicted times of {len(off)} cases are off by "
        f"{statistics.median(off):+.0%} in the median, from {min(off):+.0%} to {max(off):+.0%}."
        for run in runs
        for gpu, off in errors(model, run).items()
    ]
    return notes or ["No GPU has calibrated it yet."]
