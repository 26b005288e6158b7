# SPDX-License-Identifier: Apache-2.0
"""Optimizers made ready to be timed, and compared with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter

import torch
from torch.optim import Optimizer

from ..registry import Gate, Step
from . import models

MakeOptimizer = Callable[[list[torch.nn.Parameter]], Optimizer]
MakeRunner = Callable[[Optimizer], Callable[[], object]]

GATE_MODEL = models.Model("gate", "", ((7,), (33, 17), (64, 129)))
GATE_STEPS = 5
# Allowed error, relative to the largest value that the element takes on the way: in each step, a bfloat16 parameter is
# rounded by 2^-9 of itself. The gate tells wrong from right; tests judge the last bits.
GATE_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: GATE_STEPS * 2.0**-8}
GATE_ABSOLUTE = 1e-7  # a thousandth of a step of Lion


@dataclass(frozen=True)
class Inputs:
    """Initial parameters and two sets of gradients, shared by all providers of a case, which copy what they write."""

    params: list[torch.Tensor]
    grads: list[list[torch.Tensor]]


def make_inputs(model: models.Model, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(scale: float) -> list[torch.Tensor]:
        flat = torch.randn(model.elements, generator=generator, device=device).mul_(scale).to(dtype)
        sizes = [torch.Size(shape).numel() for shape in model.shapes]
        # Copies: each tensor owns its storage, as in a model.
        return [part.reshape(shape).clone() for part, shape in zip(flat.split(sizes), model.shapes, strict=True)]

    return Inputs(normal(0.02), [normal(1e-3), normal(1e-3)])


# The inputs of one model at a time stay in memory: gigabytes for the larger ones.
inputs = lru_cache(maxsize=1)(make_inputs)


@dataclass(frozen=True)
class OptimizerStep(Step):
    params: list[torch.nn.Parameter] = field(default_factory=list)


def prepare(
    make: MakeOptimizer, data: Inputs, *, clobbers: bool = False, runner: MakeRunner = attrgetter("step")
) -> OptimizerStep:
    """An optimizer with parameters of its own. `runner` turns it into what is called for a step.

    The two sets of gradients alternate, as addresses and values of gradients do in training, so that neither cached
    pointers nor moments that have converged flatter anybody. `clobbers`: it writes into gradients, so it gets its own.
    """
    params = [torch.nn.Parameter(p.clone()) for p in data.params]
    grads = [[g.clone() for g in grads] for grads in data.grads] if clobbers else data.grads

    def before(i: int) -> None:
        for p, g in zip(params, grads[i % 2], strict=True):
            p.grad = g

    return OptimizerStep(runner(make(params)), before, params)


def gate(
    make: MakeOptimizer, reference: MakeOptimizer, dtype: torch.dtype, runner: MakeRunner, device: torch.device
) -> Gate:
    """Some steps on small tensors, compared elementwise with the eager implementation in float64.

    Every step gets fresh gradients, so that what a peer writes into them does not reach the next one.
    """
    data = make_inputs(GATE_MODEL, dtype, device)
    got = prepare(make, data, runner=runner)
    want = prepare(reference, Inputs([p.double() for p in data.params], []))
    reach = [p.detach().abs() for p in want.params]
    for i in range(GATE_STEPS):
        for step, to in ((got, dtype), (want, torch.float64)):
            for p, g in zip(step.params, data.grads[i % 2], strict=True):
                p.grad = g.to(to, copy=True)
            step.run()
        reach = [torch.maximum(r, p.detach().abs()) for r, p in zip(reach, want.params, strict=True)]
    return Gate.of(
        (p.detach().double() - exact.detach()).abs() / (GATE_TOLERANCE[dtype] * r + GATE_ABSOLUTE)
        for p, exact, r in zip(got.params, want.params, reach, strict=True)
    )
