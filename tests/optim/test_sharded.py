# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters on two ranks train as the same tensors in one process do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from singlepass import optim

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import EXACT, SHAPES, Twins, in_many_ways, mesh_of, place, rows, step_both, twice, whole
from .steps import normal
from .test_groups import NAMES, OPTIONS, groups_of, make

each_optimizer = pytest.mark.parametrize("name", NAMES)
each_exact = pytest.mark.parametrize("name", EXACT)


@each_optimizer
@on_ranks(2)
def test_rows(name: str) -> None:
    """Even and uneven shards, and empty ones."""
    twins = Twins(name, mesh_of(2), rows)
    for step in range(1, 4):
        twins.step(step)
    twins.assert_same(exact=name in EXACT)


@each_optimizer
@on_ranks(2)
def test_placements_in_one_group(name: str) -> None:
    """Rows, columns, replicas and plain tensors beside each other, some of them without gradients at times."""
    twins = Twins(name, mesh_of(2), in_many_ways)
    for step in range(1, 5):
        twins.step(step, missing=[step % len(SHAPES)])
    twins.assert_same(exact=name in EXACT)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["sharded", "replicated"])
@each_optimizer
@on_ranks(2)
def test_meshes_of_two_dimensions(name: str, sizes: tuple[int, int]) -> None:
    """As HSDP has."""
    twins = Twins(name, mesh_of(*sizes), lambda i: [Replicate(), Shard(0)])
    for step in range(1, 3):
        twins.step(step)
    twins.assert_same(exact=name in EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("name", ["AdamW", "Adan", "Lion"])
@on_ranks(2)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    twins = Twins(name, mesh_of(2), rows, dtype=dtype)
    for step in range(1, 4):
        twins.step(step)
    twins.assert_same(exact=True)


@pytest.mark.parametrize("name", optim._OPTIMIZERS)
@on_ranks(2)
def test_fully_shard(name: str) -> None:
    """The gradients of FSDP2 itself, and a model whose dimensions do not divide by the number of ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    oracle = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    oracle.load_state_dict(model.state_dict())
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh_of(2))
    optimizer = make(name, [{"params": list(model.parameters())}])
    expected = make(name, [{"params": list(oracle.parameters())}])
    for step in range(1, 4):
        model(normal((4, 5), step)).square().mean().backward()
        for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
            q.grad = whole(p.grad)
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        if name in EXACT:
            assert_same_bits(whole(p), q)
        assert torch.allclose(whole(p), q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", optim._OPTIMIZERS)
@on_ranks(2)
def test_distributed_data_parallel(name: str) -> None:
    """Ranks see different data, and stay the same."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(5, 3))
    optimizer = make(name, [{"params": list(model.parameters())}])
    for step in range(1, 4):
        optimizer.zero_grad()
        model(normal((4, 5), 10 * step + distributed.get_rank())).square().mean().backward()
        optimizer.step()
    for p in model.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        distributed.all_gather(both, p.detach())
        assert_same_bits(*both)


@pytest.mark.parametrize("backend", ["native", "eager"])
@each_optimizer
@on_ranks(2)
def test_backends(name: str, backend: str) -> None:
    twins = Twins(name, mesh_of(2), in_many_ways, options={"backend": backend})
    for step in range(1, 3):
        twins.step(step)
    twins.assert_same(exact=name in EXACT)


@pytest.mark.parametrize("name", optim._OPTIMIZERS)
@on_ranks(2)
def test_zero_redundancy_optimizer(name: str) -> None:
    """Whole tensors, each stepped by one rank for all. Clipping: test_norm_group_under_torch.py."""
    params, twins = twice()
    options = {"lr": 1e-2, "weight_decay": 0.1} | OPTIONS.get(name, {})
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=getattr(optim, name), **options)
    expected = make(name, [{"params": twins}])
    step_both(optimizer, params, expected, twins)
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)


@each_exact
@on_ranks(2)
def test_a_rank_without_a_gradient_keeps_its_part(name: str) -> None:
    twins = Twins(name, mesh_of(2), rows)
    twins.step(1)
    before = twins.params[0].detach().full_tensor().clone()
    twins.give_grads(2)
    if distributed.get_rank() == 1:
        twins.params[0].grad = None
    twins.optimizer.step()
    twins.twin.step()
    after = whole(twins.params[0])
    assert_same_bits(after[:3], twins.twins[0][:3])
    assert_same_bits(after[3:], before[3:])


@each_exact
@on_ranks(2)
def test_ranks_without_parameters(name: str) -> None:
    """Where no rule looks at all of a tensor, a rank may have nothing to step."""
    mine = [Parameter(torch.ones(3))] if distributed.get_rank() == 0 else []
    optimizer = make(name, [{"params": mine}])
    for p in mine:
        p.grad = torch.ones(3)
    optimizer.step()
    assert all((p != 1.0).all() for p in mine)


