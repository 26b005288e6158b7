# SPDX-License-Identifier: Apache-2.0
"""The eager reference under `torch.compile`: one graph for the update of any tensor, or one for the whole step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

Update = Callable[..., None]


def by_tensor(update: Update) -> Update:
    """A compiled update that is called for one tensor after another.

    Sizes are dynamic and all tensors flat, so that it compiles once: seconds, however many tensors there are.
    """
    compiled = torch.compile(update, dynamic=True, fullgraph=True)

    def flat(t: torch.Tensor) -> torch.Tensor:
        return t.view(-1) if t.dim() else t

    def run(*arguments: Any, **options: Any) -> None:
        *lists, lr = arguments
        for i in range(len(lists[0])):
            compiled(*([flat(values[i])] if values else [] for values in lists), lr, **options)

    return run


def whole_step(update: Update) -> Update:
    """A compiled update of all tensors at once: its one graph grows with the model and compiles for minutes."""
    return torch.compile(update, dynamic=False, fullgraph=True)


def compiled(optimizer: Any, compile_update: Callable[[Update], Update]) -> Callable[[], None]:
    """A step of one of our optimizers on the eager backend, with its update compiled from the second call on.

    The first call runs as it is and makes the states: no graph is compiled for its sake.
    """
    # Rules share the code of their steps, and dynamo counts the graphs of a code.
    torch._dynamo.config.recompile_limit = 64
    calls = count()
    step: Callable[[], None] = optimizer.step

    def run() -> None:
        nonlocal step
        if next(calls) == 1:
            step = compiled_step(optimizer, compile_update)
        step()

    return run


def compiled_step(optimizer: Any, compile_update: Callable[[Update], Update]) -> Callable[[], None]:
    """The step of an optimizer with one group, whose states exist, without what the class does around the update."""
    from singlepass._ops import optim as ops

    update = compile_update(optimizer.rule.on("eager"))
    grad_norm = torch.compile(ops.grad_norm.on("eager"), dynamic=True, fullgraph=True)
    (group,) = optimizer.param_groups
    params, hyper = group["params"], optimizer._hyper(group)
    lr = torch.tensor(group["lr"], dtype=torch.float64)

    def state(name: str) -> list[torch.Tensor]:
        return [optimizer.state[p][name] for p in params if name in optimizer.state[p]]

    states = [state(name) for name in optimizer.rule.lists]
    steps = state("step")

    @torch.no_grad()
    def step() -> None:
        grads = [p.grad for p in params]
        scale = None
        if max_norm := group.get("max_grad_norm", 0.0):
            scale = grad_norm(grads, max_norm=max_norm)[1]
        update(params, grads, *states, steps, lr, **hyper, grad_scale=scale)

    return step
