# SPDX-License-Identifier: Apache-2.0
"""What training loops do with an optimizer: groups, schedules, closures, hooks, parameters that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from singlepass import optim

from ..simt.truth import Case
from ..tolerances import assert_same_bits
from .steps import Place, each_case, each_place
from .trajectory import CLASSES, contents, give_grads, make_optimizer, make_params, train

SHAPES = [(5, 7), (64,), (), (3, 3)]


def assert_same(params: list[Parameter], others: list[Parameter]) -> None:
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)


def unclipped(case: Case) -> dict[str, Any]:
    """Clipping joins all groups, so groups of their own would differ."""
    return {"max_grad_norm": 0.0} if case.rule in ("adan", "lamb") else {}


@each_place
@each_case
def test_groups_have_their_own_hyperparameters(case: Case, place: Place) -> None:
    together, apart = (make_params(SHAPES, device=place.device) for _ in range(2))
    options = {"backend": place.backend, **unclipped(case)}
    groups = [{"params": together[:2], "lr": 1e-2}, {"params": together[2:], "weight_decay": 0.5}]
    one = make_optimizer(case, groups, **options)
    two = [
        make_optimizer(case, apart[:2], **options | {"lr": 1e-2}),
        make_optimizer(case, apart[2:], **options | {"weight_decay": 0.5}),
    ]
    for step in range(1, 5):
        give_grads(together, step)
        give_grads(apart, step)
        for optimizer in (one, *two):
            optimizer.step()
    assert_same(together, apart)


@each_place
@each_case
def test_a_group_added_later_starts_afresh(case: Case, place: Place) -> None:
    params, others = (make_params(SHAPES, device=place.device) for _ in range(2))
    options = {"backend": place.backend, **unclipped(case)}
    optimizer = make_optimizer(case, params[:2], **options)
    first, second = make_optimizer(case, others[:2], **options), make_optimizer(case, others[2:], **options)
    for step in range(1, 7):
        if step == 4:
            optimizer.add_param_group({"params": params[2:]})
        give_grads(params, step)
        give_grads(others, step)
        optimizer.step()
        first.step()
        if step >= 4:
            second.step()
    assert_same(params, others)


@each_place
@each_case
def test_parameters_that_appear_late_or_pause_count_their_own_steps(case: Case, place: Place) -> None:
    params, others = (make_params(SHAPES[:3], device=place.device) for _ in range(2))
    options = {"backend": place.backend, **unclipped(case)}
    together = make_optimizer(case, params, **options)
    alone = [make_optimizer(case, [p], **options) for p in others]
    present = {1: (0,), 2: (0, 1), 3: (), 4: (0, 1, 2), 5: (2,), 6: (0, 1, 2), 7: (0, 1, 2)}
    for step, indices in present.items():
        give_grads(params, step)
        give_grads(others, step)
        for i, p in enumerate(params):
            if i not in indices:
                p.grad = None
        before = contents(together)
        together.step()
        for i in indices:
            alone[i].step()
        for name, value in before.items():
            if int(name.split()[-1]) not in indices:
                assert_same_bits(contents(together)[name], value, name)
    assert_same(params, others)


@each_place
@each_case
def test_without_gradients_nothing_happens(case: Case, place: Place) -> None:
    params = make_params(SHAPES, device=place.device)
    optimizer = make_optimizer(case, params, backend=place.backend)
    before = [p.detach().clone() for p in params]
    assert optimizer.step() is None
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p, q)
    assert len(optimizer.state) == 0


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=8, cycle_momentum="betas" in o.defaults),
}


@each_place
@pytest.mark.parametrize("capturable", [False, True], ids=["float-lr", "capturable"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_case
def test_schedules_are_followed(case: Case, scheduler: str, capturable: bool, place: Place) -> None:
    params, others = (make_params(SHAPES, device=place.device) for _ in range(2))
    scheduled = make_optimizer(case, params, capturable=capturable, backend=place.backend)
    by_hand = make_optimizer(case, others, backend=place.backend)
    schedule = SCHEDULERS[scheduler](scheduled)
    (group,) = scheduled.param_groups
    lr = group["lr"]
    assert isinstance(lr, torch.Tensor) == capturable
    seen = []
    for step in range(1, 6):
        by_hand.param_groups[0] |= {
            k: float(group[k]) if k == "lr" else group[k] for k in ("lr", "betas") if k in group
        }
        seen.append(float(group["lr"]))
        give_grads(params, step)
        give_grads(others, step)
        scheduled.step()
        by_hand.step()
        schedule.step()
    assert len(set(seen)) > 1
    if capturable:
        assert group["lr"] is lr, "a captured graph reads this tensor"
    assert_same(params, others)


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@each_case
def test_the_learning_rate_may_be_a_tensor(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, place: Place
) -> None:
    lr = torch.full(shape, case.lr, dtype=dtype)
    params, others = (make_params(SHAPES, device=place.device) for _ in range(2))
    tensor, number = (
        make_optimizer(case, ps, lr=value, backend=place.backend) for ps, value in ((params, lr), (others, lr.item()))
    )
    for optimizer in (tensor, number):
        train(optimizer, 3)
    assert_same(params, others)
    lr.fill_(0.5 * case.lr)  # seen without touching the group
    number.param_groups[0]["lr"] = lr.item()
    for optimizer in (tensor, number):
        train(optimizer, range(4, 6))
    assert_same(params, others)


@each_place
@each_case
def test_a_closure_is_called_once_with_gradients_enabled(case: Case, place: Place) -> None:
    (p,) = make_params([(8,)], device=place.device)
    optimizer = make_optimizer(case, [p], backend=place.backend)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().square().sum()
    assert_same_bits(optimizer.step(closure), before)
    assert calls == [True]


def test_named_parameters() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = optim.AdamW(model.named_parameters())
    give_grads(list(model.parameters()), 1)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("make", [tuple, iter, list], ids=["tuple", "iterator", "list"])
def test_any_ordered_collection_of_parameters(make: Any) -> None:
    params = make_params(SHAPES)
    optimizer = optim.Lion(make(params))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]


def test_hooks_are_called() -> None:
    params = make_params(SHAPES)
    optimizer = optim.Lion(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, 1)
    assert calls == ["before", "after"]


def test_gradients_of_another_dtype_from_one_step_to_the_next() -> None:
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, eager = optim.Lion(params), optim.Lion(others, backend="eager")
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32), 1):
        for o in (optimizer, eager):
            train(o, range(step, step + 1), dtype)
    assert_same(params, others)


def test_a_parameter_moved_to_other_memory_is_followed() -> None:
    params, others = make_params(SHAPES), make_params(SHAPES)
    moved, left = optim.AdamW(params), optim.AdamW(others)
    for step in range(1, 4):
        params[0].data = params[0].data.clone()
        for optimizer in (moved, left):
            train(optimizer, range(step, step + 1))
    assert_same(params, others)


@each_place
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_case
def test_the_default_device_is_none_of_its_business(case: Case, device: str, place: Place) -> None:
    params, others = (make_params(SHAPES, device=place.device) for _ in range(2))
    optimizer, undisturbed = (make_optimizer(case, ps, backend=place.backend) for ps in (params, others))
    for step in range(1, 4):
        for ps in (params, others):
            give_grads(ps, step)
        with torch.device(device):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        undisturbed.step()
    assert_same(params, others)


@each_place
@each_case
def test_a_graph_that_needs_the_old_values_notices_a_step(case: Case, place: Place) -> None:
    (p,) = make_params([(8,)], device=place.device)
    optimizer = make_optimizer(case, [p], backend=place.backend)
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_case
def test_states_are_float32_unless_asked_otherwise(case: Case) -> None:
    for dtype, state_dtype, expected in (
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "param", torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, None, torch.float64),
    ):
        params = make_params(SHAPES, (dtype,))
        optimizer = make_optimizer(case, params, state_dtype=state_dtype, weight_decay=0.1)
        train(optimizer, 1)
        for p in params:
            states = optimizer.state[p].copy()
            for name in ("step", "gsnr"):
                assert states.pop(name, torch.zeros(())).dtype == torch.float32
            if case.rule == "adan" and dtype == torch.bfloat16:  # the previous gradient, which loses nothing
                assert states.pop("neg_pre_grad").dtype == torch.bfloat16
            assert {s.dtype for s in states.values()} == {expected}
            assert all(s.shape == p.shape for s in states.values())


@each_case
def test_it_looks_like_a_torch_optimizer(case: Case) -> None:
    optimizer = make_optimizer(case, make_params(SHAPES))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ in repr(optimizer)
    assert "\n\n    Example:" in (type(optimizer).__doc__ or "\n\n    Example:"), "a section of its own"
    optimizer.zero_grad()
    assert "lr" in optimizer.defaults


def test_the_representation_has_a_seed_only_where_one_is_used() -> None:
    params = make_params([(3,)])
    for name in CLASSES:
        cls = CLASSES[name]
        assert "seed" not in repr(cls(params))
        assert "\n    seed: " in repr(cls(params, stochastic_rounding=True))
