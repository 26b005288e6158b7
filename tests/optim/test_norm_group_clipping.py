# SPDX-License-Identifier: Apache-2.0
"""``clip_grad_norm_`` of plain gradients that are spread over ranks, against all of them in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from singlepass.optim import clip_grad_norm_

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import SHAPES
from .steps import normal
from .test_norm_group import mine
from .test_sharded_norms import count_collectives

each_way = pytest.mark.parametrize("how", ["whole", "flat"])


class Gradients:
    """What this rank has of some gradients, and all of them."""

    def __init__(self, how: str, dtype: torch.dtype = torch.float32) -> None:
        self.how, self.all = how, [normal(shape, 50 + i, dtype) for i, shape in enumerate(SHAPES)]
        self.params = [Parameter(torch.zeros_like(g)) for g in self.mine]
        for p, g in zip(self.params, self.mine, strict=True):
            p.grad = g

    @property
    def mine(self) -> list[Tensor]:
        return mine(self.all, self.how)

    def clip(self, max_norm: float, **options: Any) -> Tensor:
        return clip_grad_norm_(self.params, max_norm, norm_group=distributed.group.WORLD, **options)

    def assert_unchanged(self) -> None:
        for p, old in zip(self.params, self.mine, strict=True):
            assert p.grad is not None
            assert_same_bits(p.grad, old)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_way
@on_ranks(2)
def test_clipping_is_that_of_one_process(how: str, dtype: torch.dtype, max_norm: float) -> None:
    """As in one process, bit for bit but for the order of a sum in float64, and of the same bits on each rank."""
    grads, twins = Gradients(how, dtype), [Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for q, g in zip(twins, grads.all, strict=True):
        q.grad = g.clone()
    expected = clip_grad_norm_(twins, max_norm)
    counts: list[int] = []
    with count_collectives(counts):
        norm = grads.clip(max_norm)
    assert counts == [1 + 2]
    torch.testing.assert_close(norm, expected, rtol=torch.finfo(norm.dtype).eps, atol=0)
    both = [torch.empty_like(norm) for _ in range(2)]
    distributed.all_gather(both, norm)
    assert_same_bits(*both)
    for p, g in zip(grads.params, mine([q.grad for q in twins], how), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=2 * torch.finfo(dtype).eps, atol=0)


@each_way
@on_ranks(2)
def test_an_infinity_on_one_rank(how: str) -> None:
    grads = Gradients(how)
    if distributed.get_rank() == 1:
        grads.params[0].grad.view(-1)[0] = torch.inf
    with pytest.raises(RuntimeError, match="expected a finite norm of all gradients; got inf"):
        grads.clip(1.0, error_if_nonfinite=True)
    assert grads.clip(1.0) == torch.inf
    for p in grads.params:
        assert (p.grad.isnan() | (p.grad == 0.0)).all()


# What one rank does, or all do, and the error of its own.
REFUSED: dict[str, tuple[Any, str]] = {
    "norm": (lambda grads: grads.clip(1.0, norm_type=1.0), "norm_type 2.0 with norm_group; got 1.0"),
    "max_norm": (lambda grads: grads.clip(-1.0), "max_norm >= 0; got -1.0"),
    "sparse": (
        lambda grads: (setattr(grads.params[0], "grad", grads.mine[0].to_sparse()), grads.clip(1.0)),
        "plain, dense, floating-point gradients for a norm over ranks",
    ),
}


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on-one-rank"])
@pytest.mark.parametrize("wrong", REFUSED)
@each_way
@on_ranks(2)
def test_what_is_refused(how: str, wrong: str, everywhere: bool) -> None:
    grads, (act, error) = Gradients(how), REFUSED[wrong]
    if everywhere or distributed.get_rank() == 1:
        with pytest.raises(ValueError, match=f"clip_grad_norm_: expected {error}"):
            act(grads)
        grads.params[0].grad = grads.mine[0]
    else:
        with pytest.raises(RuntimeError, match="every rank to take part; got an exception on another rank"):
            grads.clip(1.0)
    for p, old in zip(grads.params[1:], grads.mine[1:], strict=True):
        assert_same_bits(p.grad, old)
