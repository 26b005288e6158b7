# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from singlepass.bench import registry
from singlepass.bench.rational import activations
from singlepass.bench.rational import cases as rational
from singlepass.bench.rational.activations import BACKWARD, FORWARD, GROUPS
from singlepass.bench.rational.calls import Function, Inputs, caller, gate, make_inputs, prepare, with_coefficients
from singlepass.functional import rational as ours

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16)
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def family(device: torch.device) -> list[registry.Case]:
    return [case for case in registry.cases(device) if case.family == "rational"]


def gate_of(formula: Formula, dtype: torch.dtype = torch.float32, backward: bool = True) -> registry.Gate:
    make = partial(with_coefficients, formula)
    return gate(make, rational.REFERENCE, backward, GROUPS, dtype, CPU)


def test_cases_of_the_cpu() -> None:
    shapes = {(16, 197, 768), (16, 197, 3072)}
    found = [(case.op, case.size, case.dtype) for case in family(CPU)]
    names = {"x".join(map(str, shape)) for shape in shapes}
    assert set(found) == {(op, name, dtype) for op in (FORWARD, BACKWARD) for name in names for dtype in DTYPES}
    assert len(found) == 8


def test_cases_of_the_gpu() -> None:
    cases = family(CUDA)
    shapes = {a.shape for a in activations.ACTIVATIONS["cuda"]}
    assert shapes == {(128, 197, c) for c in (192, 384, 768, 1536, 3072)} | {(64, 1000, 512)}
    assert len(cases) == 24
    assert all(a.elements % GROUPS == 0 for some in activations.ACTIVATIONS.values() for a in some)
    assert {p.name for case in cases for p in case.providers if p.column == "peer"} == {
        "kat_rational",
        "flashkat",
        "kat_rational-autocast",
        "flashkat-autocast",
    }


@pytest.mark.parametrize("case", family(CPU), ids=lambda case: case.name)
def test_floor(case: registry.Case) -> None:
    """Forward: x in, y out. Backward: x and the gradient in, x's gradient out."""
    trips = 5 if case.op == BACKWARD else 2
    assert case.bytes == trips * case.elements * case.dtype.itemsize
    assert case.input_bytes == case.elements * case.dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=registry.dtype_name)
@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_providers_compute_what_they_claim(op: str, dtype: torch.dtype) -> None:
    case = next(case for case in family(CPU) if (case.op, case.dtype) == (op, dtype))
    ran = set()
    for provider in case.providers:
        if provider.why_not(CPU) is None and provider.tier < registry.Tier.COMPILED:
            assert provider.gate(CPU).agrees, provider.name
            assert provider.differs is None
            ran.add(provider.name)
    assert ran == {"native", "gelu", "eager"} or "native" not in ran


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", DTYPES, ids=registry.dtype_name)
def test_compiled_eager_agrees(dtype: torch.dtype) -> None:
    case = next(case for case in family(CPU) if (case.op, case.dtype) == (BACKWARD, dtype))
    assert {p.name: p for p in case.providers}["compile"].gate(CPU).agrees


def eager(x: Tensor, a: Tensor, b: Tensor, form: str = "A") -> Tensor:
    return ours(x, a, b, form=form, backend="eager")


def rounded_backward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Right in its result, wrong in its coefficients' gradients."""
    y = eager(x, a, b)
    return y + (0.999 - 1.0) * (eager(x.detach(), a, b) - eager(x.detach(), a.detach(), b.detach()))


