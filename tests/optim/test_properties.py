# SPDX-License-Identifier: Apache-2.0
"""Whatever the shapes, strides, dtypes, alignment and options, in one list of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..simt.truth import CASES, Case
from ..tolerances import assert_close, assert_same_bits
from .steps import (
    DTYPES,
    Place,
    Tensors,
    call,
    each_kernel,
    normal,
    rule_of,
    step_and_check,
)

shapes = st.lists(st.integers(0, 12), max_size=4).map(tuple) | st.integers(1020, 1030).map(lambda n: (n,))
dtypes = st.sampled_from(DTYPES)
offsets = st.integers(0, 7)


def place_in_memory(t: Tensor, order: list[int], offset: int) -> Tensor:
    """A dense copy with its dimensions in this order in memory, beginning ``offset`` elements into a storage."""
    storage = torch.full((t.numel() + 8,), math.nan, dtype=t.dtype, device=t.device)
    flat = storage[offset : offset + t.numel()]
    inverse = [order.index(k) for k in range(len(order))]
    return flat.view([t.shape[k] for k in order]).permute(inverse).copy_(t)


@st.composite
def step_inputs(draw: st.DrawFn) -> tuple[Case, Tensors, dict[str, Any]]:
    case = draw(st.sampled_from(CASES))
    state_dtype = draw(dtypes)
    state_count = len(rule_of(case).states) - (case.rule in ("adamw", "adabelief"))
    tensors = Tensors([], [], [[] for _ in range(state_count)])
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4))):
        order = draw(st.permutations(range(len(shape))))
        grad_order = draw(st.just(order) | st.permutations(range(len(shape))))
        scale = draw(st.sampled_from([1.0, 0.01]))
        param = normal(shape, i, draw(dtypes))
        tensors.params.append(place_in_memory(param, order, draw(offsets)))
        grad = (scale * normal(shape, 100 + i)).to(draw(dtypes))
        tensors.grads.append(place_in_memory(grad, grad_order, draw(offsets)))
        for values in tensors.states:
            values.append(place_in_memory(torch.zeros(shape, dtype=state_dtype), order, draw(offsets)))
        tensors.steps.append(torch.zeros(()))
        if rule_of(case).scale:
            tensors.scales.append(torch.tensor(1.0 + i))
    options: dict[str, Any] = {"maximize": draw(st.booleans())}
    if draw(st.booleans()):
        options["grad_scale"] = torch.tensor(draw(st.sampled_from([0.5, 3.0])))
    if draw(st.booleans()):
        options["found_inf"] = torch.zeros(1)
    return case, tensors, options


def on(device: str, tensors: Tensors) -> Tensors:
    """On another device, without the places in memory."""
    if device == "cpu":
        return tensors

    def move(values: list[Tensor]) -> list[Tensor]:
        return [t.to(device) for t in values]

    states = [move(values) for values in tensors.states]
    return Tensors(move(tensors.params), move(tensors.grads), states, move(tensors.scales), move(tensors.steps))


@each_kernel
@given(inputs=step_inputs())
def test_two_steps_are_right(place: Place, inputs: tuple[Case, Tensors, dict[str, Any]]) -> None:
    case, tensors, options = inputs
    tensors = on(place.device, tensors)
    options = {k: v.to(place.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    factor = (-1.0 if options["maximize"] else 1.0) / float(options.get("grad_scale", 1.0))
    for t in (1, 2):
        step_and_check(place, case, tensors, t, factor=factor, **options)
        for g in tensors.grads:
            g.neg_()


@each_kernel
@given(inputs=step_inputs(), seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**20))
def test_stochastic_rounding_draws_as_eager_does(
    place: Place, inputs: tuple[Case, Tensors, dict[str, Any]], seed: int, first: int
) -> None:
    _, tensors, _ = inputs
    lion = next(case for case in CASES if case.rule == "lion")
    params = [p.to(torch.bfloat16) for p in tensors.params]
    tensors = Tensors(params, tensors.grads, [[torch.zeros_like(p) for p in params]], [], tensors.steps)
    tensors = on(place.device, tensors)
    eager = tensors.clone()
    for where, values in ((place, tensors), (Place("eager", place.device), eager)):
        ids = list(range(first, first + len(params)))
        call(where.function("lion_step_"), lion, values, seed=seed, ids=ids)
    for a, b in zip(tensors.written(), eager.written(), strict=True):
        assert_same_bits(a, b)


@each_kernel
@given(inputs=step_inputs(), max_norm=st.sampled_from([0.0, 0.5, 1e3]), eps=st.sampled_from([0.0, 1e-6]))
def test_norms_are_right(
    place: Place, inputs: tuple[Case, Tensors, dict[str, Any]], max_norm: float, eps: float
) -> None:
    grads = on(place.device, inputs[1]).grads
    options = {"max_norm": max_norm, "eps": eps, "grad_scale": torch.tensor(2.0, device=place.device)}
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads)) / 2.0
    clip = min(1.0, max_norm / (norm + eps)) if max_norm > 0.0 and norm + eps > 0.0 else 1.0
    truth = torch.tensor([norm, 2.0 / clip, 0.0], dtype=torch.float64)
    actual, eager = (Place(b, place.device).function("grad_norm")(grads, **options) for b in (place.backend, "eager"))
    assert_close("grad_norm", actual, eager, truth)
