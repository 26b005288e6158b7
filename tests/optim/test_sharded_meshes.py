# SPDX-License-Identifier: Apache-2.0
"""Meshes of two dimensions with two ranks in each: HSDP, and FSDP2 over tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from singlepass import optim

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import EXACT, Twins, assert_alike, mesh_of, whole
from .steps import normal
from .test_groups import make

pytestmark = pytest.mark.deep("four processes")


def hybrid() -> tuple[nn.Module, DeviceMesh]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))
    return fully_shard(model, mesh=mesh), mesh


def with_tensor_parallelism() -> tuple[nn.Module, DeviceMesh]:
    """Rows that are divided twice, columns of divided rows, and norms on a mesh of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6))
    plan: dict[str, Any] = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    return fully_shard(model, mesh=mesh["dp"]), mesh


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("make_model", [hybrid, with_tensor_parallelism])
@pytest.mark.parametrize("name", optim._OPTIMIZERS)
@on_ranks(4)
def test_training_is_that_of_one_process(name: str, make_model: Any, clipped: bool) -> None:
    torch.manual_seed(0)
    model, _ = make_model()
    params = list(model.parameters())
    twins = [nn.Parameter(whole(p).detach().clone()) for p in params]
    optimizer, expected = make(name, [{"params": params}]), make(name, [{"params": twins}])
    for group in (*optimizer.param_groups, *expected.param_groups):
        if "max_grad_norm" in group:
            group["max_grad_norm"] = 0.01 * clipped
    for step in range(1, 4):
        optimizer.zero_grad()
        model(normal((4, 6), step)).square().mean().backward()
        for p, q in zip(params, twins, strict=True):
            q.grad = whole(p.grad)
        optimizer.step()
        expected.step()
    exact = name in EXACT and not clipped
    for p, q in zip(params, twins, strict=True):
        assert_alike(whole(p), q, exact, "parameter")
    again = make(name, [{"params": params}])
    again.load_state_dict(expected.state_dict())  # of whole tensors
    for p, q in zip(params, twins, strict=True):
        for key, value in again.state[p].items():
            assert_alike(whole(value), expected.state[q][key], True, key)
            assert not isinstance(value, DTensor) or value.placements == p.placements


def replicated(name: str, options: dict[str, Any]) -> Twins:
    """Two replicas, of two shards each."""
    return Twins(name, mesh_of(2, 2), lambda i: [Replicate(), Shard(0)], options=options)


COMMUNICATE = {
    "LAMB": {},
    "LARS": {},
    "SGDSaI": {},
    "Adan": {"max_grad_norm": 0.5},
    "AdamW": {"grad_scale": 4.0},
}


@pytest.mark.parametrize("name", COMMUNICATE)
@on_ranks(4)
def test_a_rank_that_cannot_go_on(name: str) -> None:
    """The ranks of the other replica hear of it too."""
    options: dict[str, Any] = COMMUNICATE[name]
    twins = replicated(name, {key: value for key, value in options.items() if key != "grad_scale"})
    twins.give_grads(1)
    before = [whole(p).clone() for p in twins.params]
    if "grad_scale" in options:
        twins.optimizer.grad_scale = torch.tensor(options["grad_scale"])
    mine = distributed.get_rank() == 2
    if mine:
        twins.params[1].grad = twins.twins[1].grad  # whole, and not a DTensor
    contract = "a gradient placed as its parameter" if mine else "every rank to take part; got an exception on another"
    with pytest.raises(RuntimeError, match=f"{name}: expected {contract}"):
        twins.optimizer.step()
    for p, old in zip(twins.params, before, strict=True):
        assert_same_bits(whole(p), old)
    twins.give_grads(1)
    twins.optimizer.grad_scale = None
    twins.optimizer.step()
    twins.twin.step()
    twins.assert_same(exact=name == "AdamW")


@on_ranks(4)
def test_gradients_that_one_rank_cannot_clip() -> None:
    twins = replicated("AdamW", {})
    twins.give_grads(1)
    mine = distributed.get_rank() == 1
    if mine:
        twins.params[1].grad = twins.twins[1].grad
    contract = "a gradient placed as its parameter" if mine else "every rank to take part; got an exception on another"
    with pytest.raises(RuntimeError, match=f"clip_grad_norm_: expected {contract}"):
        optim.clip_grad_norm_(twins.params, 0.5)
    twins.give_grads(1)
    for clip, some in ((optim.clip_grad_norm_, twins.params), (torch.nn.utils.clip_grad_norm_, twins.twins)):
        clip(some, 0.5)
    for p, q in zip(twins.params, twins.twins, strict=True):
        assert_alike(whole(p.grad), q.grad, False, "gradient")


@on_ranks(4)
def test_hyperparameters_that_differ_in_one_replica_are_found_by_all() -> None:
    """No rank waits for one that has raised already."""
    twins = replicated("AdamW", {})
    twins.give_grads(1)
    distributed.set_debug_level(distributed.DebugLevel.DETAIL)
    try:
        twins.optimizer.param_groups[1]["lr"] = [0.1, 0.2, 0.2, 0.2][distributed.get_rank()]
        with pytest.raises(ValueError, match=r"lr of group 1 alike on all ranks; got 0\.\d, 0\.\d\. "):
            twins.optimizer.step()
    finally:
        distributed.set_debug_level(distributed.DebugLevel.OFF)
    twins.assert_same(exact=True)
