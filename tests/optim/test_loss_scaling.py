# SPDX-License-Identifier: Apache-2.0
"""GradScaler's contract: gradients are unscaled in the step, and a step that overflowed changes nothing."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .steps import Mix, Place, call, each_case, each_place, make_tensors, normal, rule_of, set_grads, step_and_check
from .trajectory import CLASSES, contents, give_grads, make_optimizer, make_params, train

SHAPES = [(5, 7), (1,), (64,)]
each_class = pytest.mark.parametrize("name", sorted(CLASSES))


def optimizer_of(name: str, params, **options):
    case = next(case for case in CASES if rule_of(case).rule == name)
    return make_optimizer(case, params, **options)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert_same_bits(value, b[name], name)


@each_place
@pytest.mark.parametrize(
    "options", [{"grad_scale": 3.0}, {"grad_scale": 0.7, "maximize": True}], ids=["scaled", "maximized"]
)
@each_case
def test_ops_divide_by_the_scale(case: Case, options: dict, place: Place) -> None:
    tensors = make_tensors(case, SHAPES, Mix(), device=place.device)
    factor = (-1.0 if options.get("maximize") else 1.0) / options["grad_scale"]
    scale = torch.tensor([options["grad_scale"]], device=place.device)
    for t in range(1, 4):
        set_grads(tensors, t)
        step_and_check(place, case, tensors, t, factor=factor, **options | {"grad_scale": scale})


@each_place
@each_case
def test_ops_change_nothing_where_an_overflow_was_found(case: Case, place: Place) -> None:
    tensors = make_tensors(case, SHAPES, Mix(), device=place.device)
    function = place.function(rule_of(case).name)
    for t, found in ((1, 0.0), (2, 1.0), (3, 0.0)):
        set_grads(tensors, t)
        before = tensors.clone().written()
        call(function, case, tensors, found_inf=torch.tensor([found], device=place.device))
        same = [torch.equal(a, b) for a, b in zip(tensors.written(), before, strict=True)]
        assert all(same) if found else not same[0]


@each_place
@each_class
@pytest.mark.parametrize("unscale_first", [False, True], ids=["unscaled-in-the-step", "unscaled-before"])
def test_a_scaled_loss_trains_like_an_unscaled_one(unscale_first: bool, name: str, place: Place) -> None:
    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**12, growth_interval=2)
    plain, scaled = (make_params(SHAPES, device=place.device) for _ in range(2))
    optimizers = [optimizer_of(name, params, backend=place.backend) for params in (plain, scaled)]
    for step in range(1, 8):
        give_grads(plain, step)
        optimizers[0].step()
        optimizers[1].zero_grad()
        scaler.scale(sum((p * q.grad).sum() for p, q in zip(scaled, plain, strict=True))).backward()
        if unscale_first:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
    assert scaler.get_scale() > 2.0**12
    assert_same(*(contents(optimizer) for optimizer in optimizers))  # powers of two scale without rounding


@each_place
@each_class
@pytest.mark.parametrize("overflow_at", [1, 3], ids=["first-step", "third-step"])
def test_an_overflow_leaves_parameters_states_and_counters_alone(name: str, overflow_at: int, place: Place) -> None:
    scaler = torch.amp.GradScaler(place.device, init_scale=4.0)
    scaler.scale(torch.zeros((), device=place.device))
    params, undisturbed = (make_params(SHAPES, device=place.device) for _ in range(2))
    optimizer = optimizer_of(name, params, backend=place.backend)
    expected = optimizer_of(name, undisturbed, backend=place.backend)
    for step in range(1, 6):
        give_grads(params, step)
        for p in params:
            p.grad *= 4.0
        if step == overflow_at:
            params[1].grad[0] = math.inf
        before = contents(optimizer)
        scaler.step(optimizer)
        if step == overflow_at:
            after = contents(optimizer)
            assert_same(before, {key: after[key] for key in before})
            assert all(not value.any() for key, value in after.items() if key not in before)
        else:
            give_grads(undisturbed, step)
            expected.step()
        scaler.update(4.0)
    assert_same(contents(optimizer), contents(expected))


@each_place
@each_class
def test_a_state_saved_after_an_overflow_loads(name: str, place: Place) -> None:
    def after_overflow():
        params = make_params(SHAPES, device=place.device)
        optimizer = optimizer_of(name, params, backend=place.backend)
        give_grads(params, 1)
        optimizer.found_inf = torch.tensor(1.0, device=place.device)
        optimizer.step()
        del optimizer.found_inf
        return optimizer

    saved = after_overflow()
    loaded = optimizer_of(name, make_params(SHAPES, device=place.device), backend=place.backend)
    loaded.load_state_dict(saved.state_dict())
    for optimizer in (saved, loaded):
        train(optimizer, 3)
    assert_same(contents(saved), contents(loaded))


@each_place
@each_class
def test_a_scale_set_by_hand_also_looks_for_overflows(name: str, place: Place) -> None:
    params, plain = (make_params(SHAPES, device=place.device) for _ in range(2))
    optimizer, expected = (optimizer_of(name, ps, backend=place.backend) for ps in (params, plain))
    optimizer.grad_scale = torch.tensor(8.0, device=place.device)
    for step in range(1, 5):
        give_grads(params, step)
        for p in params:
            p.grad *= 8.0
        if step == 3:
            params[0].grad[0, 0] = math.nan
            before = contents(optimizer)
            optimizer.step()
            assert_same(contents(optimizer), before)
            continue
        optimizer.step()
        give_grads(plain, step)
        expected.step()
    assert_same(contents(optimizer), contents(expected))


@each_place
@pytest.mark.parametrize("name", ["adan", "lamb"])
def test_clipping_sees_unscaled_gradients(name: str, place: Place) -> None:
    params, plain = (make_params(SHAPES, device=place.device) for _ in range(2))
    optimizer, expected = (optimizer_of(name, ps, max_grad_norm=0.5, backend=place.backend) for ps in (params, plain))
    optimizer.grad_scale = torch.tensor(8.0, device=place.device)
    optimizer.found_inf = torch.tensor(0.0, device=place.device)
    for step in range(1, 4):
        give_grads(params, step)
        for p in params:
            p.grad *= 8.0
        optimizer.step()
        give_grads(plain, step)
        expected.step()
    assert_same(contents(optimizer), contents(expected))


@each_place
@pytest.mark.parametrize("name", ["adan", "diffgrad"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_previous_gradient_survives_being_unscaled(dtype: torch.dtype, name: str, place: Place) -> None:
    """Scaling is for gradients that float16 can't hold: stored unscaled in the gradient's dtype, they would be lost."""
    params = [torch.nn.Parameter(torch.zeros(1000, dtype=dtype, device=place.device))]
    optimizer = CLASSES[name](params, backend=place.backend)
    scale = 2.0**16
    true = 1e-8 * normal((1000,), 0, device=place.device)
    params[0].grad = (true * scale).to(dtype)
    optimizer.grad_scale = torch.tensor(scale, device=place.device)
    optimizer.found_inf = torch.tensor(0.0, device=place.device)
    optimizer.step()
    kept = optimizer.state[params[0]]["neg_pre_grad" if name == "adan" else "previous_grad"].double()
    expected = params[0].grad.double() / scale * (-1.0 if name == "adan" else 1.0)
    assert torch.equal(kept, expected)  # a power of two scales without rounding


def test_gradscaler_leaves_unscaling_to_the_step() -> None:
    for name in CLASSES:
        assert optimizer_of(name, make_params(SHAPES))._step_supports_amp_scaling


@each_class
def test_unscaling_may_be_left_to_gradscaler(name: str) -> None:
    """As torch's unfused optimizers do it: clipping in mixed precision by Lightning and Fabric asks for that."""
    (p,), (q,) = make_params([(8,)]), make_params([(8,)])
    optimizer = optimizer_of(name, [p], unscale_in_step=False)
    plain = optimizer_of(name, [q])
    assert plain._step_supports_amp_scaling is True
    for copied in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied._step_supports_amp_scaling is False
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append((p.grad.clone(), hasattr(o, "grad_scale"))))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        give_grads([p], step)
        give_grads([q], step)
        p.grad *= scaler.scale(torch.ones(()))  # a power of two: nothing is rounded
        if step == 1:
            p.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            plain.step()
            assert_same_bits(seen[-1][0], q.grad)
    assert [scaled for _, scaled in seen] == [False, False]
    assert_same_bits(p, q)


def test_a_choice_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AdamW: expected unscale_in_step True or False; got 1\."):
        CLASSES["adamw"](make_params([(8,)]), unscale_in_step=1)
