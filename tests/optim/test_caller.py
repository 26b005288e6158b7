# SPDX-License-Identifier: Apache-2.0
"""Native steps by addresses: the bits of steps by tensors, whatever is changed between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from singlepass._ops.optim import StepOp, adamw
from singlepass.optim import AdamW, _caller
from singlepass.optim._base import FusedOptimizer

from ..simt.ops import in_place_of_native
from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .steps import each_case
from .trajectory import contents, give_grads, make_optimizer, make_params

SHAPES = [(5, 7), (), (0, 3), (2, 3, 4, 4), (1000,), (40, 1, 900)]
MIX = (torch.float32, torch.bfloat16, torch.float16)


HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}


@contextmanager
def counted() -> Iterator[list[StepOp]]:
    """The steps that are made by addresses within."""
    steps: list[StepOp] = []
    find = StepOp.at

    def at(op: StepOp) -> Callable[..., None]:
        steps.append(op)
        return find(op)

    with mock.patch.object(StepOp, "at", at):
        yield steps


def by_tensors() -> Any:
    """No step is made by addresses within."""
    return mock.patch.object(_caller, "_is_plain", return_value=False)


def permuted(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().movedim(0, -1).contiguous().movedim(-1, 0)) if p.dim() > 1 else p for p in params]


def trained(case: Case, steps: int, **options: Any) -> FusedOptimizer:
    params = permuted(make_params(SHAPES, MIX))
    optimizer = make_optimizer(case, params, **options)
    for step in range(1, steps + 1):
        for p in params:
            p.grad = None
        give_grads(params, step)
        for p in params:
            p.grad = p.grad.as_strided(p.shape, p.stride())
        optimizer.step()
    return optimizer


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rounded": {"stochastic_rounding": True},
    "states as parameters": {"state_dtype": "param", "maximize": True},
}


@pytest.mark.parametrize("reader", [True, False], ids=["by objects", "by addresses"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_case
def test_all_steps_but_the_first_pass_addresses(
    case: Case, options: dict[str, Any], reader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _caller._READER != 0, "this torch has the function under another name: look for it"
    if not reader:
        monkeypatch.setattr(_caller, "_READER", 0)
    with counted() as steps:
        ours = trained(case, 4, **options)
    assert len(steps) == 3
    with by_tensors(), counted() as steps:
        theirs = trained(case, 4, **options)
    assert not steps
    for (name, a), b in zip(contents(ours).items(), contents(theirs).values(), strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("case", [case for case in CASES if not case.label], ids=lambda case: case.id)
def test_on_gpus_too(case: Case) -> None:
    with in_place_of_native():
        with counted() as steps:
            ours = trained(case, 3, stochastic_rounding=True)
        with by_tensors():
            theirs = trained(case, 3, stochastic_rounding=True)
    assert len(steps) == 2
    for (name, a), b in zip(contents(ours).items(), contents(theirs).values(), strict=True):
        assert_same_bits(a, b, name)


def each_state(change: Callable[[Tensor], Tensor]) -> Callable[[FusedOptimizer, list[Parameter]], None]:
    """Replaces all states that have elements as their parameters by what ``change`` makes of them."""

    def apply(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
        for p in params:
            for name in optimizer._state_names(optimizer.param_groups[0]):
                optimizer.state[p][name] = change(optimizer.state[p][name])

    return apply


def each_data(change: Callable[[Tensor], Tensor]) -> Callable[[FusedOptimizer, list[Parameter]], None]:
    """The same tensors, on other memory."""

    def apply(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
        for t in [*params, *(value for p in params for value in optimizer.state[p].values())]:
            t.data = change(t.detach())

    return apply


def exchanged(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    """Two parameters exchange their states, and two others their memory."""
    a, b, c, d = params[:4]
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]
    c.data, d.data = d.data, c.data


def in_another_order(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    """States, which then no longer have the order of the parameters."""
    states = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update(reversed(states))


def counts_replaced(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    for p in params:
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"] = torch.tensor(7.0)


def rounded(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["stochastic_rounding"] = True


def grads_in_another_order(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    for p in params:
        p.grad = p.grad.mT.contiguous().mT


def grads_of_another_dtype(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    for p in params:
        p.grad_dtype = None
        p.grad = p.grad.to(torch.bfloat16)


def grads_without_memory_of_their_own(optimizer: FusedOptimizer, params: list[Parameter]) -> None:
    for p in params:
        p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)


CHANGES: dict[str, Callable[[FusedOptimizer, list[Parameter]], None]] = {
    "states replaced": each_state(torch.clone),
    "states in bfloat16": each_state(lambda t: t.to(torch.bfloat16)),
    "memory replaced": each_data(torch.clone),
    "memory doubled": each_data(lambda t: torch.stack((t, t))[1]),
    **{
        change.__name__: change
        for change in (
            exchanged,
            in_another_order,
            counts_replaced,
            rounded,
            grads_in_another_order,
            grads_of_another_dtype,
            grads_without_memory_of_their_own,
        )
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@each_case
def test_what_changes_between_steps_is_seen(case: Case, change: Callable[..., None]) -> None:
    def run() -> FusedOptimizer:
        params = make_params([(6, 6), (6, 6), (6, 6), (6, 6), (3, 800)], (torch.float32, torch.bfloat16))
        params[2].data, params[3].data = params[2].data.float(), params[3].data.float()
        optimizer = make_optimizer(case, params)
        for step in (1, 2, 3, 4, 5):
            give_grads(params, step)
            if step == 3:
                change(optimizer, params)
            optimizer.step()
            for p in params:
                p.grad, p.grad_dtype = None, p.dtype
        return optimizer

    with counted() as steps:
        ours = run()
    assert steps, "so that there is something to see"
    with by_tensors():
        theirs = run()
    for (name, a), b in zip(contents(ours).items(), contents(theirs).values(), strict=True):
        assert_same_bits(a, b, name)


def test_what_is_refused_in_the_first_step_is_refused_in_any() -> None:
    params = make_params([(6, 6), (2,)])
    optimizer = AdamW(params)
    for step in (1, 2):
        give_grads(params, step)
        optimizer.step()
    before = contents(optimizer)
    optimizer.state[params[0]]["exp_avg"] = before["exp_avg 0"].T.contiguous().T
    with pytest.raises(RuntimeError, match="expected states of their parameters' shapes and strides"):
        optimizer.step()
    for (name, a), b in zip(contents(optimizer).items(), before.values(), strict=True):
        assert_same_bits(a, b, name)


def test_a_dispatch_mode_sees_the_tensors() -> None:
    """Such as one that traces a step, or counts what it does."""
    seen: list[Any] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    params = make_params([(3,)])
    optimizer = AdamW(params)
    for step in (1, 2):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 3)
    with Mode():
        optimizer.step()
    assert adamw.overload in seen
    assert adamw.at() not in seen


def test_parameters_of_other_classes_are_passed_as_tensors() -> None:
    class Kind(Parameter):
        pass

    params = [Kind(torch.ones(3))]
    optimizer = AdamW(params)
    with counted() as steps:
        for step in (1, 2, 3):
            give_grads(params, step)
            optimizer.step()
    assert not steps


@pytest.mark.parametrize("steps", [0, 2], ids=["tensors", "addresses"])
def test_memory_that_is_gone_is_an_error(steps: int) -> None:
    params = make_params([(4,), (5,)])
    optimizer = AdamW(params)
    for step in range(1, steps + 1):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 3)
    before = params[0].detach().clone()
    params[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="whose memory was freed"):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.parametrize(
    "layout",
    [
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(4, 1, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.int64).T,
    ],
    ids=["rows", "dtype", "dimensions", "strides"],
)
def test_layouts_that_do_not_fit_are_refused(layout: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"adamw_step_: expected a contiguous int64 layout of shape \(4, tensors\)"):
        adamw.at()(torch.ones(1), layout, torch.tensor(0.1), tensors=0, lists=6, **HYPER)


@pytest.mark.parametrize("lists", [4, 7])
def test_other_numbers_of_lists_are_refused(lists: int) -> None:
    layout = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"adamw_step_: expected 5 or 6 lists; got {lists}"):
        adamw.at()(torch.ones(1), layout, torch.tensor(0.1), tensors=0, lists=lists, **HYPER)
