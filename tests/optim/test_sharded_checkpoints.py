# SPDX-License-Identifier: Apache-2.0
"""State dicts of sharded parameters: from two ranks to one process and back, by torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from singlepass import optim

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import EXACT, Twins, assert_alike, in_many_ways, mesh_of, place, rows, whole
from .steps import normal
from .test_groups import OPTIONS

each_optimizer = pytest.mark.parametrize("name", optim._OPTIMIZERS)


class Training:
    """A small model, sharded or not, and its optimizer."""

    def __init__(self, name: str, sharded: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
        if sharded:
            fully_shard(self.model, mesh=mesh_of(2))
        options = {"lr": 1e-2, "weight_decay": 0.1} | OPTIONS.get(name, {})
        self.optimizer = getattr(optim, name)(self.model.parameters(), **options)
        self.name = name

    def train(self, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(self.model.parameters()):
                g = normal(p.shape, 100 * step + i)
                p.grad = place(g, mesh_of(2), [Shard(0)]) if isinstance(p, DTensor) else g
            self.optimizer.step()

    def weights_of(self, other: Training) -> None:
        with torch.no_grad():
            for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True):
                value = whole(q)
                p.copy_(place(value, mesh_of(2), [Shard(0)]) if isinstance(p, DTensor) else value)

    def assert_is(self, other: Training) -> None:
        exact = self.name in EXACT
        for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True):
            assert_alike(whole(p), whole(q), exact, "parameter")
            mine, theirs = self.optimizer.state[p], other.optimizer.state[q]
            assert mine.keys() == theirs.keys()
            for key in mine:
                assert_alike(whole(mine[key]), whole(theirs[key]), exact, key)


@contextmanager
def shared_folder() -> Iterator[str]:
    """The same on all ranks."""
    with tempfile.TemporaryDirectory() as mine:
        names = [mine]
        distributed.broadcast_object_list(names)
        yield names[0]
        distributed.barrier()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@each_optimizer
@on_ranks(2)
def test_from_two_ranks_to_one_to_two(name: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    expected = Training(name, sharded=False)
    expected.train(range(1, 7))
    two = Training(name, sharded=True)
    two.train(range(1, 3))
    with shared_folder() as folder:
        checkpoint.save(
            {"optim": get_optimizer_state_dict(two.model, two.optimizer, options=options)}, checkpoint_id=folder
        )
        one = Training(name, sharded=False)
        template = {"optim": get_optimizer_state_dict(one.model, one.optimizer, options=options)}
        checkpoint.load(template, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(one.model, one.optimizer, template["optim"], options=options)
        one.weights_of(two)
        one.assert_is(two)
        one.train(range(3, 5))
    with shared_folder() as folder:
        saved = get_optimizer_state_dict(one.model, one.optimizer, options=options)
        if distributed.get_rank() == 0:
            checkpoint.save({"optim": saved}, checkpoint_id=folder, no_dist=True)
        distributed.barrier()
        again = Training(name, sharded=True)
        template = {"optim": get_optimizer_state_dict(again.model, again.optimizer, options=options)}
        checkpoint.load(template, checkpoint_id=folder)
        set_optimizer_state_dict(again.model, again.optimizer, template["optim"], options=options)
        again.weights_of(one)
        again.train(range(5, 7))
    again.assert_is(expected)


@each_optimizer
@on_ranks(2)
def test_full_state_dicts(name: str) -> None:
    """Whole tensors on rank 0, as for one file that any process can load."""
    two = Training(name, sharded=True)
    two.train(range(1, 3))
    full = get_optimizer_state_dict(
        two.model, two.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if distributed.get_rank() == 0:
        one = Training(name, sharded=False)
        set_optimizer_state_dict(one.model, one.optimizer, full)
    else:
        assert not full
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    again = Training(name, sharded=True)
    set_optimizer_state_dict(again.model, again.optimizer, full, options=options)
    again.weights_of(two)
    again.assert_is(two)
    again.train(range(3, 4))
    two.train(range(3, 4))
    again.assert_is(two)


@each_optimizer
@on_ranks(2)
def test_state_dict_holds_dtensors_placed_as_their_parameters(name: str) -> None:
    twins = Twins(name, mesh_of(2), in_many_ways)
    twins.step(1)
    saved = twins.optimizer.state_dict()["state"]
    for i, p in enumerate(twins.params):
        for key, value in saved[i].items():
            if key in ("step", "gsnr") or not isinstance(p, DTensor):
                assert not isinstance(value, DTensor)
            else:
                assert isinstance(value, DTensor)
                assert (value.device_mesh, value.placements) == (p.device_mesh, p.placements)
                assert value.shape == p.shape
                assert value.stride() == p.stride()


@each_optimizer
@on_ranks(2)
def test_whole_states_load_into_sharded_parameters_and_back(name: str) -> None:
    """By ``load_state_dict`` itself: of one process, of another placement, and of DTensors into plain parameters."""
    source = Twins(name, mesh_of(2), in_many_ways)
    source.step(1)
    for state_dict, exact in ((source.twin.state_dict(), name in EXACT), (source.optimizer.state_dict(), True)):
        for placements in (rows, lambda i: None):
            target = Twins(name, mesh_of(2), placements)
            target.optimizer.load_state_dict(copy.deepcopy(state_dict))
            for p, q in zip(target.params, source.params, strict=True):
                mine, theirs = target.optimizer.state[p], source.optimizer.state[q]
                assert mine.keys() == theirs.keys()
                for key in mine:
                    assert_alike(whole(mine[key]), whole(theirs[key]), exact, key)
                    if isinstance(p, DTensor) and key not in ("step", "gsnr"):
                        assert mine[key].placements == p.placements


@each_optimizer
@on_ranks(2)
def test_copies_and_pickles(name: str) -> None:
    """What each rank writes to a file of its own loads there again."""
    twins = Twins(name, mesh_of(2), rows)
    twins.step(1)
    file = io.BytesIO()
    torch.save(twins.optimizer.state_dict(), file)
    file.seek(0)
    again = Twins(name, mesh_of(2), rows)
    again.optimizer.load_state_dict(torch.load(file, weights_only=False))
    for p, q in zip(again.params, twins.params, strict=True):
        for key, value in twins.optimizer.state[q].items():
            assert_same_bits(whole(again.optimizer.state[p][key]), whole(value), key)


@each_optimizer
@on_ranks(2)
def test_saving_before_the_first_step_changes_nothing(name: str) -> None:
    training, expected = Training(name, sharded=True), Training(name, sharded=True)
    saved: dict[str, Any] = get_optimizer_state_dict(training.model, training.optimizer)
    assert len(saved["state"]) == len(list(training.model.parameters()))
    training.train(range(1, 3))
    expected.train(range(1, 3))
    training.assert_is(expected)
