# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of sharded parameters: shards draw numbers of their own, and replicas the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

from singlepass import optim

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import EXACT, Twins, mesh_of, place, rows, whole
from .test_groups import NAMES

ROUNDED = {"stochastic_rounding": True, "seed": 7}
# SST rounds nothing at random.
each_exact = pytest.mark.parametrize("name", [name for name in EXACT if name != "SST"])


@pytest.mark.parametrize("backend", ["native", "eager"])
@each_exact
@on_ranks(2)
def test_rows_round_as_in_one_process(name: str, backend: str) -> None:
    """Wherever a shard begins: its elements draw by their places in the whole tensor."""
    shapes = [(6, 4), (5, 7), (1, 9), (3,), (33, 5)]
    options = ROUNDED | {"backend": backend}
    twins = Twins(name, mesh_of(2), rows, shapes=shapes, dtype=torch.bfloat16, options=options)
    for step in range(1, 4):
        twins.step(step)
    twins.assert_same(exact=True)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["sharded", "replicated"])
@on_ranks(2)
def test_rows_of_meshes_with_replicas(sizes: tuple[int, int]) -> None:
    twins = Twins("AdamW", mesh_of(*sizes), lambda i: [Replicate(), Shard(0)], dtype=torch.bfloat16, options=ROUNDED)
    for step in range(1, 3):
        twins.step(step)
    twins.assert_same(exact=True)


def rounded(placement: Shard | Replicate, shape: tuple[int, ...]) -> Tensor:
    """The part of this rank after one step that moves each element by a third of what bfloat16 tells apart."""
    p = Parameter(place(torch.ones(shape, dtype=torch.bfloat16), mesh_of(2), [placement]))
    optimizer = optim.Lion([p], lr=2.0**-7 / 3.0, stochastic_rounding=True)
    optimizer.param_groups[0]["seed"] = 7
    p.grad = place(torch.full(shape, -1.0, dtype=torch.bfloat16), mesh_of(2), [placement])
    optimizer.step()
    return p.to_local().detach()


def of_both(t: Tensor) -> list[Tensor]:
    both = [torch.empty_like(t) for _ in range(2)]
    distributed.all_gather(both, t.contiguous())
    return both


@on_ranks(2)
def test_other_shards_draw_numbers_of_their_own() -> None:
    first = rounded(Shard(1), (64, 128))
    assert_same_bits(first, rounded(Shard(1), (64, 128)))  # and the same in each run
    mine, theirs = of_both((first != 1.0).float())
    agreeing = float((mine == theirs).float().mean())
    # Two independent draws of 4096 elements agree in 5 of 9, give or take 0.008; the bound is ten times as wide.
    assert abs(agreeing - 5.0 / 9.0) < 0.08
    assert abs(float(mine.mean()) - 1.0 / 3.0) < 0.08


@on_ranks(2)
def test_replicas_draw_the_same_numbers() -> None:
    part = rounded(Replicate(), (64, 128))
    assert 0.0 < float((part != 1.0).float().mean()) < 1.0
    assert_same_bits(*of_both(part.float()))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXACT])
@on_ranks(2)
def test_rules_with_norms(name: str) -> None:
    """As near to one process as one rounding: norms in another order may round an element the other way."""
    twins = Twins(name, mesh_of(2), rows, dtype=torch.bfloat16, options=ROUNDED)
    twins.step(1)
    for p, q in zip(twins.params, twins.twins, strict=True):
        assert torch.allclose(whole(p).float(), q.float(), rtol=2.0**-7, atol=2.0**-7)
        assert float((whole(p) == q).float().mean()) > 0.9
