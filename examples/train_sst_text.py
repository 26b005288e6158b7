# SPDX-License-Identifier: Apache-2.0
"""Train a small language model from scratch: with all weights, and with SST, LoRA and ReLoRA.

    pip install ".[examples]"
    python examples/train_sst_text.py

A byte-level transformer is trained on text (PyTorch's own sources) with four methods. For each seed all start from the
same weights and see the same batches. All train embedding, norms and head. Of the linear layers, full rank trains every
weight; the others train few parameters at a time: SST some singular vectors, LoRA a low-rank update of a frozen weight,
ReLoRA several such updates in sequence. A table and a picture show the losses on held-out text.

Each method uses its best learning rate from the same sweep, made on text that is neither trained on nor held out.
--sweep repeats it; the stored sweep used this repository's text. The criterion was fixed before the run: in the means
over seeds, SST closes at least half of the gap between LoRA and full rank. --docs writes docs/spectral.md and
docs/images/sst-text.svg from the result file and stores it in examples/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _from_scratch import CURVE, METHODS, Data, Run, Settings, read_data, train
from _report import OUTPUT, RESULTS, ROOT, fill_in, markdown_section, picture, provenance, rich_table, save
from _training import progress_bar
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NAME = "train_sst_text"
KEPT = RESULTS / f"{NAME}.json"
DOCUMENT, PICTURE = ROOT / "docs" / "spectral.md", ROOT / "docs" / "images" / "sst-text.svg"

LISTS = ("sweep", "rows")
COLOURS = dict(zip(METHODS, ("#333333", "#0072b2", "#d55e00", "#e69f00"), strict=True))
RATES = (4e-3, 8e-3, 16e-3)  # where a sweep begins
SWEEP_SEED = 100


def train_all(
    runs: list[Run], settings: Settings, text: Tensor, exam: Tensor, console: Console, curve: int = CURVE
) -> list[Run]:
    with progress_bar(console, width=48) as progress:
        task = progress.add_task("", total=len(runs) * settings.steps)

        def report(run: Run, loss: float) -> None:
            title = f"{run.method}, lr {run.lr:g}, seed {run.seed}: loss {loss:.3f}"
            progress.update(task, advance=1, description=title)

        for run in runs:
            train(run, settings, text, exam, report, curve)
            title = f"{run.method:<9} lr {run.lr:<6g} seed {run.seed:<3}"
            console.print(f"{title} loss {run.loss:.4f}, {run.step_ms} ms a step")
    return runs


def best_rates(sweep: list[dict[str, Any]]) -> dict[str, float]:
    """By method, those with the lowest losses."""
    losses = {method: {r["lr"]: r["loss"] for r in sweep if r["method"] == method} for method in METHODS}
    return {method: min(found, key=found.__getitem__) for method, found in losses.items()}


def sweep_rates(settings: Settings, data: Data, console: Console, most: int = 8) -> list[dict[str, Any]]:
    """Losses by method and learning rate: of ``RATES``, then twice or half of that until the best has neighbours."""
    sweep: list[dict[str, Any]] = []
    wanted = [(method, lr) for lr in RATES for method in METHODS]
    while wanted:
        runs = [Run(method, SWEEP_SEED, lr) for method, lr in wanted]
        train_all(runs, settings, data.train, data.validation, console, curve=0)
        sweep += [{"method": run.method, "lr": run.lr, "loss": run.loss} for run in runs]
        wanted = []
        for method, best in best_rates(sweep).items():
            tried = [r["lr"] for r in sweep if r["method"] == method]
            if len(tried) < most and best in (min(tried), max(tried)):
                wanted.append((method, best / 2 if best == min(tried) else best * 2))
    return sweep


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def rows_of(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By method, one for each seed."""
    return {method: [row for row in result["rows"] if row["method"] == method] for method in METHODS}


def mean_loss(rows: list[dict[str, Any]]) -> float:
    return statistics.fmean(row["loss"] for row in rows)


def gap_closed(result: dict[str, Any], method: str) -> float:
    """Of the gap between the mean losses of LoRA and full rank, what a method closes."""
    lora, own, full = (mean_loss(rows_of(result)[name]) for name in ("LoRA", method, "full rank"))
    return (lora - own) / (lora - full)


HEAD = ["method", "parameters trained at a time", "learning rate", "held-out loss", "each seed", "gap closed"]


def cells(result: dict[str, Any]) -> list[list[str]]:
    lines = []
    for method, rows in rows_of(result).items():
        line = [method, f"{rows[0]['trained']:,}", f"{rows[0]['lr']:g}", f"{mean_loss(rows):.4f}"]
        line.append(", ".join(f"{row['loss']:.4f}" for row in rows))
        line.append(percent(gap_closed(result, method)))
        lines.append(line)
    return lines


def spread(result: dict[str, Any]) -> str:
    """Of the drift, over all rounds and seeds."""
    found = [drifts[1:] for row in result["rows"] for drifts in row["drifts"]]
    if not found:
        return "no round was finished"
    lowest, medians, highest = zip(*found, strict=True)
    return f"{min(lowest):.2g} to {max(highest):.2g}, median {statistics.median(medians):.2g}"