@each_optimizer
@on_ranks(2)
def test_parameters_made_on_meta(name: str) -> None:
    """The optimizer is made before there is memory, as torchtitan and accelerate do."""
    model = nn.Linear(3, 5, device="meta")
    fully_shard(model, mesh=mesh_of(2))
    optimizer = make(name, [{"params": list(model.parameters())}])
    model.to_empty(device="cpu")
    twins = [Parameter(normal(p.shape, i)) for i, p in enumerate(model.parameters())]
    expected = make(name, [{"params": twins}])
    assert [id(p) for p in groups_of(optimizer)[0]["params"]] == [id(p) for p in model.parameters()]
    with torch.no_grad():
        for p, q in zip(model.parameters(), twins, strict=True):
            p.copy_(place(q, mesh_of(2), [Shard(0)]))
    for step in range(1, 3):
        for i, (p, q) in enumerate(zip(model.parameters(), twins, strict=True)):
            q.grad = normal(q.shape, 100 * step + i)
            p.grad = place(q.grad, mesh_of(2), [Shard(0)])
        optimizer.step()
        expected.step()
    for p, q in zip(model.parameters(), twins, strict=True):
        assert torch.allclose(whole(p), q, rtol=1e-6, atol=1e-6)


@each_optimizer
@on_ranks(2)
def test_parameters_swapped_after_the_optimizer_is_made(name: str) -> None:
    """As accelerate does: ``group["params"]`` gets the sharded parameters of a model that was wrapped afterwards."""
    twins = Twins(name, mesh_of(2), rows)
    optimizer = make(name, [{"params": [Parameter(q.detach().clone()) for q in twins.twins]}])
    for group, theirs in zip(groups_of(optimizer), groups_of(twins.optimizer), strict=False):
        group["params"], group["lr"] = twins.params, theirs["lr"]
    for group in groups_of(twins.twin):
        group["lr"] = 2e-2
    twins.optimizer = optimizer
    for step in range(1, 3):
        twins.step(step)
    twins.assert_same(exact=name in EXACT)


@each_optimizer
@on_ranks(2)
def test_states_of_whole_tensors_follow_parameters_that_are_sharded_later(name: str) -> None:
    twins = Twins(name, mesh_of(2), lambda i: None)
    twins.step(1)
    twins.placements = [[Shard(0)] for _ in SHAPES]
    moved = []
    for i, p in enumerate(twins.params):
        moved.append(Parameter(twins.placed(i, p)))
        twins.optimizer.state[moved[i]] = twins.optimizer.state.pop(p)
    half = len(moved) // 2
    first, second = groups_of(twins.optimizer)
    first["params"], second["params"], twins.params = moved[:half], moved[half:], moved
    twins.step(2)
    twins.assert_same(exact=name in EXACT)


@each_optimizer
@on_ranks(2)
def test_gradients_of_another_placement_are_refused(name: str) -> None:
    """On every rank, and nothing is changed."""
    for wrong in (
        lambda t: t,
        lambda t: place(t, mesh_of(2), [Replicate()]),
        lambda t: place(t, mesh_of(1, 2), [Replicate(), Shard(0)]),
    ):
        twins = Twins(name, mesh_of(2), rows)
        twins.step(1)
        twins.give_grads(2)
        twins.params[1].grad = wrong(twins.twins[1].grad)
        with pytest.raises(RuntimeError, match="a gradient placed as its parameter"):
            twins.optimizer.step()
        twins.assert_same(exact=name in EXACT)


@each_optimizer
@on_ranks(2)
def test_sums_that_are_still_to_be_made_are_refused(name: str) -> None:
    p = Parameter(DTensor.from_local(torch.ones(4, 3), mesh_of(2), [Partial()]))
    with pytest.raises(ValueError, match=r"parameters placed by Shard or Replicate; got \(Partial"):
        make(name, [{"params": [p]}])
    twins = Twins(name, mesh_of(2), lambda i: [Replicate()])
    twins.give_grads(1)
    twins.params[2].grad = DTensor.from_local(twins.twins[2].grad.clone(), mesh_of(2), [Partial()])
    with pytest.raises(RuntimeError, match=r"a gradient placed as its parameter.*; got \(Partial"):
        twins.optimizer.step()
    for p, q in zip(twins.params, twins.twins, strict=True):
        assert_same_bits(whole(p), q)
        assert "exp_avg" not in twins.optimizer.state.get(p, {})


@on_ranks(2)
def test_an_element_of_another_rank_counts() -> None:
    """Whether a first step at a rate of 0 is one is decided by the whole gradient."""
    p = Parameter(place(torch.ones(4), mesh_of(2), [Shard(0)]))
    optimizer = optim.AdamW([p], lr=0.0)
    p.grad = place(torch.tensor([0.0, 0.0, 0.0, 1.0]), mesh_of(2), [Shard(0)])
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1.0


class DTensorOps(TorchDispatchMode):
    """Notes the operators that run on DTensors: each takes the host some 100 us."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [str(func)] * any(issubclass(kind, DTensor) for kind in types)
        return func(*args, **kwargs or {})


@each_optimizer
@on_ranks(2)
def test_no_operator_runs_on_dtensors(name: str) -> None:
    twins = Twins(name, mesh_of(2), in_many_ways)
    for step in (1, 2):
        twins.step(step)
    twins.give_grads(3)
    with DTensorOps() as ops:
        twins.optimizer.step()
    assert ops.seen == []


@pytest.mark.deep("torch.compile")
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
@on_ranks(2, limit=600.0)
def test_compiled_steps(name: str) -> None:
    torch._dynamo.reset()
    twins = Twins(name, mesh_of(2), rows, shapes=[(5, 7), (3,)])
    for group in (*twins.optimizer.param_groups, *twins.twin.param_groups):
        group["lr"] = torch.tensor(1e-2)
    step_ = torch.compile(twins.optimizer.step, backend="aot_eager")
    for step in range(1, 4):
        twins.give_grads(step)
        step_()
        twins.twin.step()
    twins.assert_same(exact=name in EXACT)
