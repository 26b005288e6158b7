# SPDX-License-Identifier: Apache-2.0
"""Rules with norms in two calls, so that the norms of shards can be added up between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .steps import Mix, Place, Tensors, call, each_place, make_tensors, rule_of, set_grads

NORMED = [case for case in CASES if rule_of(case).has_norms]
each_normed = pytest.mark.parametrize("case", NORMED, ids=lambda case: case.id)

Shapes = Sequence[Sequence[int]]
SHAPES = [(33, 65), (0,), (7,), (), (40000,)]
MIXES = [Mix(), Mix(torch.bfloat16, torch.bfloat16), Mix(torch.float16, torch.float32, torch.bfloat16)]


def step(place: Place, case: Case, tensors: Tensors, **options: Any) -> None:
    call(place.function(rule_of(case).name), case, tensors, **options)


def nans(tensors: Tensors) -> Tensor:
    return torch.full((len(tensors.params), 2), torch.nan, dtype=torch.float64, device=tensors.params[0].device)


def joined(a: Tensors, b: Tensors) -> Tensors:
    states = [s + t for s, t in zip(a.states, b.states, strict=True)]
    return Tensors(a.params + b.params, a.grads + b.grads, states, a.scales + b.scales, a.steps + b.steps)


def assert_same(a: Tensors, b: Tensors) -> None:
    for x, y in zip(a.written(), b.written(), strict=True):
        assert_same_bits(x, y)


@each_place
@pytest.mark.parametrize("options", [{}, {"scale": 3.0, "maximize": True, "seed": 7}], ids=["plain", "all"])
@pytest.mark.parametrize("shapes", [SHAPES[:3]], ids=["shapes"])
@each_normed
def test_two_phases_have_the_bits_of_a_whole_step(
    case: Case, options: dict[str, Any], place: Place, shapes: Shapes
) -> None:
    # Dtypes in turn, so that a backend which sorts tensors by dtype has to find their norms again.
    parts = [make_tensors(case, shapes, mix, device=place.device) for mix in (*MIXES, MIXES[0])]
    whole = joined(joined(parts[0], parts[1]), joined(parts[2], parts[3]))
    apart, options = whole.clone(), dict(options)
    if "scale" in options:
        options["grad_scale"] = torch.tensor(options.pop("scale"), device=place.device)
        options["ids"] = list(range(len(whole.params)))
    for t in range(1, 4):
        for tensors in (whole, apart):
            set_grads(tensors, t)
        step(place, case, whole, **options)
        norms = nans(apart)
        params, steps = [p.clone() for p in apart.params], [s.clone() for s in apart.steps]
        step(place, case, apart, norms=norms, phase=1, **options)
        for now, before in zip(apart.params + apart.steps, params + steps, strict=True):
            assert_same_bits(now, before)
        given = norms.clone()
        step(place, case, apart, norms=norms, phase=2, **options)
        assert torch.equal(norms, given)
        assert_same(apart, whole)


@each_place
@pytest.mark.parametrize("shapes", [SHAPES], ids=["shapes"])
@each_normed
def test_norms_in_float64(case: Case, place: Place, shapes: Shapes) -> None:
    tensors = make_tensors(case, shapes, Mix(), device=place.device)
    set_grads(tensors, 1)
    scale = 3.0
    norms = nans(tensors)
    step(place, case, tensors, norms=norms, phase=1, grad_scale=torch.tensor(scale, device=place.device))
    for i, p in enumerate(tensors.params):
        p = p.double()
        if case.rule == "lars":
            second = tensors.grads[i].double() / scale
        else:  # by the moments that are stored now
            m, v = (values[i].double() for values in tensors.states)
            h = case.hyper
            m, v = m / (1.0 - h["beta1"]), v / (1.0 - h["beta2"])
            second = m / (v.sqrt() + h["eps"]) + h["weight_decay"] * p
        truth = torch.stack((p.square().sum(), second.square().sum()))
        # Squares of float32 are exact in float64. An element of the second vector is a float32 result of at most eight
        # roundings, of terms that may cancel: the sum of the decay and of a quotient of about 1.
        torch.testing.assert_close(norms[i, 0], truth[0], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(norms[i, 1], truth[1], rtol=32 * 2.0**-24, atol=0.0)


@each_place
@each_normed
def test_shards_whose_norms_are_added_step_as_the_whole(case: Case, place: Place) -> None:
    whole = make_tensors(case, [(37, 27), (5,)], Mix(), device=place.device)
    cuts = [slice(0, 11), slice(11, 37)], [slice(0, 5), slice(5, 5)]  # the last one is empty

    def shard(k: int) -> Tensors:
        def part(tensors: list[Tensor]) -> list[Tensor]:
            return [t[cut[k]].clone() for t, cut in zip(tensors, cuts, strict=True)]

        states = [part(values) for values in whole.states]
        return Tensors(part(whole.params), part(whole.grads), states, steps=[s.clone() for s in whole.steps])

    shards = [shard(k) for k in range(2)]
    for t in range(1, 4):
        set_grads(whole, t)
        step(place, case, whole)
        sums = []
        for k, tensors in enumerate(shards):
            tensors.grads = [g[cut[k]].clone() for g, cut in zip(whole.grads, cuts, strict=True)]
            sums.append(nans(tensors))
            step(place, case, tensors, norms=sums[-1], phase=1)
        for tensors in shards:
            step(place, case, tensors, norms=sums[0] + sums[1], phase=2)
    for i, p in enumerate(whole.params):
        actual = torch.cat([tensors.params[i] for tensors in shards])
        # The order of a float64 sum decides at most the last bit of the rate, in each of three steps.
        torch.testing.assert_close(actual, p, rtol=3 * 2.0**-23, atol=3 * 2.0**-23 * case.lr)
    assert [float(s) for tensors in shards for s in tensors.steps] == [3.0] * 4


@each_place
@pytest.mark.parametrize("shapes", [SHAPES], ids=["shapes"])
@each_normed
def test_a_skipped_step_has_zeros_for_norms_and_changes_nothing(case: Case, place: Place, shapes: Shapes) -> None:
    tensors = make_tensors(case, shapes, Mix(), device=place.device)
    set_grads(tensors, 1)
    tensors.grads[0][1, 4] = torch.inf
    before = tensors.clone()
    norms = nans(tensors)
    one = torch.ones((), device=place.device)
    step(place, case, tensors, norms=norms, phase=1, found_inf=one)
    assert torch.equal(norms, torch.zeros_like(norms))
    step(place, case, tensors, norms=norms, phase=2, found_inf=one)
    assert_same(tensors, before)
    # And what is not skipped is a step as any other.
    set_grads(tensors, 1)
    set_grads(before, 1)
    for phase in (1, 2):
        step(place, case, tensors, norms=norms, phase=phase, found_inf=0.0 * one)
    step(place, case, before)
    assert_same(tensors, before)


@each_place
@each_normed
def test_norms_that_do_not_fit_are_refused(case: Case, place: Place) -> None:
    tensors = make_tensors(case, [(7,), (5,)], Mix(), device=place.device)
    set_grads(tensors, 1)
    before = tensors.clone()
    good = nans(tensors)
    in_two = "contiguous float64 norms of shape (2, 2)"
    for options, contract, got in (
        ({"norms": good}, "norms in phases 1 and 2, and only there", "some in phase 0"),
        ({"phase": 1}, "norms in phases 1 and 2, and only there", "none in phase 1"),
        ({"phase": 2}, "norms in phases 1 and 2, and only there", "none in phase 2"),
        ({"norms": good, "phase": 3}, "phase 0, 1 or 2", "3"),
        ({"norms": good, "phase": -1}, "phase 0, 1 or 2", "-1"),
        ({"norms": good[:1], "phase": 1}, in_two, ""),
        ({"norms": good.float(), "phase": 1}, in_two, ""),
        ({"norms": good.t(), "phase": 2}, in_two, ""),
        ({"norms": good.view(4), "phase": 2}, in_two, ""),
    ):
        expected = re.escape(f"{rule_of(case).name}: expected {contract}; got {got}")
        with pytest.raises((RuntimeError, ValueError), match=f"^{expected}"):
            step(place, case, tensors, **options)
    assert_same(tensors, before)
    assert good.isnan().all()


@each_place
@each_normed
def test_no_parameters_have_no_norms(case: Case, place: Place) -> None:
    """A rank may have no shard at all."""
    norms = torch.empty(0, 2, dtype=torch.float64, device=place.device)
    states: list[list[Tensor]] = [[] for _ in rule_of(case).states]
    for phase in (1, 2):
        step(place, case, Tensors([], [], states), norms=norms, phase=phase)
