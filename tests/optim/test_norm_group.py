# SPDX-License-Identifier: Apache-2.0
"""Plain tensors that are spread over ranks, as optimizers with partitions spread them: the norm of all gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.tensor import Shard
from torch.nn import Parameter

from singlepass import optim
from singlepass.optim import clip_grad_norm_
from singlepass.optim._exchange import _device_of

from ..ranks import on_ranks
from .shards import SHAPES, assert_alike, mesh_of, place
from .steps import normal
from .test_sharded_norms import count_collectives

# Rules, how tensors are spread, and options. LAMB's ratios are of what a rank has: here of flat parts it takes none.
CASES = {
    "LAMB-whole": ("LAMB", "whole", {}),
    "LAMB-flat": ("LAMB", "flat", {"weight_decay": 0.0, "always_adapt": False}),
    "Adan-whole": ("Adan", "whole", {}),
    "Adan-flat": ("Adan", "flat", {}),
}
each_case = pytest.mark.parametrize("case", CASES)
each_optimizer = pytest.mark.parametrize("name", ["LAMB", "Adan"])


def mine(tensors: Sequence[Tensor], how: str) -> list[Tensor]:
    """What this rank has of some tensors: every other one, or half of each, flat, with a zero if it does not divide."""
    rank = distributed.get_rank()
    if how == "whole":
        return [t.detach().clone() for t in tensors[rank::2]]
    flat = [torch.cat((t.detach().flatten(), t.new_zeros(t.numel() % 2))) for t in tensors]
    return [t.chunk(2)[rank].clone() for t in flat]


class Spread:
    """An optimizer of what this rank has, and one of all tensors in this process, which says what is right."""

    def __init__(self, case: str, **options: Any) -> None:
        name, self.how, more = CASES[case]
        start = [normal(shape, 10 + i) for i, shape in enumerate(SHAPES)]
        self.twins = [Parameter(t.clone()) for t in start]
        self.params = [Parameter(t) for t in mine(start, self.how)]
        options = {"lr": 1e-2, "max_grad_norm": 0.5} | more | options
        self.twin = getattr(optim, name)(self.twins, **options)
        self.optimizer = getattr(optim, name)(self.params, **options, norm_group=distributed.group.WORLD)
        self.counts: list[int] = []

    def give_grads(self, step: int) -> None:
        for i, q in enumerate(self.twins):
            q.grad = normal(q.shape, 1000 * step + i)
        self.share_grads()

    def share_grads(self) -> None:
        for p, g in zip(self.params, mine([q.grad for q in self.twins], self.how), strict=True):
            p.grad = g

    def step(self) -> None:
        """Both; notes what the one that is spread communicates."""
        self.counts.clear()
        with count_collectives(self.counts):
            self.optimizer.step()
        self.twin.step()

    def assert_same(self) -> None:
        for p, q in zip(self.params, mine(self.twins, self.how), strict=True):
            assert_alike(p, q, exact=False, label="parameter")
        states = [self.twin.state[q] for q in self.twins]
        for key in states[0]:
            expected = [state[key] for state in states]
            one_each = key == "step" and self.how == "flat"
            expected = expected if one_each else mine(expected, self.how)
            for p, value in zip(self.params, expected, strict=True):
                assert_alike(self.optimizer.state[p][key], value, exact=False, label=key)


@each_case
@on_ranks(2)
def test_clipping_is_that_of_one_process(case: str) -> None:
    """For one all-reduce of a sum and what ranks say beside it."""
    spread = Spread(case)
    for step in range(1, 4):
        spread.give_grads(step)
        spread.step()
        assert spread.counts == [1 + 2]
    spread.assert_same()


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
@each_case
@on_ranks(2)
def test_an_infinity_on_one_rank_skips_the_step_on_all(case: str, max_grad_norm: float) -> None:
    """Where the optimizer looks for it itself; also if it looks for nothing else."""
    spread = Spread(case, max_grad_norm=max_grad_norm)
    for step in range(1, 4):
        spread.give_grads(step)
        spread.optimizer.grad_scale = spread.twin.grad_scale = torch.tensor(4.0)
        if step == 2:
            spread.twins[0].grad.view(-1)[0] = torch.inf
            spread.share_grads()
        spread.step()
        assert spread.counts == [1 + 2]
    spread.assert_same()
    assert all(state["step"] == 2.0 for state in spread.optimizer.state.values())


@each_case
@on_ranks(2)
def test_found_inf_of_one_rank_skips_the_step_on_all(case: str) -> None:
    spread = Spread(case)
    spread.optimizer.grad_scale = spread.twin.grad_scale = torch.tensor(4.0)
    for step, found in enumerate((1.0, 0.0, 1.0), 1):
        spread.give_grads(step)
        spread.optimizer.found_inf = torch.tensor(found * (distributed.get_rank() == 1))
        spread.twin.found_inf = torch.tensor(found)
        spread.step()
    spread.assert_same()


@each_case
@on_ranks(2)
def test_without_clipping_ranks_say_nothing(case: str) -> None:
    spread = Spread(case, max_grad_norm=0.0)
    for step in range(1, 3):
        spread.give_grads(step)
        spread.step()
        assert spread.counts == []
    spread.assert_same()


@each_case
@on_ranks(2)
def test_a_rank_that_cannot_go_on(case: str) -> None:
    """The other one raises too, and nothing is changed; then both go on."""
    spread = Spread(case)
    spread.give_grads(1)
    spread.step()
    spread.give_grads(2)
    error = "every rank to take part; got an exception on another rank"
    if distributed.get_rank() == 1:
        spread.params[1].grad, error = spread.params[1].grad.to_sparse(), "dense gradients"
    with pytest.raises(RuntimeError, match=error):
        spread.optimizer.step()
    spread.assert_same()
    spread.share_grads()
    spread.step()
    spread.assert_same()


@each_case
@on_ranks(2)
def test_a_rank_without_gradients_takes_part(case: str) -> None:
    spread = Spread(case)
    for step in range(1, 4):
        spread.give_grads(step)
        if distributed.get_rank() == 1 and step == 2:
            spread.optimizer.zero_grad()
        kept = [p.detach().clone() for p in spread.params]
        spread.optimizer.step()
        for p, old in zip(spread.params, kept, strict=True):
            assert torch.equal(p, old) == (p.grad is None or p.numel() == 0)


@each_optimizer
@on_ranks(2)
def test_a_rank_without_parameters_takes_part(name: str) -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    held = [p] if distributed.get_rank() == 0 else []
    cls = getattr(optim, name)
    optimizer = cls([{"params": held}], max_grad_norm=0.5, norm_group=distributed.group.WORLD)
    expected = cls([q], max_grad_norm=0.5)
    for step in range(1, 3):
        p.grad = q.grad = normal((3,), step)
        optimizer.step()
        expected.step()
    assert clip_grad_norm_(held, 1.0, norm_group=distributed.group.WORLD) == q.grad.norm()
    if held:
        assert_alike(p, q, exact=False, label="parameter")


@each_optimizer
@on_ranks(2)
def test_groups_of_one_rank(name: str) -> None:
    """And what a rank gets that is not in the group."""
    groups = [distributed.new_group([rank]) for rank in range(2)]
    rank = distributed.get_rank()
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    p.grad = q.grad = normal((3,), rank)
    cls = getattr(optim, name)
    cls([p], max_grad_norm=0.5, norm_group=groups[rank]).step()
    cls([q], max_grad_norm=0.5).step()
    assert_alike(p, q, exact=False, label="parameter")
    with pytest.raises(ValueError, match=f"{name}: expected norm_group None or a torch.distributed.ProcessGroup that"):
        cls([p], norm_group=groups[1 - rank])


@each_case
@on_ranks(2)
def test_a_step_that_asks_for_states(case: str) -> None:
    """That of torch.distributed.checkpoint: gradients of zeros on all ranks, at a learning rate of 0."""
    spread = Spread(case)
    _init_optim_state(spread.optimizer)
    for p in spread.params:
        assert spread.optimizer.state[p]["step"] == 0.0
    for step in range(1, 3):
        spread.give_grads(step)
        spread.step()
    spread.assert_same()


@each_case
@on_ranks(2)
def test_a_first_step_at_a_learning_rate_of_0(case: str) -> None:
    """It counts on a rank whose gradients are all 0, too, if those of another are not: so it does in one process."""
    spread = Spread(case, lr=0.0)
    for step in range(1, 4):
        spread.give_grads(step)
        if step == 1:
            for p in spread.params if distributed.get_rank() == 1 else ():
                p.grad.zero_()
        for optimizer in (spread.optimizer, spread.twin):
            optimizer.param_groups[0]["lr"] = 0.0 if step == 1 else 1e-2
        spread.step()
        assert spread.counts == [1 + 2]
    assert all(state["step"] == 3.0 for state in spread.optimizer.state.values())


@each_case
@on_ranks(2)
def test_steps_at_a_learning_rate_of_0_with_states_on_one_rank_alone(case: str) -> None:
    """Only the other one could take them for steps that ask for states: both say as much to each other."""
    spread = Spread(case, lr=0.0)
    for step in range(1, 4):
        spread.give_grads(step)
        if distributed.get_rank() == 1:
            spread.optimizer.zero_grad()
        spread.step()
        assert spread.counts == [1 + 2]
    assert bool(spread.optimizer.state) == (distributed.get_rank() == 0)


@each_optimizer
@on_ranks(2)
def test_dtensors_are_refused(name: str) -> None:
    """They know their ranks: in the constructor, in a new group, and in a step if a group was edited."""
    world, cls = distributed.group.WORLD, getattr(optim, name)
    p, plain = Parameter(place(torch.ones(4), mesh_of(2), [Shard(0)])), Parameter(torch.ones(3))
    p.grad, plain.grad = place(torch.ones(4), mesh_of(2), [Shard(0)]), torch.ones(3)
    error = f"{name}: expected plain parameters with norm_group; got DTensors"
    with pytest.raises(ValueError, match=error):
        cls([p], norm_group=world)
    optimizer = cls([plain], max_grad_norm=0.5, norm_group=world)
    with pytest.raises(ValueError, match=error):
        optimizer.add_param_group({"params": [p]})
    if distributed.get_rank() == 1:
        optimizer.param_groups[0]["params"].append(p)
    with pytest.raises((ValueError, RuntimeError), match=f"{error}|got an exception on another rank"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(3))
    with pytest.raises(ValueError, match="clip_grad_norm_: expected plain parameters with norm_group; got DTensors"):
        clip_grad_norm_([p, plain], 1.0, norm_group=world)
    assert torch.equal(plain.grad, torch.ones(3))


@each_optimizer
@on_ranks(2)
def test_another_group_of_ranks_in_a_group_is_refused(name: str) -> None:
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    with pytest.raises(ValueError, match=f"{name}: expected one norm_group for all groups; got another"):
        getattr(optim, name)([{"params": params, "norm_group": distributed.group.WORLD}])


@each_optimizer
@on_ranks(2)
def test_it_is_not_saved_and_not_lost(name: str) -> None:
    """Copies have it, or are refused."""
    optimizer = getattr(optim, name)([Parameter(torch.ones(3))], norm_group=distributed.group.WORLD)
    assert "norm_group" not in optimizer.state_dict()["param_groups"][0]
    assert copy.copy(optimizer)._norm_group is distributed.group.WORLD
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"pickle.*ProcessGroup"):
            copied(optimizer)


@each_case
@on_ranks(2)
def test_hyperparameters_that_differ_are_found_where_torch_looks_for_such(case: str) -> None:
    """By TORCH_DISTRIBUTED_DEBUG=DETAIL. Seeds and numbers of parameters may differ."""
    distributed.set_debug_level(distributed.DebugLevel.DETAIL)
    try:
        torch.manual_seed(distributed.get_rank())
        spread = Spread(case)
        spread.give_grads(1)
        spread.step()
        spread.assert_same()
        spread.optimizer.param_groups[0]["max_grad_norm"] = [0.0, 0.5][distributed.get_rank()]
        with pytest.raises(ValueError, match=r"max_grad_norm of group 0 alike on all ranks; got 0\.0, 0\.5"):
            spread.optimizer.step()
    finally:
        distributed.set_debug_level(distributed.DebugLevel.OFF)


@each_case
@on_ranks(2)
def test_compiled_steps(case: str) -> None:
    """And one that is not, after them."""
    torch._dynamo.reset()
    spread = Spread(case, lr=torch.tensor(1e-2))
    compiled = torch.compile(spread.optimizer.step, fullgraph=True, backend="aot_eager")
    for step in range(1, 5):
        spread.give_grads(step)
        (compiled if step < 4 else spread.optimizer.step)()
        spread.twin.step()
    spread.assert_same()


CONFIGS = {
    "cpu:gloo": "cpu",
    "cpu:gloo,cuda:gloo": "cpu",
    "cuda:nccl": "cuda",
    "cpu:gloo,cuda:nccl": "cuda",
}


@pytest.mark.parametrize(("config", "kind"), CONFIGS.items())
def test_all_ranks_add_up_on_devices_of_one_kind(config: str, kind: str) -> None:
    """Whatever parameters one has; on those that have some there, where they are."""
    there, elsewhere = mock.Mock(device=torch.device(kind, 1)), mock.Mock(device=torch.device("meta"))
    with mock.patch.object(distributed, "get_backend_config", return_value=config):
        assert _device_of(mock.Mock(), [elsewhere, there]) == there.device
        assert _device_of(mock.Mock(), [elsewhere]) == _device_of(mock.Mock(), []) == torch.device(kind)


@pytest.mark.parametrize("value", [0, "gloo", (0, 1)], ids=str)
def test_what_is_no_group_of_ranks_is_refused(value: Any) -> None:
    p = Parameter(torch.ones(3))
    error = (
        r"expected norm_group None or a torch.distributed.ProcessGroup that this rank belongs to; got .*new_group\(\)"
    )
    for call in (
        lambda: optim.LAMB([p], norm_group=value),
        lambda: optim.Adan([p], norm_group=value),
        lambda: clip_grad_norm_([p], 1.0, norm_group=value),
    ):
        with pytest.raises(ValueError, match=error):
            call()
        with mock.patch.object(distributed, "is_available", return_value=False), pytest.raises(ValueError, match=error):
            call()