WRONG: dict[str, Formula] = {
    "another form": lambda x, a, b: eager(x, a, b, form="B"),
    "groups reversed": lambda x, a, b: eager(x, a, b.flip(0)),
    "one group for all": lambda x, a, b: eager(x, a, b[:1]),
    "groups interleaved": lambda x, a, b: (
        eager(x.unflatten(-1, (-1, GROUPS)).mT.flatten(-2), a, b).unflatten(-1, (GROUPS, -1)).mT.flatten(-2)
    ),
    "not a number": lambda x, a, b: eager(x, a, b) * float("nan"),
    "half of the channels": lambda x, a, b: eager(x, a, b)[..., ::2].repeat_interleave(2, -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=registry.dtype_name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_gate_passes_the_same_formula(dtype: torch.dtype, backward: bool) -> None:
    assert gate_of(eager, dtype, backward).agrees


@pytest.mark.parametrize("dtype", DTYPES, ids=registry.dtype_name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", WRONG)
def test_gate_stops_another_formula(name: str, backward: bool, dtype: torch.dtype) -> None:
    assert not gate_of(WRONG[name], dtype, backward).agrees


@pytest.mark.parametrize("dtype", DTYPES, ids=registry.dtype_name)
def test_gate_stops_wrong_gradients(dtype: torch.dtype) -> None:
    assert gate_of(rounded_backward, dtype, backward=False).agrees
    assert not gate_of(rounded_backward, dtype).agrees


def test_gate_stops_missing_gradients() -> None:
    def forgets(data: Inputs) -> Function:
        return replace(with_coefficients(eager, data), coefficients=())

    assert not gate(forgets, rational.REFERENCE, True, GROUPS, torch.float32, CPU).agrees


def test_gelu_is_held_to_gelu() -> None:
    def relu(data: Inputs) -> Function:
        return Function(torch.relu)

    assert gate(rational.gelu, rational.gelu, True, GROUPS, torch.float32, CPU).agrees
    assert not gate(relu, rational.gelu, True, GROUPS, torch.float32, CPU).agrees


def test_inputs() -> None:
    data = make_inputs((4, 50, 64), GROUPS, torch.bfloat16, CPU)
    assert (data.x.dtype, data.grad.dtype, data.numerator.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert (data.numerator.shape, data.denominator.shape) == ((1, 6), (GROUPS, 4))
    assert len({tuple(row.tolist()) for row in data.denominator}) == GROUPS
    assert abs(float(data.x.float().std()) - 1.0) < 0.05
    x = torch.linspace(-3, 3, 64).expand(1, 64)
    assert torch.allclose(ours(x, data.numerator, data.denominator), torch.nn.functional.gelu(x), atol=0.3)


def test_steps_leave_no_trace_in_the_inputs() -> None:
    data = make_inputs((2, 3, 16), GROUPS, torch.float32, CPU)
    before = [t.clone() for t in (data.x, data.grad, data.numerator, data.denominator)]
    for backward in (False, True):
        step = prepare(partial(with_coefficients, eager), backward, data)
        first, second = step.run(), step.run()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (data.x, data.grad, *before[2:]), strict=True))
    assert not data.x.requires_grad


def test_forward_records_nothing() -> None:
    data = make_inputs((2, 3, 16), GROUPS, torch.float32, CPU)
    make = partial(with_coefficients, eager)
    assert [t.grad_fn for t in caller(make, False, data)()] == [None]
    assert len(caller(make, True, data)()) == 4


class StandIn(torch.nn.Module):
    """A peer's module, with its parameters' names and its own initial values."""

    def __init__(self, groups: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((1, 6), (groups, 4)), strict=True):
            setattr(self, name, torch.nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        numerator, denominator = (getattr(self, name) for name in self.names)
        return ours(x, numerator, denominator)


def test_peers_get_our_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    kat, flash = ModuleType("kat_rational"), ModuleType("rational_kat")
    kat.KAT_Group = lambda num_groups, mode: StandIn(num_groups, ("weight_numerator", "weight_denominator"))
    flash.FlashKAT_Group = lambda channels, ga, gb, m, n, mode: StandIn(gb, ("numerator_v", "denominator_v"))
    monkeypatch.setitem(sys.modules, "kat_rational", kat)
    monkeypatch.setitem(sys.modules, "rational_kat", flash)
    for dtype in DTYPES:
        for (name, _, _, make), _ in rational.peers(dtype):
            assert gate(make, rational.REFERENCE, True, GROUPS, dtype, CPU).agrees, name


def test_missing_peers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = [p for p in family(CUDA)[0].providers if p.column == "peer"]
    assert found
    assert {p.why_not(CUDA) for p in found} == {"not installed"}
