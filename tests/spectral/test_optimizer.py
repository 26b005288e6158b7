# SPDX-License-Identifier: Apache-2.0
"""The optimizer: rounds, iterations and steps, and what it may change when."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from singlepass.optim import AdamW
from singlepass.spectral import SST, SSTLinear
from singlepass.spectral._decompose import drift
from singlepass.spectral._schedule import Progress, warmup_factor

from ..tolerances import assert_same_bits, assert_within, ulp
from .backends import UNIT
from .training import SCHEDULE, give_gradients, layers_of, model_of, run, snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("project", [False, True])
def test_trajectories_of_fifty_steps(dtype: torch.dtype, project: bool) -> None:
    """Native against eager against float64 through iterations and swaps; rounds are left out, since a decomposition of
    vectors that differ in the last bit may turn the signs of all."""
    schedule = SCHEDULE | {"iterations_per_round": 1000, "project": project}
    states = {}
    for name, backend, wide in (("native", "native", False), ("eager", "eager", False), ("truth", "eager", True)):
        model = model_of(dtype)
        if wide:
            model = copy.deepcopy(model).double()
        optimizer = SST(model, lr=1e-2, weight_decay=0.1, backend=backend, **schedule)
        for i in range(50):
            give_gradients(model_of(dtype), i)
            generator = torch.Generator().manual_seed(i)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype)
            optimizer.step()
        states[name] = model.state_dict()
    for key, native in states["native"].items():
        eager, truth = states["eager"][key].double(), states["truth"][key].double()
        # Every step rounds a parameter once, or a handful of times within one ulp of it.
        allowed = 2 * (eager - truth).abs() + 50 * ulp(truth.abs().clamp(min=0.1), dtype)
        assert_within(native, truth, allowed, key)


def test_frozen_vectors_stay_bitwise_and_active_ones_have_unit_length() -> None:
    for frozen_dtype in (None, torch.bfloat16, torch.int8):
        model = model_of(frozen_dtype=frozen_dtype)
        optimizer = SST(model, lr=1e-2, **SCHEDULE)
        frozen = [[t.clone() for t in (m.frozen_u, m.frozen_v, m.scales_u)] for m in layers_of(model)]
        active = [m.active_u.clone() for m in layers_of(model)]
        run(model, optimizer, 3)
        for layer, kept, moved in zip(layers_of(model), frozen, active, strict=True):
            for now, was in zip((layer.frozen_u, layer.frozen_v, layer.scales_u), kept, strict=True):
                assert_same_bits(now.detach(), was)
            assert (layer.active_u - moved).abs().max() > 1e-4
            for rows in (layer.active_u, layer.active_v):
                assert_within(rows.double().norm(dim=1), torch.ones(3).double(), torch.full((3,), 8 * UNIT), "norms")
            assert layer.singular_values.min() >= 0.0


def test_an_iteration_swaps_what_was_drawn_and_nothing_else() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    run(model, optimizer, 3)
    give_gradients(model, 3)
    moments = {}
    real = optimizer._begin_iteration

    def spied(rank: float | None) -> None:
        moments.update({id(m): (m.factors(), m.weight) for m in layers_of(model)})
        real(rank)

    optimizer._begin_iteration = spied  # type: ignore[method-assign]
    optimizer.step()
    assert optimizer.progress == Progress(round=0, iteration=1, step=0, draws=2)
    for layer in layers_of(model):
        (u, s, v), weight = moments[id(layer)]
        new_u, new_s, new_v = layer.factors()
        # The same triples in another order: each keeps its vectors, value and, below, the value's moments.
        order = [int((u - row).abs().sum(1).argmin()) for row in new_u]
        assert sorted(order) == list(range(len(s)))
        assert order[: layer.rank] != list(range(layer.rank))
        for new, old in ((new_u, u), (new_s, s), (new_v, v)):
            assert_same_bits(new, old[order])
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-6)


def test_moments_of_values_follow_and_those_of_vectors_are_forgotten() -> None:
    for reset in (False, True):
        model = model_of()
        optimizer = SST(model, lr=1e-2, reset_singular_values=reset, **SCHEDULE)
        run(model, optimizer, 3)
        layer = layers_of(model)[0]
        values = optimizer.state[layer.singular_values]
        # An entry of its own for each value, so that the swap can be followed.
        give_gradients(model, 3)
        optimizer.step()
        for p in (layer.active_u, layer.active_v):
            state = optimizer.state[p]
            assert int(state["step"]) == 0
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
        assert int(values["step"]) == (0 if reset else 4)
        assert bool(values["exp_avg"].any()) != reset
        if reset:
            continue
        s, m = layer.singular_values.detach().clone(), values["exp_avg"].clone()
        optimizer._begin_iteration()
        order = [int((s - value).abs().argmin()) for value in layer.singular_values.detach()]
        assert_same_bits(layer.singular_values.detach(), s[order])
        assert_same_bits(values["exp_avg"], m[order])


def test_a_round_ends_with_orthonormal_vectors_and_the_same_weight() -> None:
    model = model_of(torch.float64)
    optimizer = SST(model, lr=3e-2, **SCHEDULE)
    weights = []
    real = optimizer._end_round

    def spied() -> None:
        assert max(drift(*(m.factors()[i] for i in (0, 2))) for m in layers_of(model)) > 1e-3
        weights.extend(m.weight for m in layers_of(model))
        real()
        for layer in layers_of(model):
            assert not optimizer.state[layer.singular_values]["exp_avg"].any()

    optimizer._end_round = spied  # type: ignore[method-assign]
    run(model, optimizer, 12)
    assert optimizer.progress == Progress(round=1, iteration=0, step=0, draws=4)
    for layer, before in zip(layers_of(model), weights, strict=True):
        u, s, v = layer.factors()
        assert drift(u, v) < 1e-12
        torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=1e-13)
        assert torch.linalg.svdvals(before).sort().values.sub(s.sort().values).abs().max() < 1e-12


def test_layers_that_have_not_drifted_are_left_alone() -> None:
    model = model_of()
    optimizer = SST(model, lr=1e-2, tolerance=1e9, **SCHEDULE)
    weights = [m.weight for m in layers_of(model)]
    for _ in range(12):
        optimizer.step()  # no gradients: nothing moves
    assert optimizer.progress.round == 1
    for layer, before in zip(layers_of(model), weights, strict=True):
        torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-6)


def test_gradients_of_vectors_that_were_swapped_are_gone() -> None:
    """Those of singular values, too: they would be in the order of before."""
    model = model_of()
    optimizer = SST(model, lr=1e-2, **SCHEDULE)
    run(model, optimizer, 3)
    assert layers_of(model)[0].active_u.grad is not None
    run(model, optimizer, 1)
    assert layers_of(model)[0].active_u.grad is None
    assert layers_of(model)[0].singular_values.grad is None
    assert layers_of(model)[0].bias.grad is not None


def test_draws_depend_on_the_seed_alone() -> None:
    """As ranks of a data-parallel job have it: other generators, the same draws."""
    taken = []
    for noise, seed in ((1, 0), (2, 0), (1, 7)):
        model = model_of()
        torch.manual_seed(noise)
        optimizer = SST(model, lr=1e-2, seed=seed, **SCHEDULE)
        run(model, optimizer, 9)
        taken.append(snapshot(model))
    for a, b in zip(taken[0], taken[1], strict=True):
        assert_same_bits(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(taken[0], taken[2], strict=True))


def test_layers_made_on_meta() -> None:
    """Memory that was never filled may say anything about draws: factors that are set were not drawn."""
    layer, other = SSTLinear(12, 10, 3), SSTLinear(12, 10, 3, device="meta")
    with pytest.raises(ValueError, match="expected layers that have values; got layers on meta"):
        SST(other)
    other.to_empty(device="cpu").draws.fill_(94184599350064)
    with pytest.raises(ValueError, match=r"drawn 0 to 2147483647 times; got \[94184599350064\]. A model made on meta"):
        SST(other)
    other.set_factors(*layer.factors())
    with torch.no_grad():
        other.bias.copy_(layer.bias)
    for each in (layer, other):
        SST(each)
    for name, value in layer.state_dict().items():
        assert_same_bits(other.state_dict()[name], value, name)
    assert layer.draws == 1
    layer.reset_parameters()
    assert layer.draws == 0


def test_sampling_prefers_large_values_where_asked() -> None:
    counts = {}
    for sampling in ("singular_values", "mixed", "uniform"):
        layer = SSTLinear.from_linear(nn.Linear(32, 32), 4)
        optimizer = SST(layer, sampling=sampling, **SCHEDULE)
        with torch.no_grad():
            layer.singular_values.copy_(torch.cat((torch.ones(16), torch.full((16,), 1e-3))))
        counts[sampling] = 0
        for _ in range(100):
            optimizer._begin_iteration()
            counts[sampling] += int((layer.singular_values[:4] > 0.5).sum())
    # Of 400 draws; a half of the values are large.
    assert counts["singular_values"] > 395
    assert 260 < counts["mixed"] < 340
    assert 160 < counts["uniform"] < 240


def test_warmup() -> None:
    assert [warmup_factor(i, 4, "linear") for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [round(warmup_factor(i, 4, "cosine"), 4) for i in range(5)] == [0.1464, 0.5, 0.8536, 1.0, 1.0]
    assert [warmup_factor(i, steps, "linear") for steps in (0, 1) for i in range(2)] == [1.0] * 4


@pytest.mark.parametrize("warmup_all", [False, True])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_learning_rate_rises_in_every_iteration(shape: str, warmup_all: bool) -> None:
    """The first step of AdamW moves everything by lr, whatever the gradient."""
    model = model_of(torch.float64)
    options = SCHEDULE | {"warmup_steps": 4, "warmup_shape": shape, "warmup_all": warmup_all}
    optimizer = SST(model, lr=1e-3, **options)
    layer, norm = layers_of(model)[0], model[3]
    with torch.no_grad():
        layer.singular_values.add_(1.0)
    values, weight, vectors = (
        layer.singular_values.detach().clone(),
        norm.weight.detach().clone(),
        layer.active_u.detach().clone(),
    )
    give_gradients(model, 0)
    optimizer.step()
    rate = 1e-3 * warmup_factor(0, 4, shape)
    common = rate if warmup_all else 1e-3
    torch.testing.assert_close(
        (layer.singular_values - values).abs(), torch.full_like(values, common), rtol=1e-4, atol=0
    )
    torch.testing.assert_close((norm.weight - weight).abs(), torch.full_like(weight, common), rtol=1e-4, atol=0)
    assert float((layer.active_u - vectors).detach().abs().max()) == pytest.approx(rate, rel=0.6)


def test_weight_decay_is_for_values_and_vectors_on_demand() -> None:
    for decay_vectors in (False, True):
        model = model_of(torch.float64)
        optimizer = SST(model, lr=0.1, weight_decay=0.5, decay_vectors=decay_vectors, **SCHEDULE)
        layer = layers_of(model)[0]
        values, vectors = layer.singular_values.detach().clone(), layer.active_u.detach().clone()
        for p in (layer.singular_values, layer.active_u):
            p.grad = torch.zeros_like(p)
        layer.active_u.grad[:, 0] = 1.0
        optimizer.step()
        torch.testing.assert_close(layer.singular_values.detach(), values * 0.95)
        # Half the rate in the first of two warm-up steps; decay shrinks the rest of a row before it is normalised.
        step = torch.zeros_like(vectors)
        step[:, 0] = 0.05
        want = nn.functional.normalize(vectors * (0.975 if decay_vectors else 1.0) - step)
        torch.testing.assert_close(layer.active_u.detach(), want, rtol=1e-5, atol=1e-6)


def test_projection_takes_the_part_along_the_vector() -> None:
    moments = {}
    for project in (False, True):
        model = model_of(torch.float64)
        optimizer = SST(model, lr=1e-2, project=project, **SCHEDULE)
        layer = layers_of(model)[0]
        u = layer.active_u.detach().clone()
        give_gradients(model, 0)
        g = layer.active_u.grad.clone()
        optimizer.step()
        moments[project] = optimizer.state[layer.active_u]["exp_avg"]
        want = g - (g * u).sum(1, keepdim=True) * u if project else g
        torch.testing.assert_close(moments[project], 0.1 * want)
    assert (moments[True] - moments[False]).abs().max() > 1e-3


def test_rank_schedule() -> None:
    ranks = [5, 5, 2, 0.5]
    model = model_of()
    optimizer = SST(model, lr=1e-2, rank_schedule=lambda draw: ranks[min(draw, 3)], **SCHEDULE)
    seen = []
    loss = torch.zeros(())
    for _ in range(14):
        seen.append(layers_of(model)[0].rank)
        loss = model(torch.randn(7, 12)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen == [5] * 8 + [2] * 4 + [6] * 2
    for layer in layers_of(model):
        assert_within(layer.active_u.double().norm(dim=1), torch.ones(6).double(), torch.full((6,), 8 * UNIT), "norms")
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}
    other = model_of()
    again = SST(other, lr=1e-2, **SCHEDULE)
    other.load_state_dict(model.state_dict())
    assert layers_of(other)[0].rank == 6
    assert again is not None


def test_other_parameters_are_trained_by_adamw() -> None:
    model, dense = model_of(), copy.deepcopy(model_of())
    optimizer = SST(model, lr=1e-2, weight_decay=0.1, **SCHEDULE)
    others = [p for i in (3, 4) for p in dense[i].parameters()] + [dense[i].bias for i in (0, 2)]
    adamw = AdamW(others, lr=1e-2, weight_decay=0.1)
    for step in range(6):
        give_gradients(model, step)
        for name, p in dense.named_parameters():
            p.grad = dict(model.named_parameters())[name].grad if p.requires_grad else None
        optimizer.step()
        adamw.step()
    ours = [p for i in (3, 4) for p in model[i].parameters()] + [model[i].bias for i in (0, 2)]
    for a, b in zip(ours, others, strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_constructing_does_not_change_what_a_model_computes() -> None:
    model, x = model_of(), torch.randn(9, 12)
    before = model(x)
    SST(model, **SCHEDULE)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_the_default_round_may_see_every_vector() -> None:
    layer = SSTLinear(32, 48, 5)
    assert SST(layer).iterations_per_round == 7
