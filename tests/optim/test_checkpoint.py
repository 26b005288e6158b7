# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint makes a new optimizer create its states by a step that must change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from singlepass import optim, spectral

from ..tolerances import assert_same_bits
from .steps import Place, each_place
from .trajectory import contents

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in optim._OPTIMIZERS),
    ("AdamW", {"amsgrad": True}),
    ("AdaBelief", {"fixed_decay": True}),
    ("SGDSaI", {"guard_gain": False}),
    ("LAMB", {"max_grad_norm": 0.0}),
    ("SST", {}),
]
IDS = ["-".join([name, *options]) for name, options in OPTIONS]
each_optimizer = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
# SST's schedule is no part of what torch's functions save; its own state_dict() has it.
each_but_sst = pytest.mark.parametrize(("name", "options"), OPTIONS[:-1], ids=IDS[:-1])


def start(name: str, options: dict[str, Any], place: Place) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(place.device)
    if name == "SST":
        spectral.convert(model, 2)
        return model, spectral.SST(model, steps_per_iteration=3, backend=place.backend, **options)
    cls = getattr(optim, name)
    return model, cls(model.parameters(), weight_decay=0.1, backend=place.backend, **options)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


def assert_same(a: Any, b: Any) -> None:
    contents_a, contents_b = contents(a), contents(b)
    assert contents_a.keys() == contents_b.keys()
    for key, value in contents_a.items():
        assert_same_bits(value, contents_b[key], key)


@each_place
@each_optimizer
def test_saving_a_new_optimizer_changes_nothing(name: str, options: dict[str, Any], place: Place) -> None:
    (model, optimizer), (twin_model, twin) = (start(name, options, place) for _ in range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    assert len(saved["state"]) == len([p for p in model.parameters() if p.requires_grad])
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert_same_bits(p, q)
    train(model, optimizer, range(1, 5))
    train(twin_model, twin, range(1, 5))
    assert_same(optimizer, twin)


@each_place
@each_but_sst
def test_training_resumes_through_it_bit_for_bit(name: str, options: dict[str, Any], place: Place) -> None:
    (model, optimizer), (resumed_model, resumed) = (start(name, options, place) for _ in range(2))
    train(model, optimizer, range(1, 4))
    saved = get_optimizer_state_dict(model, optimizer)
    template = get_optimizer_state_dict(resumed_model, resumed)  # what a checkpoint is read into
    assert {key: set(value) for key, value in template["state"].items()} == {
        key: set(value) for key, value in saved["state"].items()
    }
    set_optimizer_state_dict(resumed_model, resumed, saved)
    resumed_model.load_state_dict(model.state_dict())
    assert_same(optimizer, resumed)
    train(model, optimizer, range(4, 7))
    train(resumed_model, resumed, range(4, 7))
    assert_same(optimizer, resumed)


@each_place
@each_optimizer
def test_any_other_step_is_a_step(name: str, options: dict[str, Any], place: Place) -> None:
    """A warm-up that starts at a learning rate of 0, gradients of zeros, and zeros of both after the first step."""
    for lr, scale, begun in ((0.0, 1.0, False), (1e-3, 0.0, False), (0.0, 0.0, True)):
        model, optimizer = start(name, options, place)
        if begun:
            train(model, optimizer, range(1, 2))
        for group in optimizer.param_groups:
            group["lr"] = lr
        counts = {key: value for key, value in contents(optimizer).items() if key.startswith("step ")}
        for p in model.parameters():
            p.grad = torch.full_like(p, scale) if p.requires_grad else None
        optimizer.step()
        for key, value in contents(optimizer).items():
            if key.startswith("step "):
                assert value.item() == 1.0 + counts.get(key, torch.zeros(())).item()
