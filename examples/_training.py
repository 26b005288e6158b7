# SPDX-License-Identifier: Apache-2.0
"""What examples that train share: groups of parameters, the learning rate, and a bar that shows how far they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from singlepass.nn import no_weight_decay

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices in one group; biases, norms and coefficients of activations in another, which does not decay."""
    marked = no_weight_decay(model)
    decayed = [p.ndim > 1 and name not in marked for name, p in model.named_parameters()]
    matrices = [p for p, decays in zip(model.parameters(), decayed, strict=True) if decays]
    others = [p for p, decays in zip(model.parameters(), decayed, strict=True) if not decays]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


def rate(step: int, steps: int) -> float:
    """Of the learning rate: rises over the first tenth of the steps, then falls to zero."""
    warmup = steps // 10 + 1
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def warm_up_then_decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: rate(step, steps))


def progress_bar(console: Console, width: int = 34) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    description = TextColumn(f"{{task.description:<{width}}}")
    return Progress(description, *columns, console=console, refresh_per_second=4)
