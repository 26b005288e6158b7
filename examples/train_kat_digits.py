# SPDX-License-Identifier: Apache-2.0
"""Train a small vision transformer on handwritten digits, with GELU in its MLPs and with rational activations.

    pip install ".[examples]"
    python examples/train_kat_digits.py

Both models train from the same weights and on the same batches. The Kolmogorov-Arnold transformer, KAT, is the other
model converted: its MLPs are singlepass.nn.KATMLP, whose activations start as the identity and as GELU, and learn. A
table and a picture show accuracy, time, and what became of the activations.
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
from _digits import BATCH, Digits, VisionTransformer
from _report import PICTURES
from _training import parameter_groups, progress_bar, warm_up_then_decay
from torch import Tensor, nn

from singlepass.functional import rational
from singlepass.nn import GroupRational, kat_from_vit
from singlepass.optim import AdamW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from rich.console import Console
    from rich.table import Table

GROUPS = 8
SETTINGS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 1e-2}

# By name: what is made of the transformer; the colour of its lines.
MODELS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "GELU": (lambda model: model, "#8c8c8c"),
    "KAT": (lambda model: kat_from_vit(model, groups=GROUPS), "#0072b2"),
    "KAT-eager": (lambda model: kat_from_vit(model, groups=GROUPS, backend="eager"), "#e69f00"),
}


@dataclass
class Run:
    """A model's training; the lists have one number for each epoch."""

    name: str
    seed: int
    model: nn.Module
    losses: list[float] = field(default_factory=list)  # mean over the epoch's batches
    accuracies: list[float] = field(default_factory=list)  # on the test digits, after the epoch
    seconds: list[float] = field(default_factory=list)  # of training alone

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


Runs = dict[str, list[Run]]  # by model, then by seed


