# SPDX-License-Identifier: Apache-2.0
"""``clip_grad_norm_`` of sharded gradients on two ranks, against the same tensors in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import Parameter

from singlepass.optim import clip_grad_norm_
from singlepass.optim._exchange import Exchange

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import SHAPES, in_many_ways, mesh_of, place, rows, whole
from .steps import normal
from .test_sharded import DTensorOps
from .test_sharded_norms import count_collectives

Placements = Callable[[int], Sequence[Placement] | None]
in_both_ways = pytest.mark.parametrize("placements", [rows, in_many_ways], ids=["rows", "many"])


class Gradients:
    """Of parameters placed on ranks, and the same ones whole."""

    def __init__(self, placements: Placements = rows, dtype: torch.dtype = torch.float32, mesh: Any = None) -> None:
        self.whole = [normal(shape, 50 + i, dtype) for i, shape in enumerate(SHAPES)]
        mesh = mesh or mesh_of(2)
        self.params = []
        for i, g in enumerate(self.whole):
            where = placements(i)
            p, q = (t.clone() if where is None else place(t, mesh, where) for t in (torch.zeros_like(g), g))
            self.params.append(Parameter(p))
            self.params[i].grad = q

    @property
    def norm(self) -> Tensor:
        return torch.cat([g.double().flatten() for g in self.whole]).norm()

    def assert_scaled(self, factor: float) -> None:
        """By a factor that is rounded twice, as the product is once, and then to the gradient's dtype."""
        for p, old in zip(self.params, self.whole, strict=True):
            assert p.grad is not None
            bound = (4 * 2**-24 + torch.finfo(old.dtype).eps / 2) * factor * old.double().abs()
            assert ((whole(p.grad).double() - factor * old.double()).abs() <= bound).all()

    def assert_unchanged(self) -> None:
        for p, old in zip(self.params, self.whole, strict=True):
            assert p.grad is not None
            assert_same_bits(whole(p.grad), old)


def assert_norm(norm: Tensor, truth: Tensor) -> None:
    """A plain tensor, rounded once from float64, and the same on both ranks."""
    assert type(norm) is Tensor
    assert norm.dim() == 0
    torch.testing.assert_close(norm.double(), truth, rtol=torch.finfo(norm.dtype).eps, atol=0)
    both = [torch.empty_like(norm) for _ in range(2)]
    distributed.all_gather(both, norm)
    assert_same_bits(*both)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@in_both_ways
@on_ranks(2)
def test_clipping_is_that_of_one_process(placements: Placements, dtype: torch.dtype, max_norm: float) -> None:
    """Shards may be uneven or empty, and plain tensors and replicas beside them count once."""
    grads = Gradients(placements, dtype)
    counts: list[int] = []
    with count_collectives(counts), DTensorOps() as ops:
        norm = clip_grad_norm_(grads.params, max_norm)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_norm(norm, grads.norm)
    grads.assert_scaled(min(1.0, max_norm / (float(grads.norm) + 1e-6)))
    assert counts == [1 + 2]  # one sum, and what ranks say beside it
    assert ops.seen == []  # each would take the host some 100 us


@on_ranks(2)
def test_as_torch_does_it() -> None:
    ours, theirs = Gradients(), Gradients()
    expected = torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
    assert isinstance(expected, DTensor)
    torch.testing.assert_close(clip_grad_norm_(ours.params, 0.5), expected.full_tensor(), rtol=1e-6, atol=0)
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(whole(p.grad), whole(q.grad), rtol=1e-6, atol=0)


@on_ranks(2)
def test_other_norms_are_torchs() -> None:
    ours, theirs = Gradients(), Gradients()
    norms = [clip(some.params, 0.5, 1.0) for clip, some in (
        (clip_grad_norm_, ours), (torch.nn.utils.clip_grad_norm_, theirs)
    )]  # fmt: skip
    assert_same_bits(*map(whole, norms))
    for p, q in zip(ours.params, theirs.params, strict=True):
        assert_same_bits(whole(p.grad), whole(q.grad))


@on_ranks(2)
def test_sharded_gradients_of_plain_parameters_are_torchs() -> None:
    p, g = Parameter(torch.zeros(4)), torch.arange(4.0)
    p.grad = place(g, mesh_of(2), [Shard(0)])
    norm = clip_grad_norm_([p], 1.0)
    torch.testing.assert_close(whole(norm), g.norm())
    torch.testing.assert_close(whole(p.grad), g / g.norm())


@on_ranks(2)
def test_meshes_beside_each_other() -> None:
    """Of torch's function, that is refused."""
    first, second = Gradients(), Gradients(lambda i: [Replicate(), Shard(0)], mesh=mesh_of(1, 2))
    truth = (first.norm**2 + second.norm**2).sqrt()
    assert_norm(clip_grad_norm_([*first.params, *second.params], 0.5), truth)
    for grads in (first, second):
        grads.assert_scaled(0.5 / (float(truth) + 1e-6))


