# SPDX-License-Identifier: Apache-2.0
"""Other packages' optimizers as oracles: the same trajectories, and their state dicts load.

In float64, so that a difference is one of formulas. pytorch_optimizer is compared where it has our formula. It has
another for LAMB (no bias correction, the parameter's norm clamped to 10), for LARS's tensors with one dimension (plain
SGD) and for SGD-SaI (momentum from zero, another gain for tensors with one dimension).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from singlepass import optim

from ..tolerances import assert_within, ulp
from .trajectory import make_params, train

SHAPES = [(1, 3), (5, 7), (40, 3)]
STEPS = 12


@dataclass(frozen=True)
class Oracle:
    """Another implementation and ours, with the arguments that make them the same. ``absolute``: known difference."""

    module: str
    name: str
    ours: type
    arguments: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)  # ours in their words
    label: str = ""
    absolute: float = 0.0

    @property
    def id(self) -> str:
        return "-".join(part for part in (self.module, self.name, self.label) if part)

    def make(self, params: list[torch.nn.Parameter]) -> Optimizer:
        if importlib.util.find_spec(self.module) is None:
            pytest.skip(f"{self.module} is not installed")
        with contextlib.redirect_stdout(io.StringIO()):  # some announce their defaults
            other: Optimizer = getattr(importlib.import_module(self.module), self.name)(params, **self.arguments)
        return other

    def make_ours(self, params: list[torch.nn.Parameter], **options: Any) -> Optimizer:
        ours: Optimizer = self.ours(params, **self.own, **options)
        return ours


def same(
    module: str, name: str, ours: type, label: str = "", theirs: dict[str, Any] | None = None, **arguments: Any
) -> Oracle:
    """``theirs``: arguments that only the oracle takes."""
    return Oracle(module, name, ours, arguments | (theirs or {}), arguments, label)


_ADAMW = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
_LION = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
_BELIEF = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": 0.1}
_QUIET = {"print_change_log": False}


def belief(label: str, theirs: dict[str, Any], **own: Any) -> Oracle:
    return Oracle("adabelief_pytorch", "AdaBelief", optim.AdaBelief, _BELIEF | _QUIET | theirs, _BELIEF | own, label)


ORACLES = [
    same("torch.optim", "AdamW", optim.AdamW, theirs={"foreach": False}, **_ADAMW),
    same("torch.optim", "AdamW", optim.AdamW, "amsgrad", {"foreach": False}, **_ADAMW, amsgrad=True),
    same("torch.optim", "AdamW", optim.AdamW, "maximize", {"foreach": False}, **_ADAMW, maximize=True),
    same("torch.optim", "AdamW", optim.AdamW, "defaults", {"foreach": False}),
    same("lion_pytorch", "Lion", optim.Lion, **_LION),
    same("lion_pytorch", "Lion", optim.Lion, "defaults"),
    belief("rectified", {}),
    belief("plain", {"rectify": False}, rectify=False),
    belief("amsgrad", {"rectify": False, "amsgrad": True}, rectify=False, amsgrad=True),
    belief("amsgrad-rectified", {"amsgrad": True}, amsgrad=True),
    belief("coupled", {"weight_decouple": False}, decoupled_weight_decay=False),
    belief("fixed", {"fixed_decay": True, "rectify": False}, fixed_decay=True, rectify=False),
    belief("no-sgd", {"degenerated_to_sgd": False}, degenerated_to_sgd=False),
    Oracle("adabelief_pytorch", "AdaBelief", optim.AdaBelief, _QUIET, {}, "defaults"),
    same("pytorch_optimizer", "Lion", optim.Lion, theirs={"foreach": False}, **_LION),
    same("pytorch_optimizer", "Adan", optim.Adan, theirs={"foreach": False}, lr=1e-2, weight_decay=0.1),
    Oracle(
        "pytorch_optimizer",
        "Adan",
        optim.Adan,
        {"lr": 1e-2, "max_grad_norm": 0.5, "foreach": False},
        {"lr": 1e-2, "max_grad_norm": 0.5},
        "clipped",
        absolute=1e-2 * STEPS * 2.0**-24,  # our clipping divides by a float32
    ),
    Oracle(
        "pytorch_optimizer",
        "Adan",
        optim.Adan,
        {"lr": 1e-2, "weight_decay": 0.1, "weight_decouple": True, "foreach": False},
        {"lr": 1e-2, "weight_decay": 0.1, "no_prox": True},
        "no-prox",
    ),
    same("pytorch_optimizer", "LARS", optim.LARS, theirs={"foreach": False}, lr=0.5, momentum=0.9, weight_decay=0.1),
    Oracle(
        "pytorch_optimizer",
        "DiffGrad",
        optim.DiffGrad,
        {"lr": 1e-2, "weight_decay": 0.1, "weight_decouple": False, "foreach": False},
        {"lr": 1e-2, "weight_decay": 0.1},
        absolute=1e-2 * STEPS * 1e-7,  # it adds 1e-15 to the second moment, which is as small as 1e-8 here
    ),
    Oracle(
        "pytorch_optimizer",
        "AdaBelief",
        optim.AdaBelief,
        {"lr": 1e-2, "eps": 1e-12, "weight_decay": 0.1, "rectify": True, "foreach": False},
        {"lr": 1e-2, "eps": 1e-12, "weight_decay": 0.1},
    ),
]
each_oracle = pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.id)


@each_oracle
def test_the_same_trajectory_in_float64(oracle: Oracle) -> None:
    theirs, ours = (make_params(SHAPES, (torch.float64,)) for _ in range(2))
    train(oracle.make(theirs), STEPS)
    train(oracle.make_ours(ours), STEPS)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        # Bias corrections of beta 0.999 lose three digits in the first steps, whoever makes them.
        allowed = 2.0**-53 * 1e4 * (p.detach().abs() + 1.0) + oracle.absolute
        assert_within(p, q.detach(), allowed, f"{oracle.id}: parameter {i}")


@each_oracle
def test_native_follows_in_float32(oracle: Oracle) -> None:
    theirs, ours = make_params(SHAPES, (torch.float64,)), make_params(SHAPES)
    train(oracle.make(theirs), STEPS)
    train(oracle.make_ours(ours, backend="native"), STEPS)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        # Each step rounds the parameter once, and what it adds a few times.
        allowed = STEPS * 4.0 * ulp(q.detach().abs() + 0.1, torch.float32)
        assert_within(p, q.detach(), allowed, f"{oracle.id}: parameter {i}")


LOADABLE = [oracle for oracle in ORACLES if oracle.module != "pytorch_optimizer"]


@pytest.mark.parametrize("oracle", LOADABLE, ids=lambda oracle: oracle.id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_state_dicts_load_and_training_goes_on(dtype: torch.dtype, oracle: Oracle) -> None:
    theirs = make_params(SHAPES, (dtype,))
    other = oracle.make(theirs)
    train(other, 7)
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    options = {name: value for name, value in oracle.own.items() if name not in ("lr", "betas", "eps", "weight_decay")}
    loaded = oracle.ours(ours, **options)
    loaded.load_state_dict(other.state_dict())
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name in other.param_groups[0]:
            assert loaded.param_groups[0][name] == other.param_groups[0][name]
    train(other, range(8, 12))
    train(loaded, range(8, 12))
    info = torch.finfo(dtype)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        allowed = 4 * 8.0 * info.eps * (q.detach().double().abs() + 0.1)
        assert_within(p, q.detach().double(), allowed * (100.0 if dtype == torch.float64 else 1.0), f"{oracle.id}: {i}")


TO_LITERAL: dict[str, tuple[type, dict[str, Any], Callable[[Optimizer], dict[str, Any]]]] = {}


def literal(name: str, cls: type, **arguments: Any):
    """Registers how an official implementation would have written our optimizer's state."""

    def register(convert: Callable[[Optimizer], dict[str, Any]]):
        TO_LITERAL[name] = (cls, arguments, convert)
        return convert

    return register


