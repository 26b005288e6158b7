# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other in a step: norms of whole tensors, clipping, and that one of them cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import Replicate, Shard

from singlepass import optim

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import EXACT, SHAPES, Twins, in_many_ways, mesh_of, rows, whole
from .test_groups import NAMES

each_optimizer = pytest.mark.parametrize("name", NAMES)
CLIPPED = {"max_grad_norm": 0.5}
CLIPPING = [("LAMB", CLIPPED), ("Adan", CLIPPED)]
with_options = pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in NAMES), *CLIPPING],
    ids=[*NAMES, *(f"{name}-clipped" for name, _ in CLIPPING)],
)


@contextmanager
def count_collectives(counts: list[int]) -> Iterator[None]:
    """Notes how many numbers each all-reduce adds up."""
    original = distributed.all_reduce

    def all_reduce(t: Tensor, *args: Any, **options: Any) -> Any:
        counts.append(t.numel())
        return original(t, *args, **options)

    distributed.all_reduce = all_reduce
    try:
        yield
    finally:
        distributed.all_reduce = original


@pytest.mark.parametrize("placements", [rows, in_many_ways], ids=["rows", "many"])
@pytest.mark.parametrize(("name", "options"), CLIPPING, ids=["LAMB", "Adan"])
@on_ranks(2)
def test_clipping(name: str, options: dict[str, Any], placements: Any) -> None:
    """By the norm of all gradients: of plain parameters and replicas once, of shards on all ranks."""
    twins = Twins(name, mesh_of(2), placements, options=options)
    for step in range(1, 4):
        twins.step(step)
    twins.assert_same(exact=False)


@with_options
@on_ranks(2)
def test_what_a_step_communicates(name: str, options: dict[str, Any]) -> None:
    twins = Twins(name, mesh_of(2), rows, options=options)
    n = len(SHAPES)
    counts: list[int] = []
    with count_collectives(counts):
        for step in range(1, 4):
            twins.give_grads(step)
            twins.optimizer.step()
    first, each = {
        "LAMB": ([], [1 + 2, 2 * n + 2]),
        "LARS": ([], [2 * n + 2]),
        "SGDSaI": ([4 * n + 2], []),
        "Adan": ([], [1 + 2] * bool(options)),
    }.get(name, ([], []))
    assert counts == first + 3 * each


@with_options
@on_ranks(2)
def test_an_infinity_on_one_rank_skips_the_step_on_all(name: str, options: dict[str, Any]) -> None:
    """Where the optimizer looks for it itself. Whoever communicates anyway says it there; all others in one round."""
    twins = Twins(name, mesh_of(2), in_many_ways, options=options)
    for step in range(1, 4):
        twins.give_grads(step)
        for optimizer in (twins.optimizer, twins.twin):
            optimizer.grad_scale = torch.tensor(4.0)
        if step == 2:
            if distributed.get_rank() == 1:
                twins.params[0].grad.to_local()[0] = torch.inf
            twins.twins[0].grad[3] = torch.inf
        counts: list[int] = []
        with count_collectives(counts):
            twins.optimizer.step()
        assert len(counts) == {"LAMB": 2, "LARS": 2, "SGDSaI": 1 + (step == 1)}.get(name, 1)
        twins.twin.step()
    twins.assert_same(exact=name in EXACT and not options)


@pytest.mark.parametrize("name", ["LAMB", "LARS", "SGDSaI"])
@on_ranks(2)
def test_found_inf_of_one_rank_skips_the_step_on_all(name: str) -> None:
    twins = Twins(name, mesh_of(2), rows)
    for optimizer in (twins.optimizer, twins.twin):
        optimizer.grad_scale = torch.tensor(4.0)
    for step, found in enumerate((1.0, 0.0, 1.0), 1):
        twins.give_grads(step)
        mine = found * (distributed.get_rank() == 0 or name == "SGDSaI")
        twins.optimizer.found_inf, twins.twin.found_inf = torch.tensor(mine), torch.tensor(found)
        twins.optimizer.step()
        twins.twin.step()
    twins.assert_same(exact=False)


@with_options
@on_ranks(2)
def test_a_rank_that_cannot_go_on(name: str, options: dict[str, Any]) -> None:
    """The others do not wait for it. Whoever communicates raises too, and nothing is changed."""
    communicates = name in ("LAMB", "LARS") or bool(options)
    twins = Twins(name, mesh_of(2), rows, options=options)
    for step in (1, 2):
        twins.step(step)
    twins.give_grads(3)
    mine = distributed.get_rank() == 1
    if mine:
        twins.params[0].grad = twins.twins[0].grad  # whole, and not a DTensor
    if mine or communicates:
        contract = (
            "a gradient placed as its parameter" if mine else "every rank to take part; got an exception on another"
        )
        with pytest.raises(RuntimeError, match=contract):
            twins.optimizer.step()
        if communicates:
            twins.assert_same(exact=False)
    else:
        twins.optimizer.step()
    distributed.barrier()


@on_ranks(2)
def test_a_rank_that_cannot_go_on_in_the_first_step() -> None:
    twins = Twins("SGDSaI", mesh_of(2), rows)
    twins.give_grads(1)
    before = [whole(p).clone() for p in twins.params]
    if distributed.get_rank() == 0:
        twins.params[3].grad = twins.twins[3].grad
    with pytest.raises(RuntimeError, match="SGDSaI: expected"):
        twins.optimizer.step()
    for p, old in zip(twins.params, before, strict=True):
        assert_same_bits(whole(p), old)


