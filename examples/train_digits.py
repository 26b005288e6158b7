# SPDX-License-Identifier: Apache-2.0
"""Train a small vision transformer on handwritten digits, with fused and with eager optimizer steps.

    pip install ".[examples]"
    python examples/train_digits.py

Every optimizer trains twice, from the same weights and on the same batches: with the fused kernels (``native``) and
with the reference in plain PyTorch (``eager``). A table and a picture show the same loss, and how long a step took.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from _digits import BATCH, SEED, Digits, VisionTransformer
from _report import PICTURES
from _training import parameter_groups, progress_bar, warm_up_then_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from singlepass import optim

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# By backend: label, colour and width of its line in the picture.
LINES = {"eager": ("eager PyTorch", "#c8c8c8", 5.0), "native": ("native: fused kernels", "#0072b2", 1.2)}

# Each with settings that suit it: the steps of different optimizers differ in size by orders of magnitude.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {"lr": 3e-3, "weight_decay": 1e-2}),
    "Lion": (optim.Lion, {"lr": 1e-3, "weight_decay": 1e-2}),
    "AdaBelief": (optim.AdaBelief, {"lr": 1e-2, "weight_decay": 1e-2}),
    "Adan": (optim.Adan, {"lr": 1e-2, "weight_decay": 1e-2}),
    "DiffGrad": (optim.DiffGrad, {"lr": 1e-2, "weight_decay": 1e-4}),
    "LAMB": (optim.LAMB, {"lr": 1e-2, "weight_decay": 1e-2, "always_adapt": False}),
    "LARS": (optim.LARS, {"lr": 0.5, "weight_decay": 1e-4, "momentum": 0.8, "trust_coefficient": 2e-2}),
    "SGDSaI": (optim.SGDSaI, {"lr": 2e-2, "weight_decay": 1e-2, "momentum": 0.8}),
}


@dataclass
class Run:
    optimizer: str
    backend: str
    losses: list[float] = field(default_factory=list)  # of each batch, before the step
    milliseconds: list[float] = field(default_factory=list)  # of each optimizer step alone
    accuracy: float = 0.0  # on the test digits, after the last step

    @property
    def title(self) -> str:
        return f"{self.optimizer}, {self.backend}"

    @property
    def final_loss(self) -> float:
        return statistics.fmean(self.losses[-10:])

    @property
    def step_time(self) -> float:
        return statistics.median(self.milliseconds)


Runs = dict[str, dict[str, Run]]  # by optimizer, then by backend


def make_optimizer(name: str, backend: str, model: nn.Module, steps: int) -> tuple[Optimizer, LambdaLR]:
    """An optimizer whose learning rate rises over the first tenth of the steps, then falls to zero."""
    cls, settings = OPTIMIZERS[name]
    optimizer = cls(parameter_groups(model), backend=backend, **settings)
    return optimizer, warm_up_then_decay(optimizer, steps)


def train(name: str, backend: str, digits: Digits, steps: int, report: Callable[[Run], None]) -> Run:
    torch.manual_seed(SEED)
    model = VisionTransformer()
    optimizer, schedule = make_optimizer(name, backend, model, steps)
    run = Run(name, backend)
    for images, labels in digits.batches(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        run.milliseconds.append(1e3 * (time.perf_counter() - start))
        schedule.step()
        run.losses.append(loss.item())
        report(run)
    run.accuracy = digits.accuracy(model)
    return run


def train_all(names: list[str], backends: list[str], steps: int, console: Console) -> Runs:
    digits, runs = Digits(), Runs()
    with progress_bar(console) as progress:
        task = progress.add_task("", total=steps * len(names) * len(backends))

        def report(run: Run) -> None:
            progress.update(task, advance=1, description=f"{run.title}: loss {run.losses[-1]:.3f}")

        for name in names:
            runs[name] = {backend: train(name, backend, digits, steps, report) for backend in backends}
            for run in runs[name].values():
                console.print(f"{run.title:<18} loss {run.final_loss:.4f}, test accuracy {run.accuracy:.1%}")
    return runs


def compare(pair: dict[str, Run]) -> tuple[float, float]:
    """How many times faster the fused step is, and the largest difference between the two loss curves."""
    fused, eager = pair["native"], pair["eager"]
    difference = max(abs(a - b) for a, b in zip(fused.losses, eager.losses, strict=True))
    return eager.step_time / fused.step_time, difference


def tabulate(runs: Runs) -> Table:
    from rich.table import Table

    table = Table(
        "optimizer",
        "backend",
        title="Handwritten digits, a vision transformer, one CPU thread",
        caption="step: median time of optimizer.step() alone; loss: mean of the last 10 training batches; "
        "accuracy: on the test digits; curves apart: largest difference between the two loss curves",
    )
    for head in ("step", "speed-up", "loss", "accuracy", "curves apart"):
        table.add_column(head, justify="right")
    for name, pair in runs.items():
        for backend, run in pair.items():
            speedup, apart = compare(pair) if len(pair) == 2 and backend == "native" else (None, None)
            table.add_row(
                name,
                backend,
                f"{run.step_time:.3f} ms",
                "" if speedup is None else f"{speedup:.1f}x",
                f"{run.final_loss:.4f}",
                f"{run.accuracy:.1%}",
                "" if apart is None else f"{apart:.1e}" if apart else "identical",
            )
        table.add_section()
    return table


def draw(runs: Runs, path: Path) -> None:
    """One panel for each optimizer: the fused run's loss as a thin line on the eager run's thick one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(4, len(runs))
    down = -(-len(runs) // across)
    figure = plt.figure(figsize=(max(3.2 * across, 6.4), 2.7 * down + 1.0), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    for axes, (name, pair) in zip(grid.flat, runs.items(), strict=False):
        notes = []
        for backend, (label, colour, width) in LINES.items():
            if backend in pair:
                run = pair[backend]
                axes.semilogy(run.losses, color=colour, linewidth=width, label=label)
                notes.append(f"{backend}: step {run.step_time:.2f} ms, test accuracy {run.accuracy:.1%}")
        axes.set_title(name, loc="left", fontweight="bold")
        if len(pair) == 2:
            speedup, apart = compare(pair)
            axes.set_title(f"step {speedup:.1f}x as fast", loc="right", color=LINES["native"][1])
            notes.append(f"losses differ by at most {apart:.0e}" if apart else "identical losses at every step")
        axes.text(0.98, 0.98, "\n".join(notes), transform=axes.transAxes, ha="right", va="top", fontsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylim(top=20)  # room for the notes
    grid[0, 0].yaxis.set_major_formatter("{x:g}")
    figure.suptitle("A vision transformer learns handwritten digits, with fused and with eager optimizer steps")
    figure.supxlabel(f"training step, of {BATCH} digits each, on one CPU thread")
    figure.supylabel("training loss")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> Runs:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--backends", nargs="+", choices=LINES, default=["native", "eager"])
    parser.add_argument("--steps", type=int, default=200, help="batches that each run trains on (default: %(default)s)")
    picture = Path(__file__).parent / "output" / "train_digits.png"
    parser.add_argument("--out", type=Path, default=picture, help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1; got {args.steps}")
    if args.out.suffix not in PICTURES:
        parser.error(f"--out: expected a name that ends in .png, .svg or .pdf; got {args.out}")

    from rich.console import Console

    torch.set_num_threads(1)  # the same results on any number of cores, and steadier times
    console = Console()
    start = time.perf_counter()
    runs = train_all(args.optimizers, args.backends, args.steps, console)
    console.print(tabulate(runs))
    draw(runs, args.out)
    console.print(f"{args.out} written; {time.perf_counter() - start:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
