# SPDX-License-Identifier: Apache-2.0
"""The optimizer's states and parameters: resuming, copies, groups, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from singlepass import spectral
from singlepass.optim import AdamW
from singlepass.spectral import SST

from ..tolerances import assert_same_bits, assert_within
from .backends import UNIT
from .training import SCHEDULE, give_gradients, layers_of, model_of, run, snapshot


@pytest.mark.parametrize("stop", [1, 4, 6, 12, 17])
@pytest.mark.parametrize("frozen_dtype", [None, torch.int8], ids=str)
def test_resumes_bit_for_bit(stop: int, frozen_dtype: torch.dtype | None) -> None:
    model = model_of(frozen_dtype=frozen_dtype)
    optimizer = SST(model, lr=1e-2, weight_decay=0.1, **SCHEDULE)
    run(model, optimizer, stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, 20 - stop, stop)
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 5))
    spectral.convert(other, 3, skip=["4"], frozen_dtype=frozen_dtype)
    again = SST(other, lr=1e-2, weight_decay=0.1, **SCHEDULE)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    run(other, again, 20 - stop, stop)
    assert again.progress == optimizer.progress
    for a, b in zip(snapshot(other), snapshot(model), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("load_first", [False, True])
def test_resumes_with_another_rank(load_first: bool) -> None:
    """A schedule has changed ranks since; loading gives the layers new parameters, which the optimizer takes over."""
    options = SCHEDULE | {"lr": 1e-2, "rank_schedule": lambda draw: 2 + draw}
    model = model_of()
    optimizer = SST(model, **options)
    run(model, optimizer, 9)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, 9, 9)
    other = model_of()
    if load_first:
        other.load_state_dict(saved[0])
    again = SST(other, **options)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(other, again, 9, 9)
    for a, b in zip(snapshot(other), snapshot(model), strict=True):
        assert_same_bits(a, b)


def test_loading_in_the_wrong_order_is_noticed() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    run(model, optimizer, 6)
    other = model_of()
    other.load_state_dict(model.state_dict())
    again = SST(other, lr=1e-2, **SCHEDULE)  # draws other vectors than the saved ones
    with pytest.raises(ValueError, match="SST: expected a model with the same active vectors"):
        again.load_state_dict(optimizer.state_dict())
    assert again.progress.draws == 1


def test_hooks_see_and_change_what_is_loaded() -> None:
    """A hook may put back what a framework that keeps only states and groups has left out."""
    model = model_of()
    optimizer = SST(model, lr=1e-2, weight_decay=0.1, **SCHEDULE)
    run(model, optimizer, 6)
    saved = optimizer.state_dict()
    other = model_of()
    again = SST(other, lr=1e-2, weight_decay=0.1, **SCHEDULE)
    other.load_state_dict(model.state_dict())
    stood = saved.pop("sst")
    again.register_load_state_dict_pre_hook(lambda _, state_dict: {**state_dict, "sst": stood})
    seen = []
    again.register_load_state_dict_post_hook(lambda o: seen.append(o.progress.as_dict()))
    again.load_state_dict(saved)
    assert seen == [optimizer.progress.as_dict()]
    run(model, optimizer, 4, 6)
    run(other, again, 4, 6)
    assert again.progress == optimizer.progress
    for a, b in zip(snapshot(other), snapshot(model), strict=True):
        assert_same_bits(a, b)


def test_what_others_keep_in_states_is_left_alone() -> None:
    """As a slow copy of weights that a wrapper averages."""
    model, twin = model_of(), model_of()
    optimizer, undisturbed = (SST(m, lr=1e-2, weight_decay=0.1, **SCHEDULE) for m in (model, twin))
    run(model, optimizer, 1)
    run(twin, undisturbed, 1)
    layer = layers_of(model)[0]
    for p in (layer.active_u, layer.singular_values):
        optimizer.state[p] |= {"slow": torch.full_like(p, 2.0), "count": 3}
    run(model, optimizer, 6, 1)
    run(twin, undisturbed, 6, 1)
    for a, b in zip(snapshot(model), snapshot(twin), strict=True):
        assert_same_bits(a, b)
    for p in (layer.active_u, layer.singular_values):
        assert torch.equal(optimizer.state[p]["slow"], torch.full_like(p, 2.0))
        assert optimizer.state[p]["count"] == 3


@pytest.mark.parametrize("frozen_dtype", [None, torch.int8], ids=str)
def test_named_parameters_leave_frozen_vectors_out(frozen_dtype: torch.dtype | None) -> None:
    model = model_of(frozen_dtype=frozen_dtype)
    named, plain = SST(model.named_parameters(), **SCHEDULE), SST(model_of(frozen_dtype=frozen_dtype), **SCHEDULE)
    names = named.param_groups[0]["param_names"]
    assert len(names) == len(plain.param_groups[0]["params"])
    assert not [name for name in names if "frozen" in name]


@pytest.mark.parametrize("sst", [None, {}, {"active": 3}, 5])
def test_a_broken_state_is_refused(sst: object) -> None:
    optimizer = SST(model_of(), **SCHEDULE)
    state = optimizer.state_dict() | {"sst": sst}
    with pytest.raises(ValueError, match=r"expected a state dict of SST; got one with state, param_groups\. "):
        optimizer.load_state_dict(state)


def test_a_rank_changed_from_outside_is_trained_on() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    layer = layers_of(model)[0]
    layer.set_rank(2)
    before = layer.active_u.detach().clone()
    run(model, optimizer, 2)
    assert layer.active_u.shape == (2, 20)
    assert (layer.active_u - before).abs().max() > 1e-4
    assert_within(layer.active_u.double().norm(dim=1), torch.ones(2).double(), torch.full((2,), 8 * UNIT), "norms")


def test_shorter_iterations_after_loading_still_end() -> None:
    model = model_of()
    optimizer = SST(model, steps_per_iteration=100)
    run(model, optimizer, 30)
    short = SST(model_of(), steps_per_iteration=20)
    layers = zip(layers_of(model), [short._layers[0], short._layers[1]], strict=True)
    for trained, fresh in layers:
        fresh.load_state_dict(trained.state_dict())
    short.load_state_dict(optimizer.state_dict())
    short.step()
    assert short.progress.iteration == 1


def test_copies_are_whole_optimizers() -> None:
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model = model_of()
        optimizer = SST(model, lr=1e-2, **SCHEDULE)
        run(model, optimizer, 5)
        twin, again = copied((model, optimizer))
        for m, o in ((model, optimizer), (twin, again)):
            run(m, o, 9, 5)
        assert again.progress == optimizer.progress
        for a, b in zip(snapshot(twin), snapshot(model), strict=True):
            assert_same_bits(a, b)


def test_step_hooks_run_once() -> None:
    AdamW([nn.Parameter(torch.ones(2))])
    optimizer, calls = SST(model_of(), **SCHEDULE), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


def test_frozen_vectors_of_every_dtype_swap() -> None:
    for frozen_dtype in (torch.float64, torch.bfloat16, torch.int8):
        model = model_of(frozen_dtype=frozen_dtype)
        optimizer = SST(model.parameters(), lr=1e-2, **SCHEDULE)
        run(model, optimizer, 5)
        assert layers_of(model)[0].frozen_u.dtype == frozen_dtype


def test_groups_and_parameters() -> None:
    """Given as parameters, in groups, or as a model; each group's own learning rate holds."""
    model = model_of()
    optimizer = SST(model.parameters(), lr=1e-2, **SCHEDULE)
    assert len(optimizer._layers) == 2
    model = model_of()
    slow = {"params": model[0].parameters(), "lr": 0.0}
    optimizer = SST([slow, {"params": [p for m in model[1:] for p in m.parameters()]}], lr=1e-2, **SCHEDULE)
    first, second = (layer.weight for layer in layers_of(model))
    run(model, optimizer, 3)
    assert_same_bits(layers_of(model)[0].weight, first)
    assert (layers_of(model)[1].weight - second).abs().max() > 1e-3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "T3": ({"steps_per_iteration": 0}, "steps_per_iteration of at least 1"),
    "T2": ({"iterations_per_round": 0.5}, "iterations_per_round of at least 1"),
    "warmup": ({"warmup_steps": -1}, "warmup_steps of at least 0"),
    "shape": ({"warmup_shape": "steps"}, "warmup_shape among"),
    "sampling": ({"sampling": "top"}, "sampling among"),
    "flag": ({"project": 1}, "project True or False"),
    "tolerance": ({"tolerance": -1.0}, "tolerance >= 0"),
    "seed": ({"seed": -1}, "seed in"),
    "schedule": ({"rank_schedule": 3}, "a callable rank_schedule"),
    "scheduled rank": ({"rank_schedule": lambda draw: 13}, "a rank from 1 to 12"),
    "lr": ({"lr": -1.0}, r"lr in \[0, inf\)"),
    "betas": ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_leave_the_model_alone(name: str) -> None:
    options, text = BAD[name]
    model = model_of()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"SST.*: expected {text}"):
        SST(model, **options)
    for a, b in zip(snapshot(model), before, strict=True):
        assert_same_bits(a, b)


def test_bad_parameters_are_refused() -> None:
    model = model_of()
    before = snapshot(model)
    with pytest.raises(ValueError, match="SST: expected parameters of SSTLinear layers"):
        SST(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="one without active_u"):
        SST([p for p in model.parameters() if p is not model[0].active_u])
    optimizer = SST(model_of(), **SCHEDULE)
    with pytest.raises(ValueError, match="expected SSTLinear layers when it is made"):
        optimizer.add_param_group({"params": list(model[0].parameters())})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1})
    with pytest.raises(ValueError, match="expected a state dict of SST"):
        optimizer.load_state_dict(AdamW(model_of().parameters()).state_dict())
    with pytest.raises(RuntimeError, match="kernels take float32"):
        SST(model_of(torch.float64), backend="native")
    for a, b in zip(snapshot(model), before, strict=True):
        assert_same_bits(a, b)


def test_layers_that_are_not_finite_stop_a_round() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    run(model, optimizer, 11)
    give_gradients(model, 11, scale=float("nan"))
    with pytest.raises(RuntimeError, match="SST: expected finite layers at the end of a round"):
        optimizer.step()