@with_options
@on_ranks(2)
def test_a_gradient_that_one_rank_lacks(name: str, options: dict[str, Any]) -> None:
    """No rank waits for another, in this step or in later ones; its part stays as it is."""
    twins = Twins(name, mesh_of(2), rows, options=options)
    for step in range(1, 4):
        twins.give_grads(step)
        if step < 3 and distributed.get_rank() == 1:
            for p in twins.params[: 2 * step]:
                p.grad = None
        kept = [p.to_local().clone() for p in twins.params]
        twins.optimizer.step()
        for p, old in zip(twins.params, kept, strict=True):
            if p.grad is None:
                assert_same_bits(p.to_local(), old)
            elif p.to_local().numel() > 1:
                assert not torch.equal(p.to_local(), old)


@on_ranks(2)
def test_gains_are_those_of_whole_tensors() -> None:
    """Of gradients far from zero with hardly any spread, too, whose sums of squares would say nothing of it."""
    for guard in (True, False):
        twins = Twins("SGDSaI", mesh_of(2), rows)
        for optimizer in (twins.optimizer, twins.twin):
            for group in optimizer.param_groups:
                group["guard_gain"] = guard
        twins.give_grads(1)
        for p, q in zip(twins.params, twins.twins, strict=True):
            q.grad.mul_(1e-3).add_(100.0)
            p.grad = twins.placed(0, q.grad)
        twins.optimizer.step()
        twins.twin.step()
        for p, q in zip(twins.params, twins.twins, strict=True):
            gain, expected = (o.state[t]["gsnr"] for o, t in ((twins.optimizer, p), (twins.twin, q)))
            assert torch.allclose(gain, expected, rtol=1e-6, atol=0.0)


@on_ranks(2)
def test_replicas_are_not_added_up() -> None:
    """A mesh of two dimensions, of which one holds copies."""
    for sizes in ((1, 2), (2, 1)):
        for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(1), Shard(0)]):
            for name in ("LAMB", "LARS"):
                shapes = [(6, 4), (5, 7), (2, 3, 5)]
                twins = Twins(
                    name,
                    mesh_of(*sizes),
                    lambda i, where=placements: where,
                    shapes=shapes,
                    options=CLIPPED if name == "LAMB" else {},
                )
                for step in range(1, 3):
                    twins.step(step)
                twins.assert_same(exact=False)


@on_ranks(2)
def test_meshes_beside_each_other() -> None:
    """One norm of the gradients on all meshes, and one round of each."""
    for name in ("LAMB", "LARS", "SGDSaI", "Adan"):
        twins = Twins(name, mesh_of(2), rows, options=CLIPPED if name in ("LAMB", "Adan") else {})
        other = Twins(name, mesh_of(1, 2), lambda i: [Replicate(), Shard(0)])
        for mine, theirs in ((twins.optimizer, other.params), (twins.twin, other.twins)):
            mine.add_param_group({"params": theirs} | (CLIPPED if name in ("LAMB", "Adan") else {}))
        for step in range(1, 3):
            twins.give_grads(step)
            other.give_grads(10 * step)
            twins.optimizer.step()
            twins.twin.step()
        twins.assert_same(exact=False)
        for p, q in zip(other.params, other.twins, strict=True):
            assert torch.allclose(whole(p), q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", optim._OPTIMIZERS)
@on_ranks(2)
def test_steps_without_any_gradient(name: str) -> None:
    twins = Twins(name, mesh_of(2), rows)
    for step in range(1, 4):
        twins.give_grads(step, missing=range(len(SHAPES)) if step == 2 else ())
        twins.optimizer.step()
        twins.twin.step()
    twins.assert_same(exact=name in EXACT)


@each_optimizer
@on_ranks(2)
def test_hyperparameters_that_differ_are_found_where_torch_looks_for_such(name: str) -> None:
    """By TORCH_DISTRIBUTED_DEBUG=DETAIL: the same error on every rank, and nothing is changed."""
    twins = Twins(name, mesh_of(2), rows)
    distributed.set_debug_level(distributed.DebugLevel.DETAIL)
    try:
        twins.step(1)
        twins.give_grads(2)
        last = len(twins.optimizer.param_groups) - 1
        twins.optimizer.param_groups[last]["lr"] = [0.1, 0.2][distributed.get_rank()]
        with pytest.raises(ValueError, match=rf"lr of group {last} alike on all ranks; got 0\.1, 0\.2"):
            twins.optimizer.step()
    finally:
        distributed.set_debug_level(distributed.DebugLevel.OFF)
    twins.assert_same(exact=name in EXACT)


@each_optimizer
@on_ranks(2)
def test_a_warm_up_from_zero_with_a_rank_that_has_no_gradient_yet(name: str) -> None:
    """The others have states then, and it has none: all must still agree on what they tell each other."""
    twins = Twins(name, mesh_of(2), rows)
    for optimizer in (twins.optimizer, twins.twin):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    before = [whole(p).clone() for p in twins.params]
    for step in (1, 2, 3):
        twins.give_grads(step)
        if distributed.get_rank() == 1 and step < 3:
            for p in twins.params:
                p.grad = None
        twins.optimizer.step()
    for p, old in zip(twins.params, before, strict=True):
        assert_same_bits(whole(p), old)
    for group in twins.optimizer.param_groups:
        group["lr"] = 1e-2
    twins.give_grads(4)
    twins.optimizer.step()
    assert all(not torch.equal(whole(p), old) for p, old in zip(twins.params, before, strict=True))
