# SPDX-License-Identifier: Apache-2.0
"""torch.library's own checks of the ops, torch.compile, torch.export and vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from singlepass import optim
from singlepass._ops import OPS

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .steps import Mix, Place, each_case, each_compiled, hyper_of, make_tensors, normal, rule_of, set_grads
from .trajectory import CLASSES, contents, give_grads, make_optimizer, make_params

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
one_case_a_rule = pytest.mark.parametrize("case", [c for c in CASES if not c.label], ids=lambda case: case.id)

LAYOUTS = {"contiguous": lambda t: t, "permuted": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)}


def arguments(case: Case, device: str, layout=LAYOUTS["contiguous"], mix: Mix | None = None):
    tensors = make_tensors(case, [(3, 4, 5), (2, 1, 7)], mix or Mix(), device=device, like=layout)
    set_grads(tensors, 1)
    return tensors, (*tensors.arguments(case), torch.tensor(case.lr, dtype=torch.float64))


@each_compiled
@pytest.mark.parametrize("case", [c for c in CASES if c.rule in ("lion", "adamw", "sgdsai")], ids=lambda case: case.id)
def test_step_ops_compile_into_one_graph(case: Case, place: Place) -> None:
    tensors, args = arguments(case, place.device)
    expected = tensors.clone()
    hyper = hyper_of(case, torch.float32)

    def step(*args: object) -> None:
        rule_of(case).overload(*args, **hyper)

    torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    step(*expected.arguments(case), args[-1])
    for a, b in zip(tensors.written(), expected.written(), strict=True):
        assert_same_bits(a, b)


COMPILED = [pytest.param(name, None, id=name) for name in sorted(CLASSES)]


@each_compiled
@pytest.mark.parametrize(("name", "dynamic"), [*COMPILED, pytest.param("adamw", True, id="adamw-dynamic")])
def test_optimizer_steps_compile_into_one_graph(name: str, dynamic: bool | None, place: Place) -> None:
    case = next(c for c in CASES if rule_of(c).rule == name)
    compiled_params, plain_params = (make_params([(5, 7), (64,), ()], device=place.device) for _ in range(2))
    compiled, plain = (make_optimizer(case, ps, backend=place.backend) for ps in (compiled_params, plain_params))
    step = torch.compile(compiled.step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for k in range(1, 5):
        for params, do in ((compiled_params, step), (plain_params, plain.step)):
            give_grads(params, k)
            do()
    expected = contents(plain)
    for key, value in contents(compiled).items():
        assert_same_bits(value, expected[key], key)


def test_a_learning_rate_that_changes_does_not_compile_again() -> None:
    params = make_params([(8,)])
    lr = torch.tensor(1e-2)
    optimizer = optim.AdamW(params, lr=lr)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for k in range(1, 7):
        give_grads(params, k)
        step()
        lr.mul_(0.9)
    assert counter.frame_count <= 2  # states are made in the first step


@pytest.mark.parametrize("name", ["Adan", "LAMB"])
def test_a_norm_for_clipping_may_change(name: str) -> None:
    """torch.compile takes it for a number that it does not know from then on."""
    compiled_params, plain_params = (make_params([(5, 7), (8,)]) for _ in range(2))
    compiled, plain = (getattr(optim, name)(ps, max_grad_norm=1.0) for ps in (compiled_params, plain_params))
    step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    for k, max_norm in enumerate((1.0, 0.5, 0.25), 1):
        for optimizer, params, do in ((compiled, compiled_params, step), (plain, plain_params, plain.step)):
            optimizer.param_groups[0]["max_grad_norm"] = max_norm
            give_grads(params, k)
            do()
    for a, b in zip(compiled_params, plain_params, strict=True):
        assert_same_bits(a, b)


class Norm(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OPS["grad_norm"].overload([x], max_norm=1.0)


class Step(torch.nn.Module):
    def forward(self, p: Tensor, g: Tensor, m: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        p, m = p.clone(), m.clone()
        OPS["lion_step_"].overload([p], [g], [m], [], lr, beta1=0.9, beta2=0.99, weight_decay=0.0)
        return p, m


@each_device
def test_ops_export(device: str) -> None:
    x = normal((5, 7), 1, device=device)
    dynamic = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    norm = torch.export.export(Norm(), (x,), dynamic_shapes=dynamic)
    for rows in (5, 9):
        y = normal((rows, 7), 2, device=device)
        torch.testing.assert_close(norm.module()(y), Norm()(y))
    inputs = (
        normal((8,), 1, device=device),
        normal((8,), 2, device=device),
        torch.zeros(8, device=device),
        torch.tensor(1e-2),
    )
    step = torch.export.export(Step(), inputs)
    for a, b in zip(step.module()(*inputs), Step()(*inputs), strict=True):
        assert_same_bits(a, b)


@one_case_a_rule
def test_vmap_is_refused_clearly(case: Case) -> None:
    """Per-example states make no step: a batching rule would have to invent a meaning."""
    _, args = arguments(case, "cpu")
    lists, lr = args[:-1], args[-1]
    batched = [[t.unsqueeze(0).repeat(2, *[1] * t.dim()) for t in values] for values in lists]

    def step(lists: list[list[Tensor]]) -> None:
        rule_of(case).overload(*lists, lr, **hyper_of(case, torch.float32))

    before = [t.clone() for values in batched for t in values]
    with pytest.raises(RuntimeError, match=f"[Bb]atching rule not implemented for singlepass::{rule_of(case).name}"):
        torch.vmap(step)(batched)
    for t, old in zip((t for values in batched for t in values), before, strict=True):
        assert torch.equal(t, old)


@each_case
def test_fakes_change_nothing(case: Case) -> None:
    tensors, args = arguments(case, "cpu")
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [[mode.from_tensor(t) for t in values] for values in args[:-1]]
        assert rule_of(case).overload(*fakes, mode.from_tensor(args[-1]), **hyper_of(case, torch.float32)) is None
        norm = OPS["grad_norm"].overload(fakes[1])
        assert (norm.shape, norm.dtype, norm.device.type) == ((3,), torch.float32, "cpu")
    assert torch.equal(tensors.steps[0], torch.zeros(()))