def values_of(optimizer: Optimizer, *names: str) -> dict[int, dict[str, Any]]:
    params = optimizer.param_groups[0]["params"]
    return {i: {name: optimizer.state[p][name].clone() for name in names} for i, p in enumerate(params)}


def group_of(optimizer: Optimizer, *names: str) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {name: group[name] for name in names} | {"params": list(range(len(group["params"])))}


@literal("sail-sg/Adan", optim.Adan, lr=1e-2, weight_decay=0.1)
def adan(o: Optimizer) -> dict[str, Any]:
    group = group_of(o, "lr", "betas", "eps", "weight_decay", "max_grad_norm", "no_prox")
    group |= {"foreach": True, "fused": False, "step": 3}
    return {"state": values_of(o, "exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"), "param_groups": [group]}


@literal("shivram1987/diffGrad", optim.DiffGrad, lr=1e-2, weight_decay=0.1)
def diffgrad(o: Optimizer) -> dict[str, Any]:
    states = values_of(o, "exp_avg", "exp_avg_sq", "previous_grad")
    for state in states.values():
        state["step"] = 3
    return {"state": states, "param_groups": [group_of(o, "lr", "betas", "eps", "weight_decay")]}


@literal("NVIDIA/apex-FusedLAMB", optim.LAMB, lr=1e-2, weight_decay=0.1)
def lamb(o: Optimizer) -> dict[str, Any]:
    group = group_of(o, "lr", "betas", "eps", "weight_decay", "max_grad_norm")
    group |= {"bias_correction": True, "grad_averaging": True, "step": 3}
    return {"state": values_of(o, "exp_avg", "exp_avg_sq"), "param_groups": [group]}


@literal("AnonymousAlethiometer/SGD_SaI", optim.SGDSaI, lr=1e-3, weight_decay=0.1)
def sgdsai(o: Optimizer) -> dict[str, Any]:
    group = group_of(o, "lr", "momentum", "eps", "weight_decay")
    return {"state": values_of(o, "momentum_buffer", "gsnr"), "param_groups": [group]}


@literal("google/automl-lion_pytorch", optim.Lion, lr=1e-3, weight_decay=0.1)
def lion(o: Optimizer) -> dict[str, Any]:
    return {"state": values_of(o, "exp_avg"), "param_groups": [group_of(o, "lr", "betas", "weight_decay")]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "arguments", "convert"), TO_LITERAL.values(), ids=TO_LITERAL)
def test_official_formats_load(cls: type, arguments: dict[str, Any], convert: Callable, dtype: torch.dtype) -> None:
    params = make_params(SHAPES, (dtype,))
    source = cls(params, **arguments)
    train(source, 3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    target = cls(copies)
    target.load_state_dict(convert(source))
    assert {name: target.param_groups[0][name] for name in arguments} == arguments
    for optimizer in (source, target):
        train(optimizer, range(4, 8))
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
