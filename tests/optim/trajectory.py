# SPDX-License-Identifier: Apache-2.0
"""Optimizers as users make them, and where their equations lead in float64."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import singlepass
from singlepass.optim._base import FusedOptimizer

from ..simt.bounded import Bounded
from ..simt.truth import Case
from ..tolerances import assert_within
from .steps import NAMES, allowance, exact, hyper_of, normal, rule_of

CLASSES = {name.lower(): getattr(singlepass.optim, name) for name in singlepass.optim._OPTIMIZERS}


def arguments_of(case: Case, state_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The case's hyperparameters as the class takes them."""
    hyper = dict(hyper_of(case, state_dtype))
    betas = tuple(hyper.pop(name) for name in ("beta1", "beta2", "beta3") if name in hyper)
    arguments: dict[str, Any] = {"lr": case.lr} | hyper
    if betas:
        arguments["betas"] = betas
    if "amsgrad" in case.rule:
        arguments["amsgrad"] = True
    return arguments


def make_optimizer(case: Case, params: Any, **options: Any) -> FusedOptimizer:
    state_dtype = options.get("state_dtype")
    state_dtype = state_dtype if isinstance(state_dtype, torch.dtype) else torch.float32
    optimizer: FusedOptimizer = CLASSES[rule_of(case).rule](params, **arguments_of(case, state_dtype) | options)
    return optimizer


def make_params(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype] = (torch.float32,), device: str = "cpu"
) -> list[Parameter]:
    """Parameters whose dtypes go round the given ones."""
    return [Parameter(normal(s, 10 + i, dtypes[i % len(dtypes)], device)) for i, s in enumerate(shapes)]


def give_grads(params: Sequence[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """New gradients, the same for the same step; in another dtype than the parameters' if one is given."""
    for i, p in enumerate(params):
        if dtype is not None:
            p.grad_dtype = None  # torch then takes a gradient of any dtype
        p.grad = normal(p.shape, 1000 * step + i, dtype or p.dtype, str(p.device))


def train(optimizer: FusedOptimizer, steps: range | int, dtype: torch.dtype | None = None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(1, steps + 1) if isinstance(steps, int) else steps:
        give_grads(params, step, dtype)
        optimizer.step()


def contents(optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """Copies of all parameters and states, by name."""
    copies: dict[str, Tensor] = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        copies[f"parameter {i}"] = p.detach().clone()
        copies |= {f"{name} {i}": value.clone() for name, value in optimizer.state.get(p, {}).items()}
    return copies


class Trajectory:
    """The equations in float64 from where the parameters are now, with what float32 arithmetic may be off by."""

    def __init__(self, case: Case, params: Sequence[Tensor], state_dtype: torch.dtype = torch.float32) -> None:
        self.case, self.params, self.state_dtype = case, params, state_dtype
        self.hyper = SimpleNamespace(lr=case.lr, state_dtype=NAMES[state_dtype], **hyper_of(case, state_dtype))
        self.t = 0
        self.names = [n for n in rule_of(case).states if "amsgrad" in case.rule or not n.startswith("max_")]
        self.values = [exact(p) for p in params]
        self.states = [[exact(torch.zeros_like(p)) for _ in self.names] for p in params]

    def step(self, optimizer: FusedOptimizer, factor: float = 1.0) -> None:
        """One step with the parameters' present gradients times ``factor``."""
        self.t += 1
        for i, p in enumerate(self.params):
            assert p.grad is not None
            gradient = exact(p.grad) if factor == 1.0 else exact(p.grad) * factor
            scale = float(optimizer.state[p]["gsnr"]) if rule_of(self.case).scale else 1.0
            value, states = self.case.step(self.values[i], gradient, self.states[i], self.t, scale, self.hyper)
            self.values[i] = self._stored(value, p.dtype)
            dtypes = [optimizer.state[p][name].dtype for name in self.names]
            self.states[i] = [self._stored(s, dtype) for s, dtype in zip(states, dtypes, strict=True)]

    @staticmethod
    def _stored(x: Bounded, dtype: torch.dtype) -> Bounded:
        return x if dtype in (torch.float32, torch.float64) else x.stored(NAMES[dtype])

    def check(self, optimizer: FusedOptimizer) -> None:
        for i, p in enumerate(self.params):
            self._check(p, self.values[i], f"parameter {i}")
            for name, state in zip(self.names, self.states[i], strict=True):
                self._check(optimizer.state[p][name], state, f"{name} {i}")

    def _check(self, actual: Tensor, expected: Bounded, label: str) -> None:
        allowed = torch.tensor(allowance(expected, actual.dtype))
        assert_within(actual, torch.tensor(expected.value), allowed, f"{self.case.id}, after {self.t} steps: {label}")
