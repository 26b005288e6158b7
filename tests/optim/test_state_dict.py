# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: states come back with their dtypes, bit for bit, and training goes on as if never interrupted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from singlepass import optim

from ..simt.truth import Case
from ..tolerances import assert_same_bits
from .steps import Place, each_case, each_place
from .trajectory import contents, give_grads, make_optimizer, make_params, train

SHAPES = [(5, 7), (), (2, 3, 4, 4)]

KINDS = {
    "float32": {"dtypes": (torch.float32,)},
    "bfloat16-float32-states": {"dtypes": (torch.bfloat16,)},
    "bfloat16-bfloat16-states": {"dtypes": (torch.bfloat16,), "state_dtype": "param"},
    "float16-bfloat16-states": {"dtypes": (torch.float16,), "state_dtype": torch.bfloat16},
    "float64": {"dtypes": (torch.float64,)},
    "mixed": {"dtypes": (torch.float32, torch.bfloat16, torch.float16)},
}


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights_only, as torch does by default


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "as-it-is": lambda state: state,
    "torch-save": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


def fresh(case: Case, kind: str = "float32", device: str = "cpu", **options: Any):
    arguments = dict(KINDS[kind])
    params = make_params(SHAPES, arguments.pop("dtypes"), device)
    return make_optimizer(case, params, **arguments, **options)


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    contents_a, contents_b = contents(a), contents(b)
    assert contents_a.keys() == contents_b.keys()
    for name, value in contents_a.items():
        assert_same_bits(value, contents_b[name], name)


