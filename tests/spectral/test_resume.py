# SPDX-License-Identifier: Apache-2.0
"""Resuming bit for bit: in any order of making and loading, through others' checkpoints, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from singlepass import spectral
from singlepass.spectral import SST

from ..tolerances import assert_same_bits
from .training import SCHEDULE, layers_of, model_of, run, snapshot


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


OPTIONS = SCHEDULE | {"lr": 1e-2, "weight_decay": 0.1}
STOP, MORE = 6, 8

Saved = tuple[dict[str, Any], dict[str, Any]]


def trained(**options: Any) -> tuple[nn.Module, SST]:
    model = model_of(**options)
    optimizer = SST(model, **OPTIONS)
    run(model, optimizer, STOP)
    return model, optimizer


def goes_on_as(model: nn.Module, optimizer: SST, other: nn.Module, again: SST) -> None:
    run(model, optimizer, MORE, STOP)
    run(other, again, MORE, STOP)
    assert again.progress == optimizer.progress
    assert again.param_groups[0]["sst_progress"] == optimizer.progress.as_tuple()
    for a, b in zip(snapshot(other), snapshot(model), strict=True):
        assert_same_bits(a, b)


def make_model_optimizer(model: nn.Module, saved: Saved, **how: Any) -> SST:
    optimizer = SST(model, **OPTIONS)
    model.load_state_dict(saved[0], **how)
    optimizer.load_state_dict(saved[1])
    return optimizer


def model_make_optimizer(model: nn.Module, saved: Saved, **how: Any) -> SST:
    """As Lightning does it, and Trainer with optimizer_cls_and_kwargs."""
    model.load_state_dict(saved[0], **how)
    optimizer = SST(model, **OPTIONS)
    optimizer.load_state_dict(saved[1])
    return optimizer


def make_optimizer_model(model: nn.Module, saved: Saved, **how: Any) -> SST:
    optimizer = SST(model, **OPTIONS)
    optimizer.load_state_dict(saved[1])
    model.load_state_dict(saved[0], **how)
    return optimizer


ORDERS = (make_model_optimizer, model_make_optimizer, make_optimizer_model)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("frozen_dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("load", ORDERS, ids=lambda load: load.__name__)
def test_any_order_of_making_and_loading(
    load: Callable[..., SST], frozen_dtype: torch.dtype | None, assign: bool
) -> None:
    """Biases and norms too: where parameters are replaced, the optimizer follows all of its model."""
    model, optimizer = trained(frozen_dtype=frozen_dtype)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = model_of(frozen_dtype=frozen_dtype)
    again = load(other, saved, assign=assign)
    goes_on_as(model, optimizer, other, again)


def test_a_loaded_model_is_trained_on_by_a_new_optimizer() -> None:
    """Its vectors stay, and the next draw is one that was not made before."""
    model, optimizer = trained()
    other = model_of()
    other.load_state_dict(model.state_dict())
    before = snapshot(other)
    again = SST(other, **OPTIONS)
    assert again.progress.draws == optimizer.progress.draws == 2
    for a, b in zip(snapshot(other), before, strict=True):
        assert_same_bits(a, b)
    run(other, again, 4)
    assert [int(layer.draws) for layer in layers_of(other)] == [3, 3]


def test_layers_of_different_draws_are_drawn_anew() -> None:
    model, _ = trained()
    layers_of(model)[0].set_weight(torch.randn(20, 12))
    assert int(layers_of(model)[0].draws) == 0
    again = SST(model, **OPTIONS)
    assert again.progress.draws == 3
    assert [int(layer.draws) for layer in layers_of(model)] == [3, 3]


def test_a_model_that_was_not_loaded_is_noticed() -> None:
    _, optimizer = trained()
    other = model_of()
    again = SST(other, **OPTIONS)
    again.load_state_dict(optimizer.state_dict())
    before = snapshot(other)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"those of draw 2, as the loaded state says; got draw 1\. Load the model"):
            run(other, again, 1)
    for a, b in zip(snapshot(other), before, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("progress", [None, (), (1, 2, 3), (1, 2, 3, -1), (1, 2, 3, 0.5), "abcd"])
def test_a_broken_state_is_refused(progress: object) -> None:
    optimizer = SST(model_of(), **SCHEDULE)
    state = optimizer.state_dict()
    state["param_groups"][0]["sst_progress"] = progress
    with pytest.raises(ValueError, match=r"SST: expected a state dict of SST, with sst_progress in its groups; got "):
        optimizer.load_state_dict(state)
    assert optimizer.progress.draws == 1


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints(flat: bool) -> None:
    """They keep states and groups only; flattened ones ask the new optimizer which keys a group has."""
    model, optimizer = trained()
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    states = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=options))
    other = model_of()
    again = SST(other, **OPTIONS)
    dcp.set_state_dict(other, again, model_state_dict=states[0], optim_state_dict=states[1], options=options)
    goes_on_as(model, optimizer, other, again)


def test_hooks_see_and_change_what_is_loaded() -> None:
    model, optimizer = trained()
    saved = optimizer.state_dict()
    other = model_of()
    again = SST(other, **OPTIONS)
    other.load_state_dict(model.state_dict())
    stood = saved["param_groups"][0].pop("sst_progress")

    def put_back(_: SST, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "param_groups": [g | {"sst_progress": stood} for g in state_dict["param_groups"]]}

    again.register_load_state_dict_pre_hook(put_back)
    seen = []
    again.register_load_state_dict_post_hook(lambda o: seen.append(o.progress.as_tuple()))
    again.load_state_dict(saved)
    assert seen == [optimizer.progress.as_tuple()]
    goes_on_as(model, optimizer, other, again)


@pytest.mark.parametrize("rank", [3, 12])
def test_nothing_without_elements_is_saved(rank: int) -> None:
    """Savers that look for shared memory take such tensors for one: they lose all but one, and cannot load."""
    layer = spectral.SSTLinear(12, 20, rank)
    state = layer.state_dict()
    assert [name for name, t in state.items() if t.numel() == 0] == []
    other = spectral.SSTLinear(12, 20, rank)
    assert other.load_state_dict(state).missing_keys == []
    assert_same_bits(other.weight, layer.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*active_u"):
        other.load_state_dict({name: t for name, t in state.items() if name != "active_u"})


def test_sharded_layers_are_refused(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = model_of()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"SST: expected whole singular vectors, .*; got DTensors\. Train it by"):
            SST(model, **OPTIONS)
    finally:
        distributed.destroy_process_group()
