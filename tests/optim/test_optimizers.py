# SPDX-License-Identifier: Apache-2.0
"""The classes over ten steps and more, against float64: what the step ops get from them is right, and persists."""

from __future__ import annotations

import math

import pytest
import torch

import singlepass

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits, assert_within, ulp
from .steps import DTYPES, Place, each_case, each_place, normal
from .trajectory import Trajectory, give_grads, make_optimizer, make_params

STEPS_TAKEN = 12
SHAPES = [(1,), (5, 7), (), (64,)]

DTYPE_CHOICES = [
    pytest.param((torch.float32,), None, None, id="float32"),
    pytest.param((torch.bfloat16,), None, None, id="bfloat16"),
    pytest.param((torch.bfloat16,), None, "param", id="bfloat16-states-too"),
    pytest.param((torch.float32,), torch.bfloat16, None, id="bfloat16-gradients"),
    pytest.param((torch.float16,), torch.float32, torch.bfloat16, id="float16-float32-bfloat16"),
    pytest.param(DTYPES, None, None, id="all-in-one-group"),
]


def unclipped(case: Case) -> dict[str, float]:
    return {"max_grad_norm": 0.0} if case.rule == "lamb" else {}


@each_place
@pytest.mark.parametrize(("dtypes", "grad_dtype", "state_dtype"), DTYPE_CHOICES)
@each_case
def test_twelve_steps(
    case: Case, place: Place, dtypes: tuple[torch.dtype, ...], grad_dtype: torch.dtype | None, state_dtype
) -> None:
    params = make_params(SHAPES, dtypes, place.device)
    optimizer = make_optimizer(case, params, backend=place.backend, state_dtype=state_dtype, **unclipped(case))
    truth = Trajectory(case, params, dtypes[0] if state_dtype == "param" else state_dtype or torch.float32)
    for step in range(1, STEPS_TAKEN + 1):
        give_grads(params, step, grad_dtype)
        optimizer.step()
        truth.step(optimizer)
    truth.check(optimizer)
    for p in params:
        if "step" in optimizer.state[p]:
            assert optimizer.state[p]["step"].item() == STEPS_TAKEN


@each_case
def test_float64_parameters_have_float64_arithmetic_and_states(case: Case) -> None:
    params = make_params(SHAPES, (torch.float64,))
    optimizer = make_optimizer(case, params, **unclipped(case))
    truth = Trajectory(case, params)
    for step in range(1, STEPS_TAKEN + 1):
        give_grads(params, step)
        optimizer.step()
        truth.step(optimizer)
    truth.check(optimizer)
    assert {optimizer.state[p][name].dtype for p in params for name in truth.names} == {torch.float64}


@each_place
@each_case
def test_maximize_goes_up_the_gradient(case: Case, place: Place) -> None:
    params = make_params(SHAPES, device=place.device)
    optimizer = make_optimizer(case, params, maximize=True, backend=place.backend, **unclipped(case))
    truth = Trajectory(case, params)
    for step in range(1, STEPS_TAKEN + 1):
        give_grads(params, step)
        optimizer.step()
        truth.step(optimizer, factor=-1.0)
    truth.check(optimizer)


@each_place
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "short-enough"])
@pytest.mark.parametrize("case", [c for c in CASES if c.rule in ("adan", "lamb")], ids=lambda case: case.id)
def test_gradients_are_clipped_by_the_norm_of_all_groups(case: Case, max_norm: float, place: Place) -> None:
    params = make_params(SHAPES, device=place.device)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = make_optimizer(case, groups, max_grad_norm=max_norm, backend=place.backend)
    truth = Trajectory(case, params)
    eps = case.hyper["eps"] if case.rule == "adan" else 0.0  # apex divides by the bare norm
    for step in range(1, STEPS_TAKEN + 1):
        give_grads(params, step)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
        optimizer.step()
        truth.step(optimizer, factor=min(1.0, max_norm / (norm + eps)))
    truth.check(optimizer)


def test_lamb_clips_by_one_if_not_told_otherwise() -> None:
    params, others = make_params(SHAPES), make_params(SHAPES)
    for p, other in zip(params, others, strict=True):
        p.grad, other.grad = normal(p.shape, 1), normal(p.shape, 1)
    singlepass.optim.LAMB(params).step()
    singlepass.optim.LAMB(others, max_grad_norm=1.0).step()
    for p, other in zip(params, others, strict=True):
        assert_same_bits(p, other)


@each_place
@each_case
def test_gradients_are_left_as_they_are(case: Case, place: Place) -> None:
    params = make_params(SHAPES, device=place.device)
    clipping = {"max_grad_norm": 0.1} if case.rule in ("adan", "lamb") else {}
    optimizer = make_optimizer(case, params, maximize=True, backend=place.backend, **clipping)
    give_grads(params, 1)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    for p, g in zip(params, before, strict=True):
        assert_same_bits(p.grad, g)


@each_place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gain_of_sgdsai_is_measured_once(place: Place, dtype: torch.dtype) -> None:
    params = make_params([(5, 7), (1000,), (2,)], (dtype,), place.device)
    optimizer = singlepass.optim.SGDSaI(params, lr=1e-4, backend=place.backend)
    give_grads(params, 1)
    truths = [p.grad.double().cpu() for p in params]
    for _ in range(2):
        optimizer.step()
        give_grads(params, 2)
        for p, g in zip(params, truths, strict=True):
            truth = g.norm() / (g.std() + 1e-8)
            # Two float32 reductions and a quotient.
            assert_within(optimizer.state[p]["gsnr"], truth, 4.0 * ulp(truth, torch.float32), "gsnr")
