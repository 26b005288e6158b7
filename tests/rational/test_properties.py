# SPDX-License-Identifier: Apache-2.0
"""Rational functions of tensors of any shape, memory order, gaps and alignment, against float64 within bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .inputs import NAMES, Inputs, check

GROUPS = (1, 2, 3, 4, 8)


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    rank = draw(st.integers(1, 4))
    channel_dim = draw(st.integers(-rank, rank - 1))
    groups = draw(st.sampled_from(GROUPS))
    sizes = [draw(st.integers(0, 9)) for _ in range(rank)]
    sizes[channel_dim] = groups * draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(list(NAMES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor() -> Tensor:
        """Every dimension may be longer in memory, or taken in steps; memory may be in any order, anywhere."""
        order = draw(st.permutations(range(rank)))
        steps = [draw(st.sampled_from((1, 1, 1, 2))) for _ in range(rank)]
        longer = [size * step + draw(st.integers(0, 1)) for size, step in zip(sizes, steps, strict=True)]
        offset = draw(st.integers(0, 3))
        memory = torch.randn(offset + math.prod(longer), generator=generator).to(dtype)
        stored = memory[offset:].view([longer[d] for d in order])
        placed = stored.permute([order.index(d) for d in range(rank)])
        return placed[tuple(slice(0, size * step, step) for size, step in zip(sizes, steps, strict=True))]

    form = draw(st.sampled_from("ABCD"))
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    shared = draw(st.sampled_from([(1, groups), (groups, 1), (groups, groups)]))
    x = tensor()
    drawn = Inputs(
        x=x,
        numerator=torch.randn(shared[0], m + 1, generator=generator),
        denominator=torch.randn(shared[1], n + (form == "C"), generator=generator),
        bias=torch.randn(sizes[channel_dim], generator=generator) if draw(st.booleans()) else None,
        gate=tensor() if draw(st.booleans()) else None,
        grad=tensor(),
        form=form,
        channel_dim=channel_dim,
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
    )
    for leaf in drawn.leaves:
        leaf.requires_grad_()
    return drawn


@given(inputs())
def test_any_tensor(drawn: Inputs) -> None:
    results = drawn.results("native")
    assert results[0].stride() == torch.empty_like(drawn.x).stride()
    if drawn.x.numel() == 0:
        assert not any(bool(grad.any()) for grad in results)
        return
    check(results, drawn.bounds(), str(tuple(drawn.x.shape)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_any_tensor_on_a_gpu(backend: str) -> None:
    @given(inputs())
    def run(drawn: Inputs) -> None:
        names = ("x", "numerator", "denominator", "bias", "gate", "grad")
        moved = {n: None if (t := getattr(drawn, n)) is None else t.detach().cuda() for n in names}
        there = Inputs(**moved, form=drawn.form, channel_dim=drawn.channel_dim, dropout=drawn.dropout)
        for leaf in there.leaves:
            leaf.requires_grad_()
        results = there.results(backend)
        if drawn.x.numel() > 0:
            check(results, there.bounds(), backend)

    run()