def facts(result: dict[str, Any]) -> list[str]:
    settings, versions, machine = result["settings"], result["versions"], result["machine"]
    times = {method: statistics.median(row["step_ms"] for row in rows) for method, rows in rows_of(result).items()}
    return [
        f"{settings['steps']:,} steps of {settings['sequences']} x {settings['length']} bytes, {settings['depth']} "
        f"layers of width {settings['dim']}. SST: rank {settings['rank']}, {settings['steps_per_iteration']} steps per "
        f"iteration; LoRA: rank {settings['lora_rank']}, ReLoRA: restarted every {settings['restart']} steps.",
        f"Deviation of the singular vectors from orthonormal, one step before the end of a round: {spread(result)}.",
        "Median time of a step, with other programs running: "
        + ", ".join(f"{method} {times[method]:.0f} ms" for method in times)
        + f". {machine['device']}, threads: {machine['threads']}, torch {versions['torch']}, {result['date'][:10]}.",
    ]


def markdown(result: dict[str, Any]) -> str:
    """The text between the markers in docs/spectral.md."""
    return markdown_section(HEAD, cells(result), facts(result))


def tabulate(result: dict[str, Any]) -> Table:
    return rich_table("A language model from scratch", "loss in nats per byte of held-out text", HEAD, cells(result))


def draw(result: dict[str, Any], path: Path) -> None:
    """Curves on the left, a thin line for each seed and a thick one for the mean; the sweep on the right."""
    with picture(path, 1, 2, (11.0, 4.2)) as (_, (left, right)):
        for method, rows in rows_of(result).items():
            colour, curves = COLOURS[method], [row["curve"] for row in rows]
            steps = [step for step, _ in curves[0]]
            values = [[loss for _, loss in curve] for curve in curves]
            for losses in values:
                left.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.5)
            mean = [statistics.fmean(losses) for losses in zip(*values, strict=True)]
            left.plot(steps, mean, color=colour, linewidth=2.0, label=f"{method}: {mean_loss(rows):.3f} at the end")
            swept = sorted((row["lr"], row["loss"]) for row in result["sweep"] if row["method"] == method)
            right.plot(*zip(*swept, strict=True), color=colour, marker="o", markersize=4, linewidth=1.4, label=method)
        left.set_title("loss on held-out text", loc="left", fontweight="bold")
        left.set_xlabel("steps")
        left.set_ylabel("nats per byte")
        right.set_title("learning-rate sweep: loss on other text", loc="left", fontweight="bold")
        right.set_xscale("log", base=2)
        rates = sorted({row["lr"] for row in result["sweep"]})
        right.set_xticks(rates, [f"{1e3 * rate:g}e-3" for rate in rates])
        right.minorticks_off()
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)


def write_docs(result: dict[str, Any]) -> None:
    fill_in(DOCUMENT, NAME, markdown(result))
    draw(result, PICTURE)
    save(result, KEPT, LISTS)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"the result file (default: {NAME}.json in {OUTPUT.name}/)")
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that everything runs")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each method (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="choose learning rates anew; without, those that are kept")
    parser.add_argument(
        "--docs", action="store_true", help="only fill docs/spectral.md and its picture from the result"
    )
    args = parser.parse_args(argv)
    path = args.out or OUTPUT / (f"{NAME}_quick.json" if args.quick else f"{NAME}.json")
    if path.suffix != ".json":
        parser.error(f"--out: expected a name that ends in .json; got {path}")
    for option in ("steps", "seeds"):
        if getattr(args, option) < 1:
            parser.error(f"--{option}: expected at least 1; got {getattr(args, option)}")
    if args.docs:
        if not path.exists():
            parser.error(f"--docs: expected {path}; got no such file. Run it without --docs first")
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        write_docs(result)
        return result

    from rich.console import Console

    torch.set_num_threads(1)  # the same results on any number of cores
    console, data, start = Console(), read_data(), time.perf_counter()
    settings, most = Settings(steps=args.steps), 8
    if args.quick:
        settings = replace(settings, steps=8, sequences=2, length=32, dim=32, depth=1, steps_per_iteration=1, restart=2)
        data.validation, data.held_out, most = data.validation[:4096], data.held_out[:4096], 4
    if args.sweep:
        sweep = sweep_rates(settings, data, console, most)
    else:
        sweep = json.loads(KEPT.read_text(encoding="utf-8"))["sweep"]
    best = best_rates(sweep)
    runs = [Run(method, seed, best[method]) for seed in range(args.seeds) for method in METHODS]
    rows = train_all(runs, settings, data.train, data.held_out, console)
    result = provenance() | {"settings": asdict(settings)}
    result["corpus"] = {"files": data.files, "sha256": data.digest}
    result["corpus"] |= {f"{part}_bytes": len(getattr(data, part)) for part in ("train", "validation", "held_out")}
    result |= {"sweep": sweep, "rows": [asdict(row) for row in rows]}
    result = json.loads(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))
    save(result, path, LISTS)
    console.print(tabulate(result))
    console.print(*facts(result), sep="\n")
    draw(result, path.with_suffix(".svg"))
    console.print(f"{path} and {path.with_suffix('.svg').name} written; {result['seconds']:.0f} s in all")
    return result


if __name__ == "__main__":
    main()
