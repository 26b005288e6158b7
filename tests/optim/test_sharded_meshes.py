# SPDX-License-Identifier: Apache-2.0
"""Meshes of two dimensions with two ranks in each: HSDP, and FSDP2 over tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from singlepass import optim

from ..ranks import on_ranks
from .shards import EXACT, assert_alike, whole
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
