# SPDX-License-Identifier: Apache-2.0
"""Groups that are edited between steps: each parameter trains as one that is alone in an optimizer would."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from singlepass import optim, spectral
from singlepass.optim import _caller
from singlepass.optim._base import FusedOptimizer

from ..tolerances import assert_same_bits
from .trajectory import make_params

SHAPES = [(5, 7), (8,), (2, 3, 4, 4), (3, 3)]
OPTIONS: dict[str, dict[str, Any]] = {"Adan": {"max_grad_norm": 0.0}, "LAMB": {"max_grad_norm": 0.0}}

NAMES = [*optim._OPTIMIZERS, "SST"]
each_optimizer = pytest.mark.parametrize("name", NAMES)


def make(name: str, groups: list[dict[str, Any]], **more: Any) -> FusedOptimizer:
    """An optimizer with these groups at its end. SST has its layer's before them, which never get gradients here."""
    options = {"lr": 1e-2, "weight_decay": 0.1} | OPTIONS.get(name, {}) | more
    if name != "SST":
        return getattr(optim, name)(groups, **options)
    layer = spectral.SSTLinear.from_linear(torch.nn.Linear(4, 4), 2)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = spectral.SST([{"params": trained}, *groups], steps_per_iteration=1000, **options)
    optimizer.kept_alive = layer  # layers are found by weak references
    return optimizer


def gradient(p: Tensor, key: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + key)
    return torch.randn(p.shape, generator=generator).to(p.dtype).as_strided(p.shape, p.stride())


class Alone:
    """Each parameter's twin in an optimizer of its own, stepped when the parameter should be."""

    def __init__(self, name: str, params: list[Parameter]) -> None:
        self.params = params
        self.twins = [Parameter(p.detach().clone()) for p in params]
        self.optimizers = [make(name, [{"params": [twin]}]) for twin in self.twins]

    def step(self, optimizer: FusedOptimizer, members: set[int], step: int, do: Callable[[], Any]) -> None:
        """One step by ``do``, in which the optimizer should move these parameters, by their numbers, and no others."""
        for key, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            p.grad, twin.grad = gradient(p, key, step), gradient(twin, key, step)
        do()
        for key in members:
            self.optimizers[key].step()
        for key, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            assert_same_bits(p, twin, f"parameter {key} after step {step}")


def groups_of(optimizer: FusedOptimizer) -> list[dict[str, Any]]:
    """The groups without those of SST's layers."""
    return optimizer.param_groups[isinstance(optimizer, spectral.SST) :]