@on_ranks(2)
def test_replicas_alone_need_nobody() -> None:
    grads, counts = Gradients(lambda i: [Replicate()]), []  # type: ignore[var-annotated]
    with count_collectives(counts):
        norm = clip_grad_norm_(grads.params, 0.5)
    assert counts == []
    assert_norm(norm, grads.norm)


@pytest.mark.parametrize("lacks", ["one", "all"])
@in_both_ways
@on_ranks(2)
def test_a_rank_that_lacks_gradients(placements: Placements, lacks: str) -> None:
    """It counts as zeros, and nobody waits."""
    grads = Gradients(placements)
    lacking = range(len(SHAPES)) if lacks == "all" else (0,)
    mine = distributed.get_rank() == 1
    sharded = [i for i in lacking if placements(i) not in (None, [Replicate()])]
    held = [torch.zeros(0, dtype=torch.float64)]
    for i in sharded:
        g = grads.params[i].grad
        assert isinstance(g, DTensor)
        held.append(g.to_local().double().flatten())
        if mine:
            grads.params[i].grad = None
    squares = torch.cat(held).square().sum().reshape(1) * mine
    distributed.all_reduce(squares)
    norm = clip_grad_norm_(grads.params, 0.5)
    assert_norm(norm, (grads.norm**2 - squares[0]).sqrt())


@pytest.mark.parametrize("raises", [True, False])
@on_ranks(2)
def test_an_infinity_on_one_rank(raises: bool) -> None:
    """All ranks see it."""
    grads = Gradients(in_many_ways)
    if distributed.get_rank() == 1:
        grads.params[0].grad.to_local()[0] = torch.inf
    grads.whole[0][3] = torch.inf
    if raises:
        with pytest.raises(RuntimeError, match="expected a finite norm of all gradients; got inf"):
            clip_grad_norm_(grads.params, 1.0, error_if_nonfinite=True)
        grads.assert_unchanged()
    else:
        assert clip_grad_norm_(grads.params, 1.0) == torch.inf
        for p in grads.params:
            g = whole(p.grad)
            assert (g.isnan() | (g == 0.0)).all()


# The position of the parameter, what is wrong about its gradient, and the error.
WRONG: dict[str, tuple[int, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "partial": (
        0,
        lambda g: DTensor.from_local(g, mesh_of(2), [Partial()]),
        RuntimeError,
        r"a gradient placed as its parameter.*got \(Partial.*Redistribute it",
    ),
    "replicas": (0, lambda g: place(g, mesh_of(2), [Replicate()]), RuntimeError, "a gradient placed as its parameter"),
    "plain": (0, lambda g: g, RuntimeError, "a gradient placed as its parameter"),
    "sparse": (1, Tensor.to_sparse, ValueError, "plain, dense, floating-point gradients for a norm over ranks"),
}


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on-one-rank"])
@pytest.mark.parametrize("wrong", WRONG)
@on_ranks(2)
def test_gradients_that_are_refused(wrong: str, everywhere: bool) -> None:
    """On all ranks, if only one has such a gradient."""
    grads = Gradients(in_many_ways)
    i, make_wrong, error, contract = WRONG[wrong]
    good, bad = grads.params[i].grad, make_wrong(grads.whole[i])
    if everywhere or distributed.get_rank() == 1:
        grads.params[i].grad = bad
    else:
        error, contract = RuntimeError, "every rank to take part; got an exception on another rank"
    with pytest.raises(error, match=f"clip_grad_norm_: expected {contract}"):
        clip_grad_norm_(grads.params, 0.5)
    grads.params[i].grad = good
    grads.assert_unchanged()


@on_ranks(2)
def test_other_arguments_that_are_refused() -> None:
    grads = Gradients()
    max_norm = [0.5, -1.0][distributed.get_rank()]
    with pytest.raises((ValueError, RuntimeError), match=r"max_norm >= 0; got -1|got an exception on another rank"):
        clip_grad_norm_(grads.params, max_norm)
    grads.assert_unchanged()
    p = Parameter(DTensor.from_local(torch.ones(4, 3), mesh_of(2), [Partial()]))
    p.grad = DTensor.from_local(torch.ones(4, 3), mesh_of(2), [Partial()])
    with pytest.raises(ValueError, match=r"parameters placed by Shard or Replicate; got \(Partial"):
        clip_grad_norm_([p], 0.5)


@on_ranks(2)
def test_on_a_gpu_an_exception_on_another_rank_gives_no_norm() -> None:
    """There it comes as a tensor, which the host does not read."""
    grads = Gradients()
    with mock.patch.object(Exchange, "add_up", return_value=torch.ones(())):
        assert clip_grad_norm_(grads.params, 0.5).isnan()
    grads.assert_unchanged()
