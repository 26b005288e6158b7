# SPDX-License-Identifier: Apache-2.0
"""The optimizer's states and parameters: copies, groups, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from singlepass.optim import AdamW
from singlepass.spectral import SST

from ..tolerances import assert_same_bits, assert_within
from .backends import UNIT
from .training import SCHEDULE, give_gradients, layers_of, model_of, run, snapshot


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


def test_a_schedule_of_ranks_that_do_not_fit_changes_nothing() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, rank_schedule=lambda draw: 3 if draw == 0 else 99, **SCHEDULE)
    run(model, optimizer, 3)
    give_gradients(model, 3)
    before, progress = snapshot(model), optimizer.progress.as_tuple()
    for _ in range(2):
        with pytest.raises(ValueError, match="SST: rank_schedule: expected a rank from 1 to 12"):
            optimizer.step()
        assert optimizer.progress.as_tuple() == progress
        for a, b in zip(snapshot(model), before, strict=True):
            assert_same_bits(a, b)


def test_layers_that_are_not_finite_stop_a_round() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    run(model, optimizer, 11)
    give_gradients(model, 11, scale=float("nan"))
    with pytest.raises(RuntimeError, match="SST: expected finite layers at the end of a round"):
        optimizer.step()
