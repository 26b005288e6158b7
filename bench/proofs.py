# SPDX-License-Identifier: Apache-2.0
"""Tables of the newest proof on a GPU, and of supported ops, whose GPU columns come from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .documents import NOT_MEASURED
from .grid import Grid, number
from .registry import FAMILIES

if TYPE_CHECKING:
    from singlepass._ops import Op

UNSEEN = "compiled"  # and never run on a GPU: the README says so above the table


def gpu_cell(op: Op, backend: str, proof: dict[str, Any] | None) -> str:
    """Whether the tests of an op's family passed on a GPU with this backend."""
    if backend == "triton" and not op.has_triton:
        return "no"
    stage = next((s for s in (proof or {}).get("stages", []) if s["name"] == "tests"), None)
    counts = {} if stage is None else stage["facts"].get("counts", {})
    mine = [n for key, n in counts.items() if key.startswith(f"{op.family}/{backend}/")]
    passed, failed = (sum(n.get(outcome, 0) for n in mine) for outcome in ("passed", "failed"))
    return f"{failed:,} of {passed + failed:,} tests fail" if failed else "yes" if passed else UNSEEN


def of_machine(proof: dict[str, Any] | None) -> str:
    return f"{proof['machine']['device']}, {proof['date'][:10]}, commit {proof['commit']}" if proof else NOT_MEASURED


def proof_grid(proof: dict[str, Any] | None) -> Grid:
    """A line for each stage."""
    grid = Grid(f"Proof on a GPU: {of_machine(proof)}", ["stage", "verdict", "seconds", "result"], numbers=False)
    for stage in (proof or {}).get("stages", []):
        grid.lines.append([stage["name"], stage["status"], f"{stage['seconds']:.0f}", stage["said"].replace("|", "/")])
    return grid


def predictions_grid(proof: dict[str, Any] | None) -> Grid:
    """A line for each prediction, with what was measured."""
    title = f"Predicted without a GPU: {of_machine(proof)}"
    grid = Grid(title, ["what", "predicted", "measured", "verdict"], numbers=False)
    stages = [s for s in (proof or {}).get("stages", []) if s["name"] == "predictions"]
    for p in (p for stage in stages for p in stage["facts"].get("predictions", [])):
        measured = p["missing"] if p["measured"] is None else number(p["measured"])
        verdict = {True: "holds", False: "FAILS", None: NOT_MEASURED}[p["holds"]]
        predicted = f"{number(p['low'])} to {number(p['high'])} {p['unit']}"
        grid.lines.append([p["what"], predicted, measured.replace("|", "/"), verdict])
    return grid


def support_grid(proof: dict[str, Any] | None) -> Grid:
    """A line for each op. A native kernel for CPUs and an eager reference are what every op has."""
    from singlepass._ops import OPS

    head = ["op", "class", "CPU", "CUDA C++", "Triton", "eager", "dtypes"]
    grid = Grid(f"Run on a GPU: {of_machine(proof) if proof else 'no'}", head, numbers=False)
    for family in FAMILIES:
        for name, op in OPS.items():
            if op.family == family:
                cells = (gpu_cell(op, backend, proof) for backend in ("native", "triton"))
                grid.lines.append([f"`{name}`", op.used_by, "yes", *cells, "yes", op.dtypes])
    return grid