def train(name: str, seed: int, digits: Digits, epochs: int, report: Callable[[Run, float], None]) -> Run:
    torch.manual_seed(seed)
    run = Run(name, seed, MODELS[name][0](VisionTransformer()))
    per_epoch = digits.batches_per_epoch
    optimizer = AdamW(parameter_groups(run.model), **SETTINGS)
    schedule = warm_up_then_decay(optimizer, epochs * per_epoch)
    batches = digits.batches(epochs * per_epoch, seed)
    for _ in range(epochs):
        losses: list[float] = []
        start = time.perf_counter()
        for _ in range(per_epoch):
            images, labels = next(batches)
            loss = F.cross_entropy(run.model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(run, losses[-1])
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(statistics.fmean(losses))
        run.accuracies.append(digits.accuracy(run.model))
    return run


def train_all(names: list[str], seeds: int, epochs: int, digits: Digits, console: Console) -> Runs:
    runs: Runs = {name: [] for name in names}
    with progress_bar(console, width=54) as progress:
        task = progress.add_task("", total=seeds * len(names) * epochs * digits.batches_per_epoch)

        def report(run: Run, loss: float) -> None:
            text = f"{run.name}, seed {run.seed}, epoch {len(run.losses) + 1}: loss {loss:.3f}"
            if run.accuracies:
                text += f", accuracy {run.accuracies[-1]:.1%}"
            progress.update(task, advance=1, description=text)

        for seed in range(seeds):
            for name in names:
                run = train(name, seed, digits, epochs, report)
                runs[name].append(run)
                title = f"{name}, seed {seed}"
                console.print(f"{title:<17} loss {run.losses[-1]:.4f}, test accuracy {run.accuracies[-1]:.1%}")
    return runs


def epoch_time(runs: list[Run]) -> float:
    return statistics.median(second for run in runs for second in run.seconds)


def tabulate(runs: Runs) -> Table:
    from rich.table import Table

    table = Table(
        "model",
        title="Handwritten digits, a vision transformer, one CPU thread",
        caption="accuracy on the test digits and training loss after the last epoch, over all seeds; "
        "epoch: median time of its training",
    )
    for head in ("parameters", "accuracy: mean", "lowest", "highest", "loss", "epoch", "relative"):
        table.add_column(head, justify="right")
    first = epoch_time(next(iter(runs.values())))
    for name, seeds in runs.items():
        accuracies = [run.accuracies[-1] for run in seeds]
        table.add_row(
            name,
            f"{seeds[0].parameters:,}",
            f"{statistics.fmean(accuracies):.1%}",
            f"{min(accuracies):.1%}",
            f"{max(accuracies):.1%}",
            f"{statistics.fmean(run.losses[-1] for run in seeds):.4f}",
            f"{epoch_time(seeds):.3f} s",
            f"{epoch_time(seeds) / first:.2f}x",
        )
    return table


def inputs_of(act: GroupRational, model: nn.Module, images: Tensor) -> Tensor:
    """What an activation is given for these images, its bias added: (elements, groups)."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if kwargs.get("bias") is None else args[0] + kwargs["bias"])

    handle = act.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return seen[0].unflatten(-1, (act.groups, -1)).movedim(-2, -1).reshape(-1, act.groups)


def draw_activation(row: list[Axes], title: str, act: GroupRational, inputs: Tensor) -> None:
    """One panel for each group: its function, what all began as, and where 98 % of its inputs lie."""
    x = torch.linspace(-4.0, 4.0, 161)
    start = act.init(x)
    with torch.no_grad():
        learned = rational(x[:, None].expand(-1, act.groups), act.numerator, act.denominator, form=act.form)
    low, high = (inputs.quantile(q, dim=0) for q in (0.01, 0.99))
    used = learned[(x[:, None] >= low) & (x[:, None] <= high)]
    margin = 0.1 * float(used.max() - used.min())
    for group, axes in enumerate(row):
        axes.axvspan(float(low[group]), float(high[group]), color="#eeeeee", linewidth=0, label="98 % of inputs")
        axes.plot(x, start, color="#8c8c8c", linewidth=1.2, linestyle="--", label="start")
        axes.plot(x, learned[:, group], color=MODELS["KAT"][1], linewidth=1.6, label="learned")
        axes.set_xlim(-4.0, 4.0)
        axes.set_ylim(float(used.min()) - margin, float(used.max()) + margin)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"group {group}", fontsize=8)
        axes.tick_params(labelsize=7, labelleft=group == 0)
    row[0].set_ylabel(title, fontsize=9)


def draw_curves(figure: Figure | SubFigure, runs: Runs) -> None:
    """A thin line for each seed, a thick one for the mean."""
    from matplotlib.ticker import PercentFormatter

    left, right = figure.subplots(1, 2)
    for name, seeds in runs.items():
        colour = MODELS[name][1]
        for axes, curves in ((left, [r.losses for r in seeds]), (right, [r.accuracies for r in seeds])):
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axes.plot(epochs, curve, color=colour, linewidth=0.6, alpha=0.5)
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(epochs, mean, color=colour, linewidth=2.0, label=f"{name}: {epoch_time(seeds):.2f} s an epoch")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("epoch")
    left.set_yscale("log")
    left.set_title("training loss", loc="left", fontweight="bold")
    right.set_title("accuracy on the test digits", loc="left", fontweight="bold")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_ylim(0.9 * min(run.accuracies[-1] for seeds in runs.values() for run in seeds), 1.0)
    left.legend(frameon=False)


def draw(runs: Runs, layer: int, digits: Digits, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kat = next((seeds[0] for name, seeds in runs.items() if name != "GELU"), None)
    figure = plt.figure(figsize=(11.0, 3.6 if kat is None else 7.4), layout="constrained")
    if kat is None:
        draw_curves(figure, runs)
    else:
        curves, activations = figure.subfigures(2, 1)
        draw_curves(curves, runs)
        mlp = kat.model.layers[layer].mlp
        grid = activations.subplots(2, GROUPS, squeeze=False)
        for row, act, title in zip(grid, (mlp.act1, mlp.act2), ("act1, from x", "act2, from GELU"), strict=True):
            draw_activation(list(row), title, act, inputs_of(act, kat.model, digits.test_images))
        activations.suptitle(f"activations of layer {layer} of {kat.name}, seed {kat.seed}", fontsize=11)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        activations.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"A vision transformer learns handwritten digits, in batches of {BATCH} on one CPU thread")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> Runs:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["GELU", "KAT"], metavar="NAME")
    parser.add_argument("--epochs", type=int, default=12, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=1, choices=(0, 1), help="whose activations are drawn")
    picture = Path(__file__).parent / "output" / "train_kat_digits.png"
    parser.add_argument("--out", type=Path, default=picture, help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    for option in ("epochs", "seeds"):
        if getattr(args, option) < 1:
            parser.error(f"--{option}: expected at least 1; got {getattr(args, option)}")
    if args.out.suffix not in PICTURES:
        parser.error(f"--out: expected a name that ends in .png, .svg or .pdf; got {args.out}")

    from rich.console import Console

    torch.set_num_threads(1)  # the same results on any number of cores, and steadier times
    console, digits = Console(), Digits()
    start = time.perf_counter()
    runs = train_all(list(dict.fromkeys(args.models)), args.seeds, args.epochs, digits, console)
    console.print(tabulate(runs))
    draw(runs, args.layer, digits, args.out)
    console.print(f"{args.out} written; {time.perf_counter() - start:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