def continued(source: torch.optim.Optimizer, target: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads, copies the parameters as a model's checkpoint would, and checks that both go on alike."""
    target.load_state_dict(state)
    pairs = zip(source.param_groups, target.param_groups, strict=True)
    with torch.no_grad():
        for p, q in ((p, q) for a, b in pairs for p, q in zip(a["params"], b["params"], strict=True)):
            q.copy_(p)
    assert_same(source, target)
    for optimizer in (source, target):
        train(optimizer, range(4, 7))
    assert_same(source, target)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@each_case
def test_training_continues_bit_for_bit(case: Case, kind: str, way: str) -> None:
    source = fresh(case, kind)
    train(source, 3)
    continued(source, fresh(case, kind), WAYS[way](source.state_dict()))


@pytest.mark.gpu
@each_case
def test_a_checkpoint_moves_between_devices(case: Case) -> None:
    source, target = fresh(case, "mixed", "cuda"), fresh(case, "mixed", "cpu")
    train(source, 3)
    target.load_state_dict(source.state_dict())
    again = fresh(case, "mixed", "cuda")
    continued(source, again, target.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@each_case
def test_whole_optimizers_can_be_copied(case: Case, copier: Callable[[Any], Any]) -> None:
    source = fresh(case, "mixed")
    train(source, 3)
    twin = copier(source)
    for p in (p for group in twin.param_groups for p in group["params"]):
        p.grad_dtype = p.dtype
    for optimizer in (source, twin):
        train(optimizer, range(4, 7))
    assert_same(source, twin)


@each_case
def test_states_are_copied_into_the_layout_of_their_parameters(case: Case) -> None:
    source, target = fresh(case), fresh(case)
    train(source, 3)
    (group,) = target.param_groups
    group["params"][2].data = group["params"][2].data.to(memory_format=torch.channels_last)
    continued(source, target, source.state_dict())
    assert target.param_groups[0]["params"][2].is_contiguous(memory_format=torch.channels_last)


@each_case
def test_what_was_loaded_stays_as_it_is(case: Case) -> None:
    source = fresh(case)
    train(source, 3)
    state = copy.deepcopy(source.state_dict())
    target = fresh(case)
    target.load_state_dict(source.state_dict())
    train(target, 3)
    for key, values in source.state_dict()["state"].items():
        for name, value in values.items():
            assert_same_bits(value, state["state"][key][name], name)


@each_case
def test_states_of_some_parameters_alone(case: Case) -> None:
    source = fresh(case)
    params = source.param_groups[0]["params"]
    for step in range(1, 4):
        give_grads(params, step)
        params[1].grad = None
        source.step()
    state = source.state_dict()
    assert sorted(state["state"]) == [0, 2]
    continued(source, fresh(case), state)


@each_case
def test_a_state_saved_before_the_first_step(case: Case) -> None:
    continued(fresh(case), fresh(case), fresh(case).state_dict())


@each_case
def test_hyperparameters_are_loaded(case: Case) -> None:
    source, target = fresh(case), fresh(case)
    source.param_groups[0]["lr"] = 0.5
    source.param_groups[0]["weight_decay"] = 0.25
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["lr"] == 0.5
    assert target.param_groups[0]["weight_decay"] == 0.25


def test_where_and_how_to_run_is_not_loaded() -> None:
    """A checkpoint is resumed on other machines than the one that wrote it."""
    source = optim.AdamW(make_params(SHAPES), lr=0.5, backend="eager")
    train(source, 1)
    target = optim.AdamW(make_params(SHAPES), backend="native", capturable=True)
    (group,) = target.param_groups
    lr = group["lr"]
    target.load_state_dict(source.state_dict())
    (group,) = target.param_groups
    assert group["backend"] == "native"
    assert group["capturable"]
    assert group["lr"] is lr, "a captured graph reads this tensor"
    assert lr.item() == 0.5


def drop_group(state: dict[str, Any]) -> None:
    state["param_groups"].append(dict(state["param_groups"][0], params=[]))


def drop_parameter(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def drop_state(state: dict[str, Any]) -> None:
    values = state["state"][2]
    del values[next(name for name in values if name != "step")]


def reshape_state(state: dict[str, Any]) -> None:
    values = state["state"][2]
    name = next(name for name in values if name != "step")
    values[name] = values[name].reshape(-1)


@pytest.mark.parametrize("damage", [drop_group, drop_parameter, drop_state, reshape_state])
@each_case
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case: Case, damage: Callable[[Any], None]) -> None:
    source, target = fresh(case), fresh(case)
    train(source, 3)
    train(target, 1)
    state = copy.deepcopy(source.state_dict())
    state["param_groups"][0]["lr"] = 123.0
    damage(state)
    before, groups = contents(target), copy.deepcopy([{**g, "params": None} for g in target.param_groups])
    with pytest.raises(ValueError, match=r"expected|loaded state dict"):
        target.load_state_dict(state)
    after = contents(target)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_same_bits(after[name], value, name)
    assert [{**g, "params": None} for g in target.param_groups] == groups


@pytest.mark.parametrize(
    ("source", "target", "foreign"),
    [
        (torch.optim.AdamW, optim.Lion, "exp_avg_sq"),
        (torch.optim.NAdam, optim.Lion, "exp_avg_sq"),
        (optim.Adan, optim.AdamW, "exp_avg_diff, neg_pre_grad"),
        (optim.DiffGrad, optim.LAMB, "previous_grad"),
        (optim.SGDSaI, optim.LARS, "gsnr"),
        (partial(torch.optim.SGD, momentum=0.9), optim.AdamW, "momentum_buffer"),
    ],
)
def test_states_of_another_optimizer_are_refused(source: Any, target: Any, foreign: str) -> None:
    params = make_params(SHAPES)
    other, ours = source(params, lr=1e-3), target(params, lr=0.5)
    give_grads(params, 1)
    other.step()
    with pytest.raises(ValueError, match=rf"expected states .*; got {foreign}\. Load it into the optimizer that"):
        ours.load_state_dict(other.state_dict())
    assert len(ours.state) == 0
    assert ours.param_groups[0]["lr"] == 0.5


@each_place
@pytest.mark.parametrize("capturable", [False, True])
def test_schedulers_resume(capturable: bool, place: Place) -> None:
    def start():
        params = make_params(SHAPES, device=place.device)
        optimizer = optim.AdamW(params, lr=1e-2, capturable=capturable, backend=place.backend)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def advance(optimizer, scheduler, steps: range) -> None:
        for step in steps:
            train(optimizer, range(step, step + 1))
            scheduler.step()

    source, schedule = start()
    advance(source, schedule, range(1, 4))
    target, resumed = start()
    target.load_state_dict(source.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    with torch.no_grad():
        for p, q in zip(source.param_groups[0]["params"], target.param_groups[0]["params"], strict=True):
            q.copy_(p)
    for optimizer, scheduler in ((source, schedule), (target, resumed)):
        advance(optimizer, scheduler, range(4, 7))
    assert_same(source, target)
