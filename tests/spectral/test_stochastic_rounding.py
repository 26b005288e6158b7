# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of what is trained in pure bfloat16: unbiased, reproducible, the same on every backend."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singlepass.spectral import SST

from ..placed import implementation
from ..tolerances import assert_same_bits, same_bits, ulp
from .backends import each_backend, each_kernel
from .training import SCHEDULE, give_gradients, layers_of, model_of, run, snapshot

BFLOAT16 = torch.bfloat16
HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
# Rows that begin anywhere in a block of eight random numbers, and one that is longer than what kernels hold of it.
SHAPES: list[tuple[int, ...]] = [(3, 1), (5, 7), (5, 8), (4, 12), (3, 130), (2, 11279), (1,), (9,), (3000,)]


def tensors_of(dtype: torch.dtype = BFLOAT16) -> list[Tensor]:
    """Unit rows and values."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(normalize(t) if t.dim() == 2 else 1.0 + t.abs()).to(BFLOAT16).to(dtype) for t in drawn]


def stepped(backend: str, dtype: torch.dtype = BFLOAT16, project: bool = True, **rounding: object) -> list[Tensor]:
    """Parameters after one step from the same place, with float32 states."""
    params = tensors_of(dtype)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
    wide = torch.promote_types(dtype, torch.float32)
    states = [[torch.zeros_like(p, dtype=wide) for p in params] for _ in range(2)]
    counts = [torch.zeros(()) for _ in params]
    lr = torch.tensor(1e-4, dtype=torch.float64)
    run = implementation("spectral_step_", backend)
    run(params, grads, *states, counts, lr, **HYPER, project=project, **rounding)
    return params


def drawn_by(seed: int, first_id: int = 0) -> dict[str, object]:
    return {"seed": seed, "ids": list(range(first_id, first_id + len(SHAPES)))}


@each_backend
def test_unbiased_and_next_to_the_truth(backend: str) -> None:
    seeds = 200 if backend in ("native", "eager") else 4
    exact = stepped("eager", torch.float64, project=False)
    outcomes = [stepped(backend, project=False, **drawn_by(seed)) for seed in range(seeds)]
    for i, truth in enumerate(exact):
        found = torch.stack([values[i].double() for values in outcomes])
        slack = 1e-5 * truth.abs()  # of the float32 arithmetic before
        spacing = ulp(truth.abs() + slack, BFLOAT16)
        assert ((found - truth).abs() <= spacing + slack).all(), SHAPES[i]
        # The average of all elements, whose variance is at most a quarter of the squared spacing each.
        deviation = (0.25 * spacing.square()).sum().sqrt() / math.sqrt(seeds)
        assert (found.mean(0) - truth).sum().abs() <= 5.0 * deviation + slack.sum(), SHAPES[i]
        assert truth.numel() < 100 or not same_bits(outcomes[0][i], outcomes[1][i])


@each_kernel
@pytest.mark.parametrize("project", [False, True])
def test_every_element_draws_the_numbers_that_it_draws_in_eager(project: bool, backend: str) -> None:
    """Sums of a row in another order turn few roundings; numbers of another element would turn a third of all."""
    ours, eager = (stepped(name, project=project, **drawn_by(5, 3)) for name in (backend, "eager"))
    for a, b in zip(ours, eager, strict=True):
        if a.dim() == 1:
            assert_same_bits(a, b)
        else:
            assert (a != b).double().mean() <= 0.01


@each_kernel
def test_it_depends_on_seed_and_id(backend: str) -> None:
    results = [stepped(backend, **options) for options in (drawn_by(1), drawn_by(2), drawn_by(1, 7), drawn_by(1))]
    assert not any(same_bits(results[0][-1], other[-1]) for other in results[1:3])
    assert all(map(same_bits, results[0], results[3]))


@each_backend
def test_only_bfloat16_is_rounded_so(backend: str) -> None:
    for dtype in (torch.float32, torch.float16):
        plain, drawn = stepped(backend, dtype), stepped(backend, dtype, **drawn_by(1))
        assert all(map(same_bits, plain, drawn))


@each_backend
def test_ids_that_do_not_fit_change_nothing(backend: str) -> None:
    params, before = tensors_of(), tensors_of()
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    counts = [torch.zeros(()) for _ in params]
    lists = (params, [torch.ones_like(p) for p in params], *states, counts)
    with pytest.raises((ValueError, RuntimeError), match="spectral_step_: expected"):
        implementation("spectral_step_", backend)(*lists, torch.tensor(0.1), **HYPER, seed=1, ids=[0])
    assert all(map(same_bits, params, before))


def test_small_steps_of_singular_values_add_up() -> None:
    """At this rate rounding to the nearest leaves all of them where they are."""
    moved = {}
    kinds = {"truth": (torch.float32, False), "nearest": (BFLOAT16, False), "ours": (BFLOAT16, True)}
    for name, (dtype, stochastic) in kinds.items():
        model = model_of(dtype, rank=12)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.singular_values.fill_(1.0)
        optimizer = SST(model, lr=1e-4, stochastic_rounding=stochastic, steps_per_iteration=1000, warmup_steps=0)
        for _ in range(60):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = torch.cat([layer.singular_values.detach().double() - 1.0 for layer in layers_of(model)])
    assert (moved["nearest"] == 0.0).all()
    truth = moved["truth"].mean()
    # Each value is a sum of roundings by 2^-8, of which 60 * 1e-4 * 2^8 are expected.
    deviation = 2.0**-8 * math.sqrt(60 * 1e-4 * 2.0**8 / len(moved["ours"]))
    assert (moved["ours"].mean() - truth).abs() < 4.0 * deviation < 0.8 * truth.abs()


def test_numbers_are_new_after_each_draw() -> None:
    """Counts of steps begin anew with each draw, by which numbers are drawn too."""
    model = model_of(BFLOAT16, rank=12)  # all vectors, so that each draw has the same ones
    optimizer = SST(model, lr=1e-3, stochastic_rounding=True, **SCHEDULE | {"iterations_per_round": 1000})
    results = []
    for _ in range(2):
        for layer, start in zip(layers_of(model), layers_of(model_of(BFLOAT16, rank=12)), strict=True):
            with torch.no_grad():
                layer.active_u.copy_(start.active_u)
        give_gradients(model, 0)
        optimizer.step()
        results.append([layer.active_u.clone() for layer in layers_of(model)])
        run(model, optimizer, SCHEDULE["steps_per_iteration"] - 1)
    assert not any(map(same_bits, *results))


def test_training_resumes_bit_for_bit() -> None:
    torch.manual_seed(1)
    model = model_of(BFLOAT16)
    optimizer = SST(model, lr=1e-3, seed=4, stochastic_rounding=True, **SCHEDULE)
    run(model, optimizer, 6)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, 9, start=6)
    torch.manual_seed(2)
    other = model_of(BFLOAT16)
    resumed = SST(other, lr=1e-3, seed=4, stochastic_rounding=True, **SCHEDULE)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, 9, start=6)
    for a, b in zip(snapshot(model), snapshot(other), strict=True):
        assert_same_bits(a, b)


def test_the_seed_of_the_draws_is_that_of_rounding() -> None:
    """So that ranks with generators of their own stay together."""
    results = []
    for noise, seed in ((1, 0), (2, 0), (1, 7)):
        model = model_of(BFLOAT16, rank=12)
        torch.manual_seed(noise)
        optimizer = SST(model, lr=1e-3, seed=seed, stochastic_rounding=True, **SCHEDULE)
        run(model, optimizer, 2)
        results.append(snapshot(model))
    assert all(map(same_bits, results[0], results[1]))
    assert not all(map(same_bits, results[0], results[2]))
