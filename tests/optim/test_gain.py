# SPDX-License-Identifier: Apache-2.0
"""SGDSaI's gain is measured from a gradient that says something, or, if asked for, as the official code does."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from singlepass import optim

from ..tolerances import assert_same_bits
from .steps import Place, each_place, normal

G = [1.0, -2.0, 0.5, 3.0]


def gain_of(*grads: list[float], place: Place, **options: object) -> list[float]:
    """The gain after each step with these gradients."""
    p = Parameter(torch.ones(len(grads[0]), device=place.device))
    optimizer = optim.SGDSaI([p], backend=place.backend, **options)
    gains = []
    for g in grads:
        p.grad = torch.tensor(g, device=place.device)
        optimizer.step()
        gains.append(optimizer.state[p]["gsnr"].item())
    return gains


def measured(g: list[float], eps: float = 1e-8) -> float:
    exact = torch.tensor(g, dtype=torch.float64)
    return float(exact.norm() / (exact.std() + eps))


@each_place
def test_gradients_of_zeros_are_waited_out(place: Place) -> None:
    """As the first matrix of LoRA has: its gradient is zero until the second one has moved."""
    zeros = [0.0] * 4
    assert gain_of(zeros, zeros, G, zeros, place=place) == pytest.approx([0.0, 0.0, measured(G), measured(G)])


@each_place
def test_gradients_that_are_not_numbers_are_waited_out(place: Place) -> None:
    for bad in (math.nan, math.inf):
        assert gain_of([bad, *G[1:]], G, place=place) == pytest.approx([0.0, measured(G)])


@each_place
@pytest.mark.parametrize("n", [2, 100])
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("size", [1e-3, 0.1, 100.0])
def test_gains_without_spread_are_limited(n: int, spread: float, size: float, place: Place) -> None:
    g = [size * (1.0 + spread * (k % 2)) for k in range(n)]
    norm = float(torch.tensor(g, dtype=torch.float64).norm())
    assert gain_of(g, place=place) == pytest.approx([norm / (0.1 * norm / math.sqrt(n) + 1e-8)])


@each_place
def test_the_limit_is_continuous_and_leaves_other_gains_alone(place: Place) -> None:
    for mean in (0.0, 1.0, 5.0, 9.0):
        g = [mean - 1.0, mean + 1.0, mean, mean + 0.5]
        exact = torch.tensor(g, dtype=torch.float64)
        limit = 10.0 * math.sqrt(4)
        assert gain_of(g, place=place) == pytest.approx([min(measured(g), limit)])
        assert exact.std() > 0.08  # the case is what it says


@each_place
def test_the_official_gain_is_an_option(place: Place) -> None:
    zeros, ones = [0.0] * 4, [1.0] * 4
    assert gain_of(zeros, G, place=place, guard_gain=False) == [0.0, 0.0]
    assert gain_of(ones, place=place, guard_gain=False) == pytest.approx([2.0 / 1e-8])
    assert gain_of(G, G[::-1], place=place, guard_gain=False) == pytest.approx([measured(G)] * 2)
    assert gain_of([0.5], place=place, guard_gain=False) == pytest.approx([0.5 / 1e-8])


@each_place
def test_an_overflow_measures_nothing(place: Place) -> None:
    for guard_gain in (True, False):
        p = Parameter(torch.ones(4, device=place.device))
        optimizer = optim.SGDSaI([p], backend=place.backend, guard_gain=guard_gain)
        optimizer.grad_scale = torch.full((), 4.0, device=place.device)
        for found_inf, g in ((1.0, [math.inf, 1.0, 1.0, 1.0]), (1.0, G), (0.0, G), (0.0, [0.0, 0.0, 1.0, 0.0])):
            optimizer.found_inf = torch.full((), found_inf, device=place.device)
            p.grad = 4.0 * torch.tensor(g, device=place.device)
            optimizer.step()
        assert optimizer.state[p]["gsnr"].item() == pytest.approx(measured(G))


@pytest.mark.parametrize("first", [[0.0] * 4, G], ids=["zeros", "values"])
def test_compiled_steps_measure_the_same_gains(first: list[float]) -> None:
    torch._dynamo.reset()
    compiled, plain = (Parameter(torch.ones(4)) for _ in range(2))
    optimizers = [optim.SGDSaI([p]) for p in (compiled, plain)]
    steps = [torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager"), optimizers[1].step]
    for g in (first, first, G[::-1], G):
        for p, step in zip((compiled, plain), steps, strict=True):
            p.grad = torch.tensor(g)
            step()
    assert_same_bits(compiled, plain)
    assert_same_bits(optimizers[0].state[compiled]["gsnr"], optimizers[1].state[plain]["gsnr"])


@each_place
def test_tensors_that_wait_do_not_disturb_those_that_do_not(place: Place) -> None:
    waits, goes, alone = (Parameter(torch.ones(4, device=place.device)) for _ in range(3))
    together = optim.SGDSaI([waits, goes], backend=place.backend)
    expected = optim.SGDSaI([alone], backend=place.backend)
    for step in range(1, 5):
        waits.grad = torch.zeros(4, device=place.device)
        goes.grad = normal((4,), step, device=place.device)
        alone.grad = goes.grad.clone()
        together.step()
        expected.step()
    assert_same_bits(goes, alone)
    assert together.state[waits]["gsnr"].item() == 0.0


def test_a_state_that_the_official_code_stopped_trains_again() -> None:
    (p,) = params = [Parameter(torch.ones(4))]
    optimizer = optim.SGDSaI(params, weight_decay=0.0)
    state = {"momentum_buffer": torch.zeros(4), "gsnr": torch.zeros(())}
    group = {"params": [0], "lr": 0.1, "momentum": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    p.grad = torch.tensor(G)
    optimizer.step()
    assert optimizer.state[p]["gsnr"].item() == pytest.approx(measured(G))
    assert not torch.equal(p, torch.ones(4))


def test_lora_trains_both_matrices() -> None:
    torch.manual_seed(0)
    a, b = Parameter(torch.randn(2, 8)), Parameter(torch.zeros(4, 2))
    optimizer = optim.SGDSaI([a, b], lr=1e-3)
    start, x, y = a.detach().clone(), torch.randn(16, 8), torch.randn(16, 4)
    for _ in range(3):
        optimizer.zero_grad()
        (x @ (b @ a).mT - y).square().mean().backward()
        optimizer.step()
    decay = (1.0 - 1e-3 * 1e-2) ** 3
    assert not torch.allclose(a, start * decay, rtol=1e-6), "only weight decay has moved it"


@each_place
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_gains_of_gradients_whose_squares_are_no_float32(size: float, place: Place) -> None:
    g = [size * value for value in G]
    exact = torch.tensor(G, dtype=torch.float64)
    expected = float(exact.norm() / (exact.std() + 1e-8 / size))
    assert gain_of(g, place=place) == pytest.approx([expected], rel=1e-5)


def waiting_and_measured() -> tuple[optim.SGDSaI, Parameter, Parameter]:
    """An optimizer of two parameters, of which one waits for a gradient that is not zero."""
    waits, goes = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = optim.SGDSaI([{"params": [waits]}, {"params": [goes]}])
    step_of(optimizer, {waits: [0.0] * 4, goes: G})
    return optimizer, waits, goes


def step_of(optimizer: optim.SGDSaI, grads: dict[Parameter, list[float]]) -> None:
    for p, g in grads.items():
        p.grad = torch.tensor(g)
    optimizer.step()


def test_a_tensor_that_waits_may_leave_and_come_back() -> None:
    optimizer, waits, goes = waiting_and_measured()
    group = optimizer.param_groups.pop(0)
    for _ in range(3):
        step_of(optimizer, {goes: G})
    optimizer.param_groups.insert(0, group)
    step_of(optimizer, {waits: G, goes: G})
    assert optimizer.state[waits]["gsnr"].item() == pytest.approx(measured(G))


def test_a_state_that_waits_may_be_handed_on() -> None:
    optimizer, waits, goes = waiting_and_measured()
    for _ in range(2):
        step_of(optimizer, {waits: G, goes: G})
    other, heir = optim.SGDSaI([waits_too := Parameter(torch.ones(4))]), Parameter(torch.ones(4))
    step_of(other, {waits_too: [0.0] * 4})
    optimizer.state[heir] = other.state.pop(waits_too)
    optimizer.param_groups[0]["params"] = [heir]
    step_of(optimizer, {heir: G, goes: G})
    assert optimizer.state[heir]["gsnr"].item() == pytest.approx(measured(G))


def test_a_gain_written_over_is_looked_at_again() -> None:
    optimizer, _, goes = waiting_and_measured()
    step_of(optimizer, {goes: G})
    optimizer.state[goes]["gsnr"].zero_()
    step_of(optimizer, {goes: [2.0 * g for g in G]})
    assert optimizer.state[goes]["gsnr"].item() == pytest.approx(measured(G))


def test_the_guard_may_be_switched_on_later() -> None:
    (p,) = params = [Parameter(torch.ones(4))]
    optimizer = optim.SGDSaI(params, guard_gain=False)
    for _ in range(2):
        step_of(optimizer, {p: [0.0] * 4})
    optimizer.param_groups[0]["guard_gain"] = True
    step_of(optimizer, {p: G})
    assert optimizer.state[p]["gsnr"].item() == pytest.approx(measured(G))