def replace(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    groups_of(optimizer)[0]["params"] = [params[2]]
    return {1, 2}


def rebind(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    groups_of(optimizer)[0]["params"][0] = params[3]
    return {1, 3}


def append(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    groups_of(optimizer)[0]["params"].append(params[3])
    return {0, 1, 3}


def pop(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    groups_of(optimizer)[1]["params"].append(params[2])
    groups_of(optimizer)[1]["params"].pop(0)
    return {0, 2}


def exchange(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    first, second = groups_of(optimizer)
    first["params"], second["params"] = second["params"], first["params"]
    return {0, 1}


def reorder(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    optimizer.param_groups.reverse()
    return {0, 1}


def delete(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    optimizer.param_groups.remove(groups_of(optimizer)[0])
    return {1}


def rebuild(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    kept = optimizer.param_groups[: -len(groups_of(optimizer))]
    optimizer.param_groups = kept + [{**group, "params": [params[2], params[0]]} for group in groups_of(optimizer)[:1]]
    return {0, 2}


def add(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    optimizer.add_param_group({"params": [params[2], params[3]]})
    return {0, 1, 2, 3}


def another_backend(optimizer: FusedOptimizer, params: list[Parameter]) -> set[int]:
    for group in groups_of(optimizer):
        group["backend"] = "native" if group["backend"] is None else None
    return {0, 1}


EDITS = [replace, rebind, append, pop, exchange, reorder, delete, rebuild, add, another_backend]
each_edit = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)


@each_edit
@each_optimizer
def test_groups_edited_after_the_first_step(name: str, edit: Any) -> None:
    params = make_params(SHAPES)
    optimizer = make(name, [{"params": [params[0]]}, {"params": [params[1]]}])
    alone = Alone(name, params)
    for step in (1, 2):
        alone.step(optimizer, {0, 1}, step, optimizer.step)
    members = edit(optimizer, params)
    for step in (3, 4):
        alone.step(optimizer, members, step, optimizer.step)


@pytest.mark.slow("torch.compile")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("name", "edit"), [("AdamW", replace), ("SGDSaI", append), ("LAMB", delete)])
def test_groups_edited_after_compiled_steps(name: str, edit: Any) -> None:
    params = make_params(SHAPES)
    optimizer = make(name, [{"params": [params[0]]}, {"params": [params[1]]}])
    step_ = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    alone = Alone(name, params)
    for step in (1, 2):
        alone.step(optimizer, {0, 1}, step, step_)
    members = edit(optimizer, params)
    for step in (3, 4):
        alone.step(optimizer, members, step, step_)


@each_optimizer
def test_parameters_swapped_around_each_step(name: str) -> None:
    """As DeepSpeed's ZeRO does with its partitions: the same lists at different times."""
    params = make_params(SHAPES)
    optimizer = make(name, [{"params": [params[0]]}])
    alone = Alone(name, params)
    (group,) = groups_of(optimizer)
    for step, members in enumerate(([0], [1, 2], [], [0, 3], [3, 0], [1, 2], [0]), 1):
        whole = group["params"]
        group["params"] = [params[key] for key in members]
        alone.step(optimizer, set(members), step, optimizer.step)
        group["params"] = whole


@each_optimizer
def test_states_handed_to_another_parameter(name: str) -> None:
    a, b, b_twin = (Parameter(torch.full((3,), value)) for value in (0.5, 5.0, 0.5))
    optimizer, twin = make(name, [{"params": [a]}]), make(name, [{"params": [b_twin]}])
    a.grad, b_twin.grad = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, 2.0, -1.0])
    optimizer.step()
    twin.step()
    b_twin.data.copy_(b)
    before = a.detach().clone()
    optimizer.state[b] = optimizer.state.pop(a)
    groups_of(optimizer)[0]["params"] = [b]
    b.grad, b_twin.grad = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])
    optimizer.step()
    twin.step()
    assert_same_bits(a, before)
    assert_same_bits(b, b_twin)


@each_optimizer
def test_memory_dtype_and_layout_of_a_parameter_may_change(name: str) -> None:
    """What ``model.to(...)`` does: the same parameters, on other memory."""
    params = make_params([(2, 3, 4, 4), (2, 5)])
    optimizer = make(name, [{"params": params}])
    alone = Alone(name, params)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: t.mT.contiguous().mT,
        lambda t: t.to(torch.bfloat16),
        lambda t: t.to(torch.float64),
        lambda t: t.contiguous(),
    ]
    for step, change in enumerate(changes, 1):
        for p in (*params, *alone.twins):
            p.grad = None
            p.data = change(p.data)
        kept = {id(p): [v.clone() for v in optimizer.state.get(p, {}).values()] for p in params}
        alone.step(optimizer, {0, 1}, step, optimizer.step)
        for p in params:
            assert len(kept[id(p)]) in (0, len(optimizer.state[p]))
            for value in optimizer.state[p].values():
                assert value.dim() == 0 or value.stride() == torch.empty_like(p).stride()


@pytest.mark.parametrize("guards", [True, False], ids=["guards", "python"])
def test_what_makes_tensors_alike(guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own guards, and by what takes their place where a release has none."""
    assert _caller.TensorGuards is not None, "this torch has them under another name: look for it"
    if not guards:
        monkeypatch.setattr(_caller, "TensorGuards", None)

    def tensors() -> list[Tensor]:
        return [Parameter(torch.zeros(4, 6)), Parameter(torch.zeros(6, 6)), Parameter(torch.zeros(3))]

    check = _caller.alike(tensors())
    with torch.no_grad():
        assert check(tensors())
        others: list[Tensor] = [
            torch.zeros(4, 6),
            Parameter(torch.zeros(4, 6, dtype=torch.bfloat16)),
            Parameter(torch.zeros(4, 6, device="meta")),
            Parameter(torch.zeros(6, 4).mT),
            Parameter(torch.zeros(4, 12)[:, ::2]),
            Parameter(torch.zeros(6, 4)),
            Parameter(TwoTensor(torch.zeros(4, 6), torch.zeros(4, 6))),
        ]
        for other in others:
            assert not check([other, *tensors()[1:]])
        moved = tensors()
        moved[1].data = torch.arange(36.0).view(6, 6).mT
        assert not check(moved)
        wrapped = [Parameter(TwoTensor(torch.zeros(4), torch.zeros(4))) for _ in range(2)]
        assert _caller.alike(wrapped[:1])(wrapped[1:])


@each_optimizer
def test_options_that_need_more_states_may_be_set_later(name: str) -> None:
    params = make_params([(8,)], (torch.bfloat16,))
    optimizer = make(name, [{"params": params}])
    params[0].grad = gradient(params[0], 0, 1)
    optimizer.step()
    (group,) = groups_of(optimizer)
    group["stochastic_rounding"] = name != "SST"  # whose vectors have no such rounding
    if "amsgrad" in group:
        group["amsgrad"] = True
    optimizer.step()
    states = optimizer.state[params[0]]
    assert "step" in states
    assert ("max_exp_avg_sq" in states) == (name in ("AdamW", "SST"))


@each_optimizer
@pytest.mark.parametrize("clipped", [False, True], ids=["", "scaled"])
def test_no_gradient_outlives_its_step(name: str, clipped: bool) -> None:
    params = make_params(SHAPES)
    optimizer = make(name, [{"params": params}])
    for step in (1, 2, 3):
        grads = [gradient(p, key, step) for key, p in enumerate(params)]
        references = [weakref.ref(g) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if clipped:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del grads, g
        assert [r() for r in references] == [None] * len(params)


@each_optimizer
def test_removed_parameters_and_optimizers_are_freed(name: str) -> None:
    p, q = make_params(SHAPES[:2])
    optimizer = make(name, [{"params": [p, q]}])
    for key, t in enumerate((p, q)):
        t.grad = gradient(t, key, 1)
    optimizer.step()
    gone, whole = weakref.ref(p), weakref.ref(optimizer)
    groups_of(optimizer)[0]["params"].pop(0)
    optimizer.state.pop(p)
    gc.collect()
    gc.disable()
    try:
        del p, t
        assert gone() is None
        del optimizer
        assert whole() is None
    finally:
        gc.enable()
