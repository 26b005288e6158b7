# SPDX-License-Identifier: Apache-2.0
"""Loading is torch's: hooks, what others keep, checked hyperparameters and states, shared learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from singlepass import optim

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .steps import each_case
from .test_state_dict import SHAPES, fresh, through_file
from .trajectory import contents, give_grads, make_params, train

ADAMW = next(case for case in CASES if case.id == "adamw")


@each_case
def test_hooks_see_and_change_what_is_loaded(case: Case) -> None:
    """The hooks before see the saved states and may return others; those after see the optimizer as it is now."""
    source, target = fresh(case, "bfloat16-float32-states"), fresh(case, "bfloat16-float32-states")
    train(source, 2)
    name = target.rule.states[0]
    calls = []

    def halve(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        states = {key: {**value, name: 0.5 * value[name]} for key, value in state_dict["state"].items()}
        groups = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]
        return {**state_dict, "state": states, "param_groups": groups}

    def negate(optimizer: torch.optim.Optimizer) -> None:
        calls.append("after")
        for p in optimizer.param_groups[0]["params"]:
            state = optimizer.state[p]
            assert state[name].dtype == torch.float32, "not cast to the parameter's dtype"
            state[name] = -state[name]
            state["seen"] = True
        optimizer.param_groups[0]["weight_decay"] = 0.125

    target.register_load_state_dict_pre_hook(halve)
    target.register_load_state_dict_post_hook(negate)
    target.load_state_dict(source.state_dict())
    assert calls == ["before", "after"]
    (group,) = target.param_groups
    assert group["lr"] == 0.25
    assert group["weight_decay"] == 0.125
    for p, q in zip(source.param_groups[0]["params"], group["params"], strict=True):
        assert_same_bits(target.state[q][name], -0.5 * source.state[p][name])
        assert target.state[q]["seen"]
    train(target, range(3, 4))
    target.load_state_dict(source.state_dict())  # the hooks of the first call are gone, those of its user are not
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("others", [0, 1])
def test_hooks_may_remove_themselves(when: str, others: int) -> None:
    source, target = fresh(ADAMW), fresh(ADAMW)
    train(source, 1)
    calls: list[str] = []

    def once(*_: Any) -> None:
        calls.append("once")
        handle.remove()

    handle = register(target, when, once)
    for _ in range(others):
        register(target, when, lambda *_: calls.append("always"))
    for _ in range(2):
        target.load_state_dict(source.state_dict())
    assert calls == ["once", *(["always"] * 2 * others)]
    assert_same_states(source, target)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_may_load_themselves(when: str) -> None:
    source, other, target = fresh(ADAMW), fresh(ADAMW), fresh(ADAMW)
    train(source, 1)
    train(other, 3)
    depth = []

    def load(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not depth:
            depth.append(1)
            optimizer.load_state_dict(other.state_dict())

    register(target, when, load)
    target.load_state_dict(source.state_dict())
    assert_same_states(source if when == "before" else other, target)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_raises(when: str) -> None:
    """Before, nothing is changed; after, everything is loaded. Either way later loads are as ever."""
    source, target = fresh(ADAMW), fresh(ADAMW)
    train(source, 2)

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    handle = register(target, when, fail)
    with pytest.raises(KeyError, match="mine"):
        target.load_state_dict(source.state_dict())
    assert len(target.state) == (0 if when == "before" else len(SHAPES))
    handle.remove()
    target.load_state_dict(source.state_dict())
    assert_same_states(source, target)


def register(optimizer: torch.optim.Optimizer, when: str, hook: Callable[..., Any]) -> Any:
    return getattr(optimizer, f"register_load_state_dict_{'pre' if when == 'before' else 'post'}_hook")(hook)


def assert_same_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert_same_bits(value, b.state[q][name], name)


def test_states_of_dtypes_that_no_kernel_takes() -> None:
    """Of a model that was float64 then, or of float8: they become float32."""
    source, target = fresh(ADAMW, "float64"), fresh(ADAMW)
    train(source, 2)
    state = source.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].to(torch.float8_e4m3fn)
    target.load_state_dict(state)
    for p in target.param_groups[0]["params"]:
        assert target.state[p]["exp_avg"].dtype == target.state[p]["exp_avg_sq"].dtype == torch.float32
    train(target, range(3, 4))


def test_states_of_plain_lists() -> None:
    source, target = fresh(ADAMW), fresh(ADAMW)
    train(source, 2)
    state = source.state_dict()
    listed = {key: {name: value.tolist() for name, value in values.items()} for key, values in state["state"].items()}
    target.load_state_dict({**state, "state": listed})
    assert_same_states(source, target)
    zeros = {"step": 1, "exp_avg": [[0] * 7] * 5, "exp_avg_sq": [[0] * 7] * 5}
    target.load_state_dict({**state, "state": {**state["state"], 0: zeros}})
    assert target.state[target.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("exp_avg", torch.zeros(5, 7, dtype=torch.int64), "exp_avg as a dense floating-point tensor"),
        ("exp_avg", torch.zeros(5, 7, dtype=torch.bool), "exp_avg as a dense floating-point tensor"),
        ("exp_avg", torch.zeros(5, 7, dtype=torch.complex64), "exp_avg as a dense floating-point tensor"),
        ("exp_avg", torch.zeros(5, 7).to_sparse(), "exp_avg as a dense floating-point tensor"),
        ("exp_avg", None, "no exp_avg"),
        ("step", None, "step as one number"),
        ("step", "x", "step as one number"),
        ("step", torch.ones(2), "step as one number"),
        ("step", -1, "step of 0 or more"),
        ("step", float("nan"), "step of 0 or more"),
    ],
)
def test_states_that_are_none(name: str, value: Any, match: str) -> None:
    source, target = fresh(ADAMW), fresh(ADAMW)
    train(source, 1)
    state = source.state_dict()
    state["state"][0] = {**state["state"][0], name: value}
    with pytest.raises(ValueError, match=match):
        target.load_state_dict(state)
    assert len(target.state) == 0


@pytest.mark.parametrize("name", ["Lion", "LARS"])
def test_a_count_that_rounding_needed_is_kept(name: str) -> None:
    params, others = make_params(SHAPES, (torch.bfloat16,)), make_params(SHAPES, (torch.bfloat16,))
    source = getattr(optim, name)(params, lr=1e-3, stochastic_rounding=True)
    train(source, 2)
    source.param_groups[0]["stochastic_rounding"] = False
    target = getattr(optim, name)(others, lr=1e-3)
    target.load_state_dict(source.state_dict())
    assert all(target.state[p]["step"].item() == 2.0 for p in others)


@each_case
def test_what_others_keep_in_states_and_groups_is_loaded(case: Case) -> None:
    """As torch loads it: timm's Lookahead keeps a slow copy of each parameter in its state."""
    source, target = fresh(case), fresh(case)
    train(source, 2)
    for i, p in enumerate(source.param_groups[0]["params"]):
        source.state[p]["slow"] = torch.full_like(p, float(i), dtype=torch.float64)
        source.state[p]["note"] = {"count": i, "values": [torch.ones(())]}
    source.param_groups[0]["scale_lr"] = 0.5
    target.param_groups[0]["here"] = here = object()
    target.load_state_dict(through_file(source.state_dict()))
    (group,) = target.param_groups
    assert group["scale_lr"] == 0.5
    assert group["here"] is here
    for i, p in enumerate(group["params"]):
        state = target.state[p]
        assert_same_bits(state["slow"], torch.full_like(p, float(i)))
        assert state["note"]["count"] == i
        for name, value in source.state[source.param_groups[0]["params"][i]].items():
            if name in (*source.rule.lists, "step"):
                assert_same_bits(state[name], value)


