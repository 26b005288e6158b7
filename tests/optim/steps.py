# SPDX-License-Identifier: Apache-2.0
"""One step of an op, checked against its equations in float64 and against eager. Used by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass._ops import OPS
from singlepass._ops.optim import RULES, StepOp

from ..simt.bounded import Bounded
from ..simt.truth import CASES, Case
from ..tolerances import assert_close, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@dataclass(frozen=True)
class Place:
    """A backend on a device. ``simt``: native kernels are those of GPUs, run on the CPU (tests/conftest.py)."""

    backend: str
    device: str = "cpu"
    simt: bool = False

    def function(self, op_name: str) -> Callable[..., Any]:
        op = OPS[op_name]
        return op.on(op.choose(self.device, frozenset(), self.backend))


GPU_PLACES = [
    pytest.param(Place(backend, "cuda"), id=f"{backend}-cuda", marks=pytest.mark.gpu)
    for backend in ("native", "triton", "eager")
]
NATIVE = pytest.param(Place("native"), id="native")
SIMT = pytest.param(Place("native", simt=True), id="simt")
EAGER = pytest.param(Place("eager"), id="eager")

each_place = pytest.mark.parametrize("place", [NATIVE, EAGER, SIMT, *GPU_PLACES])
each_kernel = pytest.mark.parametrize("place", [NATIVE, SIMT, *GPU_PLACES[:2]])
each_compiled = pytest.mark.parametrize("place", [NATIVE, *GPU_PLACES[:2]])  # in the package's own namespace


@dataclass(frozen=True)
class Mix:
    """Dtypes of parameters, gradients and states."""

    param: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    state: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(NAMES[dtype] for dtype in (self.param, self.grad, self.state))


MIXES = [Mix(param, grad, state) for param in DTYPES for grad in DTYPES for state in DTYPES]


def rule_of(case: Case) -> StepOp:
    return RULES[case.rule.removesuffix("_amsgrad")]


def hyper_of(case: Case, state_dtype: torch.dtype) -> dict[str, Any]:
    """float16 holds neither a small eps nor squares scaled down by a thousand: its states get other values."""
    tiny = state_dtype == torch.float16 and "beta2" in case.hyper and "eps" in case.hyper
    return case.hyper | {"eps": 1e-3, "beta2": 0.9} if tiny else case.hyper


def exact(t: Tensor) -> Bounded:
    return Bounded(t.detach().double().cpu().numpy().copy())


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers, of which every fifth is exactly zero. The same on every device."""
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::5] = 0.0
    return x.to(device=device, dtype=dtype)


@dataclass
class Tensors:
    """What a step op works on. ``states`` has one list per state."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    scales: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def clone(self) -> Tensors:
        def copy(tensors: list[Tensor]) -> list[Tensor]:
            return [t.clone() for t in tensors]

        states = [copy(values) for values in self.states]
        return Tensors(copy(self.params), copy(self.grads), states, copy(self.scales), copy(self.steps))

    def arguments(self, case: Case) -> list[list[Tensor]]:
        missing = len(rule_of(case).states) - len(self.states)  # the maximum of AMSGrad, where it is not wanted
        scales = [self.scales] if rule_of(case).scale else []
        return [self.params, self.grads, *self.states, *([[]] * missing), *scales, self.steps]

    def written(self) -> list[Tensor]:
        return [*self.params, *(s for values in self.states for s in values), *self.steps]


def make_tensors(
    case: Case,
    shapes: Sequence[Sequence[int]],
    mix: Mix,
    *,
    device: str = "cpu",
    like: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensors:
    """``like`` lays a tensor out in memory; states follow their parameters."""
    params = [like(normal(shape, 10 + i, mix.param, device)) for i, shape in enumerate(shapes)]
    count = len(rule_of(case).states)
    if case.rule in ("adamw", "adabelief"):
        count -= 1
    return Tensors(
        params=params,
        grads=[like(normal(shape, 0, mix.grad, device)) for shape in shapes],
        states=[[like(torch.zeros_like(p, dtype=mix.state)) for p in params] for _ in range(count)],
        scales=[torch.tensor(1.0 + 0.5 * i, device=device) for i in range(len(shapes))] if rule_of(case).scale else [],
        steps=[torch.zeros((), device=device) for _ in shapes],
    )


def set_grads(tensors: Tensors, step: int) -> None:
    for i, g in enumerate(tensors.grads):
        g.copy_(normal(g.shape, 1000 * step + i))


def call(function: Callable[..., None], case: Case, tensors: Tensors, **options: Any) -> None:
    lr = options.pop("lr", torch.tensor(case.lr, dtype=torch.float64))
    hyper = hyper_of(case, tensors.states[0][0].dtype if tensors.states[0] else torch.float32)
    function(*tensors.arguments(case), lr, **hyper, **options)


def step_and_check(place: Place, case: Case, tensors: Tensors, t: int, *, factor: float = 1.0, **options: Any) -> None:
    """Makes step ``t``, counted from 1, and compares with eager and with the equations.

    ``factor`` is what ``options`` (``maximize``, ``grad_scale``) make of the gradients.
    """
    op_name = rule_of(case).name
    before, eager = tensors.clone(), tensors.clone()
    call(place.function(op_name), case, tensors, **options)
    call(OPS[op_name].on("eager"), case, eager, **options)
    for i, p in enumerate(before.params):
        old = [values[i] for values in before.states]
        state_dtype = old[0].dtype
        gradient = exact(before.grads[i]) if factor == 1.0 else exact(before.grads[i]) * factor
        hyper = SimpleNamespace(lr=case.lr, state_dtype=NAMES[state_dtype], **hyper_of(case, state_dtype))
        scale = float(before.scales[i]) if before.scales else 1.0
        new_p, new_s = case.step(exact(p), gradient, [exact(s) for s in old], t, scale, hyper)
        names = ("parameter", *rule_of(case).states)
        for name, bounded, was, got, eagerly in zip(
            names,
            (new_p, *new_s),
            (p, *old),
            (tensors.params[i], *(values[i] for values in tensors.states)),
            (eager.params[i], *(values[i] for values in eager.states)),
            strict=False,
        ):
            label = f"{case.id}, step {t}: {name} {i} of shape {tuple(p.shape)}"
            truth = torch.from_numpy(bounded.value)
            allowed = torch.tensor(allowance(bounded, got.dtype))
            assert_within(eagerly, truth, allowed, f"eager {label}")
            assert_close(op_name, got, eagerly, truth, before=was, label=label)
    assert [float(s) for s in tensors.steps] == [float(s) + 1.0 for s in before.steps]


def allowance(bounded: Bounded, dtype: torch.dtype) -> Any:
    """The error bound after storing. It is doubled: the same formula may be associated in another way."""
    if dtype == torch.float64:
        return 2.0**-28 * bounded.error
    return Bounded(bounded.value, 2.0 * bounded.error).stored(NAMES[dtype]).error
