# SPDX-License-Identifier: Apache-2.0
"""Values that can be worked out by hand. Each of these once went wrong in a published implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from singlepass import optim

from ..simt.truth import Case
from ..tolerances import BY_HAND, assert_same_bits
from .steps import Place, each_case, each_place, normal
from .trajectory import make_optimizer

G = [0.5, -2.0, 0.0, 1e-3]
P = [1.0, -1.0, 0.5, 0.0]


def parameter(values: list[float] | Tensor, place: Place) -> Parameter:
    return Parameter(torch.as_tensor(values, dtype=torch.float32).clone().to(place.device))


def step(optimizer: torch.optim.Optimizer, *grads: list[float] | None) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    for values in grads:
        p.grad = None if values is None else torch.tensor(values, device=p.device)
        optimizer.step()


def assert_values(actual: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double().cpu(), expected, **BY_HAND)


def moved(p: Parameter, by: list[float]) -> None:
    assert_values(p, torch.tensor(P, dtype=torch.float64) - torch.tensor(by, dtype=torch.float64))


def signs(g: list[float] = G) -> list[float]:
    return torch.tensor(g).sign().tolist()


@each_place
def test_adamw_first_moves_by_the_learning_rate(place: Place) -> None:
    p = parameter(P, place)
    step(optim.AdamW([p], lr=0.1, eps=1e-12, weight_decay=0.0, backend=place.backend), G)
    moved(p, [0.1 * s for s in signs()])


@each_place
def test_lion_takes_signs_and_does_not_move_on_zero(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.Lion([p], lr=0.1, weight_decay=0.0, backend=place.backend)
    step(optimizer, G)
    moved(p, [0.1, -0.1, 0.0, 0.1])
    # The momentum that the next step interpolates was made with beta2, from the momentum before this step.
    assert_values(optimizer.state[p]["exp_avg"], [0.01 * g for g in G])
    step(optimizer, [-0.0008 * math.copysign(1.0, g) if g else 0.0 for g in G])
    # beta1 m + (1 - beta1) g: 0.9 * 0.005 - 0.1 * 0.0008 is positive; for the last, 0.9 * 1e-5 - 8e-5 is negative.
    moved(p, [0.2, -0.2, 0.0, 0.0])


@each_place
def test_lion_decays_weights_apart_from_the_gradient(place: Place) -> None:
    p = parameter(P, place)
    step(optim.Lion([p], lr=0.1, weight_decay=0.5, backend=place.backend), [0.0] * 4)
    assert_values(p, [0.95 * x for x in P])


@each_place
@pytest.mark.parametrize("beta2", [0.999, 0.99, 0.95])
def test_adabelief_is_rectified_from_the_sixth_step(beta2: float, place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.AdaBelief([p], lr=0.1, betas=(0.9, beta2), degenerated_to_sgd=False, backend=place.backend)
    step(optimizer, *[G] * 5)
    assert_values(p, P)
    step(optimizer, G)
    assert ((p.detach().cpu() - torch.tensor(P)).sign() == -torch.tensor(signs())).all()


@each_place
def test_adabelief_first_steps_as_sgd(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.AdaBelief([p], lr=0.1, eps=0.0, backend=place.backend)
    step(optimizer, G)
    moved(p, [0.1 * g for g in G])
    # The residual is taken from the new mean: g - 0.1 g.
    assert_values(optimizer.state[p]["exp_avg_var"], [1e-3 * (0.9 * g) ** 2 for g in G])


@each_place
def test_adabelief_adds_eps_to_the_stored_variance_at_every_step(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.AdaBelief([p], betas=(0.9, 0.5), eps=1e-4, backend=place.backend)
    step(optimizer, *[[0.0] * 4] * 3)
    assert_values(optimizer.state[p]["exp_avg_var"], [1.75e-4] * 4)
    step(optimizer, *[[0.0] * 4] * 40)
    assert_values(optimizer.state[p]["exp_avg_var"], [1e-4 / (1.0 - 0.5)] * 4)


@each_place
def test_adabelief_ignores_the_maximum_while_rectified(place: Place) -> None:
    plain, maximum = parameter(P, place), parameter(P, place)
    for p, amsgrad in ((plain, False), (maximum, True)):
        step(optim.AdaBelief([p], amsgrad=amsgrad, backend=place.backend), *[G] * 5, *[[0.01] * 4] * 5)
    assert_same_bits(plain, maximum)


@each_place
@pytest.mark.parametrize(
    ("no_prox", "decayed"), [(False, lambda p, s: (p - s) / 1.05), (True, lambda p, s: 0.95 * p - s)]
)
def test_adan_first_takes_no_difference(no_prox: bool, decayed: Any, place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.Adan([p], lr=0.1, eps=1e-12, weight_decay=0.5, no_prox=no_prox, backend=place.backend)
    step(optimizer, G)
    assert_values(p, [decayed(x, 0.1 * s) for x, s in zip(P, signs(), strict=True)])
    assert_values(optimizer.state[p]["exp_avg_diff"], [0.0] * 4)
    assert_values(optimizer.state[p]["neg_pre_grad"], [-g for g in G])
    assert_values(optimizer.state[p]["exp_avg_sq"], [0.01 * g * g for g in G])


@each_place
def test_adan_second_step_looks_ahead(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.Adan([p], lr=0.1, backend=place.backend)
    second = [1.5, 1.0, 1.0, 0.0]
    step(optimizer, G, second)
    difference = [b - a for a, b in zip(G, second, strict=True)]
    assert_values(optimizer.state[p]["exp_avg_diff"], [0.08 * d for d in difference])
    lookahead = [g + 0.92 * d for g, d in zip(second, difference, strict=True)]
    expected = [0.99 * 0.01 * g * g + 0.01 * u * u for g, u in zip(G, lookahead, strict=True)]
    assert_values(optimizer.state[p]["exp_avg_sq"], expected)


@each_place
def test_diffgrad_first_friction_is_the_sigmoid_of_the_gradient(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.DiffGrad([p], lr=0.1, eps=1e-12, backend=place.backend)
    step(optimizer, G)
    friction = [1.0 / (1.0 + math.exp(-abs(g))) for g in G]
    moved(p, [0.1 * s * f for s, f in zip(signs(), friction, strict=True)])
    before = p.detach().clone()
    step(optimizer, G)  # unchanged: the friction is one half
    assert_values((before - p).detach(), [0.05 * s for s in signs()])


@each_place
def test_diffgrad_keeps_the_decayed_gradient(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.DiffGrad([p], weight_decay=0.5, backend=place.backend)
    step(optimizer, G)
    assert_values(optimizer.state[p]["previous_grad"], [g + 0.5 * x for g, x in zip(G, P, strict=True)])


@each_place
def test_lamb_scales_the_update_to_the_norm_of_the_parameter(place: Place) -> None:
    p = parameter(P, place)
    options = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-12, "max_grad_norm": 0.0, "backend": place.backend}
    step(optim.LAMB([p], **options), G)
    ratio = math.sqrt(2.25) / math.sqrt(3.0)
    moved(p, [0.1 * ratio * s for s in signs()])
    q = parameter(P, place)
    step(optim.LAMB([q], always_adapt=False, **options), G)
    moved(q, [0.1 * s for s in signs()])


@each_place
@pytest.mark.parametrize("cls", [optim.LAMB, optim.LARS])
def test_the_ratio_is_one_where_a_norm_is_zero(cls: type, place: Place) -> None:
    zero = parameter([0.0] * 4, place)
    options = {"max_grad_norm": 0.0, "eps": 1e-12} if cls is optim.LAMB else {}
    step(cls([zero], lr=0.1, weight_decay=0.0, backend=place.backend, **options), G)
    assert_values(zero, [-0.1 * x for x in (signs() if cls is optim.LAMB else G)])
    p = parameter(P, place)
    step(cls([p], lr=0.1, weight_decay=0.0, backend=place.backend, **options), [0.0] * 4)
    assert_values(p, P)


@each_place
def test_lars_keeps_the_learning_rate_inside_the_momentum(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.LARS([p], lr=2.0, weight_decay=0.1, trust_coefficient=0.01, backend=place.backend)
    step(optimizer, G)
    norm_p, norm_g = math.hypot(*P), math.hypot(*G)
    rate = 0.01 * norm_p / (norm_g + 0.1 * norm_p)
    velocity = [2.0 * rate * (g + 0.1 * x) for g, x in zip(G, P, strict=True)]
    assert_values(optimizer.state[p]["momentum_buffer"], velocity)
    moved(p, velocity)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, G)  # what the momentum holds was scaled by the learning rate of its own step
    moved(p, [1.9 * v for v in velocity])


@each_place
def test_sgdsai_begins_with_the_gradient_itself(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.SGDSaI([p], lr=0.1, weight_decay=0.5, backend=place.backend)
    step(optimizer, G)
    g = torch.tensor(G, dtype=torch.float64)
    gain = float(g.norm() / (g.std() + 1e-8))
    assert_values(optimizer.state[p]["momentum_buffer"], G)
    assert_values(p, [0.95 * x - 0.1 * gain * y for x, y in zip(P, G, strict=True)])


@each_place
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_sgdsai_gives_single_elements_the_gain_one(shape: tuple[int, ...], place: Place) -> None:
    p = Parameter(torch.ones(shape, device=place.device))
    p.grad = torch.full(shape, 0.5, device=place.device)
    optimizer = optim.SGDSaI([p], lr=0.1, weight_decay=0.0, backend=place.backend)
    optimizer.step()
    assert optimizer.state[p]["gsnr"].item() == 1.0
    assert_values(p, torch.full(shape, 0.95))


@each_place
def test_sgdsai_without_momentum_and_with_constant_gradients(place: Place) -> None:
    p = parameter(P, place)
    optimizer = optim.SGDSaI([p], lr=0.1, momentum=0.0, weight_decay=0.0, eps=0.0, backend=place.backend)
    step(optimizer, G, [0.0] * 4)
    assert_values(optimizer.state[p]["momentum_buffer"], [0.0] * 4)
    q = parameter([1.0, 2.0], place)
    constant = optim.SGDSaI([q], backend=place.backend)
    step(constant, [0.0, 0.0])  # no signal, no deviation
    assert constant.state[q]["gsnr"].item() == 0.0


@each_place
@each_case
def test_zero_gradients_and_zero_parameters_stay_zero(case: Case, place: Place) -> None:
    p = parameter([0.0] * 8, place)
    optimizer = make_optimizer(case, [p], backend=place.backend)
    step(optimizer, *[[0.0] * 8] * 4)
    assert torch.equal(p.detach().cpu(), torch.zeros(8))
    assert all(s.isfinite().all() for s in optimizer.state[p].values())


@each_place
@each_case
def test_momentum_outlives_the_gradient(case: Case, place: Place) -> None:
    p = parameter(P, place)
    optimizer = make_optimizer(case, [p], weight_decay=0.0, backend=place.backend)
    step(optimizer, *[G] * 7)  # past the first steps of the rectified variants
    before = p.detach().clone()
    step(optimizer, [0.0] * 4)
    direction = (p.detach() - before).sign().cpu()
    assert torch.equal(direction, -torch.tensor(signs()))


@each_place
@each_case
def test_one_call_makes_one_step(case: Case, place: Place) -> None:
    """An autotuned kernel that updates in place makes several at its first call."""
    once, again = parameter(P, place), parameter(P, place)
    for p in (once, again):
        step(make_optimizer(case, [p], backend=place.backend), G)
    assert_same_bits(once, again)


@each_place
@each_case
def test_gradients_zeroed_in_place_give_the_same_steps_as_new_ones(case: Case, place: Place) -> None:
    """A state that aliases the gradient sees no change of it."""
    fresh, reused = parameter(P, place), parameter(P, place)
    optimizers = [make_optimizer(case, [p], backend=place.backend) for p in (fresh, reused)]
    for k in range(4):
        g = normal((4,), k, device=place.device)
        fresh.grad = g.clone()
        if reused.grad is None:
            reused.grad = torch.zeros_like(reused)
        reused.grad += g
        for optimizer in optimizers:
            optimizer.step()
        optimizers[1].zero_grad(set_to_none=False)
    assert_same_bits(fresh, reused)


@each_place
def test_tiny_gradients_are_not_lost_in_the_states(place: Place) -> None:
    tiny = [1e-9, -1e-9, 3e-12, 0.0]
    p = parameter([0.0] * 4, place)
    optimizer = optim.AdamW([p], lr=1.0, eps=1e-20, weight_decay=0.0, backend=place.backend)
    step(optimizer, tiny)
    assert_values(p, [-s for s in signs(tiny)])
    q = parameter([0.0] * 4, place)
    step(optim.AdamW([q], lr=1.0, eps=1e-8, weight_decay=0.0, backend=place.backend), tiny)
    assert_values(q, [-g / (abs(g) + 1e-8) for g in tiny])


@each_place
@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_rates_of_norms_near_zero_stay_finite(name: str, place: Place) -> None:
    """A rate beyond float32 is its largest number. It was infinite, and so were the weights."""
    p, tiny = parameter([3e3] * 4, place), 2.0**-140
    options = {"eps": 0.0} if name == "LARS" else {"eps": 1e10, "always_adapt": True, "betas": (0.0, 0.0)}
    optimizer = getattr(optim, name)([p], lr=1.0, weight_decay=0.0, backend=place.backend, **options)
    step(optimizer, [tiny, -tiny, 2 * tiny, 0.0] if name == "LARS" else [1e-29] * 4)
    assert bool(p.isfinite().all())
    if name == "LARS":
        largest = torch.finfo(torch.float32).max
        assert_values(p, [3e3 - largest * x for x in (tiny, -tiny, 2 * tiny, 0.0)])