@each_case
def test_a_state_that_has_nothing_of_the_rule_yet(case: Case) -> None:
    source, target, plain = fresh(case), fresh(case), fresh(case)
    for p in source.param_groups[0]["params"]:
        source.state[p]["slow"] = p.detach().clone()
    target.load_state_dict(source.state_dict())
    for optimizer in (target, plain):
        train(optimizer, 3)
    for p, q in zip(target.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert_same_bits(p, q)
        assert set(target.state[p]) == {*plain.state[q], "slow"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"betas": (0.9, 0.99, 0.999)}, "betas as a tuple of 2"),
        ({"lr": -1.0}, "lr in"),
        ({"lr": None}, "lr in"),
        ({"lr": torch.ones(2)}, "lr as a number or a tensor of one element"),
        ({"eps": "1e-8"}, "eps in"),
        ({"amsgrad": None}, "amsgrad True or False"),
        ({"state_dtype": "fp8"}, "state_dtype"),
        ({"decoupled_weight_decay": False, "weight_decay": 0.1}, r"torch\.optim\.Adam"),
    ],
)
def test_saved_hyperparameters_are_checked(change: dict[str, Any], match: str) -> None:
    source, target = fresh(ADAMW), fresh(ADAMW)
    train(target, 1)
    before, groups = contents(target), [{**group} for group in target.param_groups]
    state = source.state_dict()
    state["param_groups"][0] |= change
    with pytest.raises(ValueError, match=match):
        target.load_state_dict(state)
    for name, value in contents(target).items():
        assert_same_bits(value, before[name], name)
    assert target.param_groups == groups


@pytest.mark.parametrize(("source", "target"), [(optim.AdamW, optim.Adan), (torch.optim.AdamW, optim.Adan)])
def test_a_new_optimizer_of_another_rule_is_refused_too(source: Any, target: Any) -> None:
    """It has no states by which to tell."""
    params = make_params(SHAPES)
    optimizer = target(params)
    with pytest.raises(ValueError, match=r"betas as a tuple of 3; got \(0\.9, 0\.999\)"):
        optimizer.load_state_dict(source(params).state_dict())
    give_grads(params, 1)
    optimizer.step()


def test_adam_without_weight_decay_loads_into_adamw() -> None:
    params = make_params(SHAPES)
    theirs, ours = torch.optim.Adam(params, lr=0.5), optim.AdamW(params)
    give_grads(params, 1)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
    assert ours.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("saved", "shared"),
    [((0.5, 0.5, 0.5), (0, 0, 0)), ((0.5, 0.25, 0.5), (0, 1, 0)), ((0.5, 0.25, 0.25), (0, 1, 2))],
    ids=str,
)
def test_groups_that_share_a_tensor_of_a_learning_rate(
    saved: tuple[float, ...], shared: tuple[int, ...], capturable: bool
) -> None:
    """It stays shared by the groups whose saved rates agree with the first one's; each other gets its own."""
    source = optim.AdamW([{"params": [p], "lr": rate} for p, rate in zip(make_params([(2,)] * 3), saved, strict=True)])
    rate = torch.tensor(0.125)
    target = optim.AdamW([{"params": [p]} for p in make_params([(2,)] * 3)], lr=rate, capturable=capturable)
    target.load_state_dict(source.state_dict())
    rates = [group["lr"] for group in target.param_groups]
    assert [r.item() for r in rates] == list(saved)
    assert rates[0] is rate, "a captured graph reads this tensor"
    for i, r in enumerate(rates):
        assert r.dtype == torch.float32
        assert [r is other for other in rates] == [shared[j] == shared[i] for j in range(3)]
