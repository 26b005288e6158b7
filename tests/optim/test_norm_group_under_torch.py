# SPDX-License-Identifier: Apache-2.0
"""``norm_group`` under ZeroRedundancyOptimizer and FSDP1, against training in one process."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from singlepass import optim

from ..ranks import on_ranks
from .shards import SHAPES, assert_alike, step_both, twice
from .steps import normal
from .test_norm_group import CASES, each_optimizer


@pytest.mark.parametrize("by_class", [False, True], ids=["argument", "class"])
@each_optimizer
@on_ranks(2)
def test_zero_redundancy_optimizer(name: str, by_class: bool) -> None:
    """Which keeps all arguments in its groups, and cannot save a group of ranks there; but takes it with the class."""
    params, twins = twice()
    cls, options = getattr(optim, name), {"lr": 1e-2, "max_grad_norm": 0.5}
    ranks = {"norm_group": distributed.group.WORLD}
    if by_class:
        optimizer = ZeroRedundancyOptimizer(params, functools.partial(cls, **ranks), **options)
    else:
        optimizer = ZeroRedundancyOptimizer(params, cls, **options, **ranks)
    expected = cls(twins, **options)
    step_both(optimizer, params, expected, twins)
    for p, q in zip(params, twins, strict=True):
        assert_alike(p, q, exact=False, label="parameter")
    if by_class:
        optimizer.consolidate_state_dict(to=0)
        if distributed.get_rank() == 0:
            saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
            expected.load_state_dict(saved)
            assert len(saved["state"]) == len(SHAPES)
    else:
        with pytest.raises(TypeError, match=r"pickle.*ProcessGroup"):
            pickle.dumps(optimizer.optim.state_dict())


@each_optimizer
@on_ranks(2)
def test_fully_sharded_data_parallel(name: str) -> None:
    """FSDP1, whose units have flat parts. Of the last one, which has one element, the second rank has nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 1, bias=False)]
    twin = copy.deepcopy(nn.Sequential(*layers))
    layers[3] = FullyShardedDataParallel(layers[3], use_orig_params=True, device_id="cpu")
    model = FullyShardedDataParallel(nn.Sequential(*layers), use_orig_params=True, device_id="cpu")
    options = {"lr": 1e-2, "max_grad_norm": 0.1} | CASES[f"{name}-flat"][2]
    optimizer = getattr(optim, name)(model.parameters(), **options, norm_group=model.process_group)
    expected = getattr(optim, name)(twin.parameters(), **options)
    for step in range(1, 4):
        for some, module in ((optimizer, model), (expected, twin)):
            some.zero_grad()
            module(normal((4, 5), step)).square().mean().backward()
            some.step()
    get_optimizer_state_dict(model, optimizer)
    with FullyShardedDataParallel.summon_full_params(model):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert_alike(p, q, exact=False, label="parameter")


@pytest.mark.parametrize("saved_before", [False, True], ids=["", "saved-before"])
@each_optimizer
@on_ranks(2)
def test_a_rank_without_elements_of_what_is_trained(name: str, saved_before: bool) -> None:
    """Here all is the second one's. Saving asks both for states before they are trained, later the first one alone."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 1)
    layer.weight.requires_grad_(False)
    twin = copy.deepcopy(layer)
    model = FullyShardedDataParallel(layer, use_orig_params=True, device_id="cpu")
    options = {"max_grad_norm": 0.1} | CASES[f"{name}-flat"][2]
    bias = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(optim, name)(bias, **options, norm_group=model.process_group)
    expected = getattr(optim, name)([twin.bias], **options)
    if saved_before:
        get_optimizer_state_dict(model, optimizer)
    for step in range(1, 4):
        for some, module in ((optimizer, model), (expected, twin)):
            module(normal((4, 7), step)).square().mean().backward()
            some.step()
            some.zero_grad()
        if step > 1:
            saved: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
            assert saved["state"]["bias"]["step"] == step
    if distributed.get_rank() == 1:
        assert_alike(bias[0], twin.bias, exact=False, label="bias")
    else:
        assert bias[0].numel() == 0
