# SPDX-License-Identifier: Apache-2.0
"""Groups that are edited into what cannot be stepped, and those that only just can: nothing is half-done."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from singlepass import optim

from ..tolerances import assert_same_bits
from .test_groups import SHAPES, each_optimizer, groups_of, make
from .trajectory import contents, make_params


@each_optimizer
def test_what_add_param_group_refuses_is_refused_in_edited_groups(name: str) -> None:
    p, q = make_params(SHAPES[:2])
    optimizer = make(name, [{"params": [p]}])
    for bad, match in (
        (Parameter(torch.zeros(3, dtype=torch.complex64)), "view_as_real"),
        (Parameter(torch.zeros(1).expand(3)), "overlap"),
        (q, "once"),
    ):
        groups_of(optimizer)[0]["params"] = [q, bad]
        for t in (q, bad):
            t.grad = torch.ones_like(t)
        before = contents(optimizer)
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        for key, value in contents(optimizer).items():
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["Adan", "LAMB"])
def test_groups_that_come_to_clip_differently_are_refused(name: str) -> None:
    """One norm is clipped, that of all gradients together."""
    p, q = make_params(SHAPES[:2])
    optimizer = getattr(optim, name)([{"params": [p]}, {"params": [q]}], max_grad_norm=1.0)
    optimizer.param_groups[0]["max_grad_norm"] = 0.5
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"one max_grad_norm for all groups; got 0\.5, 1\.0"):
        optimizer.step()
    for key, value in contents(optimizer).items():
        assert_same_bits(value, before[key])


@each_optimizer
def test_a_parameter_that_two_groups_have_is_refused(name: str) -> None:
    """Also where both groups share one list: it would be stepped twice."""
    p, q = make_params(SHAPES[:2])
    optimizer = make(name, [{"params": [p]}, {"params": [q]}])
    for t in (p, q):
        t.grad = torch.ones_like(t)
    optimizer.step()
    first, second = groups_of(optimizer)
    second["params"] = first["params"]
    before = contents(optimizer)
    with pytest.raises(ValueError, match="each parameter once"):
        optimizer.step()
    for key, value in contents(optimizer).items():
        assert_same_bits(value, before[key])


@each_optimizer
@pytest.mark.parametrize("broken", ["missing", "lr", "shape"])
def test_a_group_that_cannot_be_stepped_stops_all_groups(name: str, broken: str) -> None:
    p, q = make_params([(4,), (4,)])
    optimizer = make(name, [{"params": [p]}, {"params": [q]}])
    for t in (p, q):
        t.grad = torch.ones_like(t)
    optimizer.step()
    if broken == "missing":
        del groups_of(optimizer)[1]["weight_decay"]
    elif broken == "lr":
        groups_of(optimizer)[1]["lr"] = None
    else:
        q.grad = None
        q.data, q.grad = torch.zeros(1), torch.ones(1)
    before = contents(optimizer)
    with pytest.raises(ValueError, match="expected"):
        optimizer.step()
    for key, value in contents(optimizer).items():
        assert_same_bits(value, before[key], key)


OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, "x", torch.ones(2), torch.tensor(0.1, dtype=torch.float16), torch.tensor(1)),
    "betas": ((0.9, 1.0), (0.9, 1.0, 0.9), (0.9,), 0.9, None),
    "eps": (-1.0, math.nan, None),
    "weight_decay": (-1.0, math.nan, None),
    "momentum": (1.0, None),
    "trust_coefficient": (-1.0, None),
    "maximize": ("no", None),
    "amsgrad": (None,),
    "rectify": (None,),
    "no_prox": (None,),
    "always_adapt": (None,),
    "guard_gain": (None,),
    "stochastic_rounding": (None,),
    "state_dtype": ("fp8", torch.int8),
}


@each_optimizer
@pytest.mark.parametrize("steps", [0, 1], ids=["first-step", "second-step"])
def test_hyperparameters_edited_out_of_their_range_are_refused(name: str, steps: int) -> None:
    """Before any group is stepped, also those that come first."""
    p, q = make_params([(4,), (4,)])
    optimizer = make(name, [{"params": [p]}, {"params": [q]}])
    for t in (p, q):
        t.grad = torch.ones_like(t)
    for _ in range(steps):
        optimizer.step()
    group = groups_of(optimizer)[1]
    for key in OUT_OF_RANGE.keys() & group.keys():
        good = group[key]
        for bad in OUT_OF_RANGE[key]:
            group[key] = bad
            before = contents(optimizer)
            with pytest.raises(ValueError, match=f"{optimizer._name}: expected .*{key}"):
                optimizer.step()
            for where, value in contents(optimizer).items():
                assert_same_bits(value, before[where], f"{where} with {key} {bad!r}")
        group[key] = good
    optimizer.step()


def test_a_list_of_betas_edited_in_place_is_checked() -> None:
    (p,) = make_params([(4,)])
    optimizer = optim.AdamW([p], betas=[0.9, 0.99])  # type: ignore[arg-type]
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["betas"][1] = 1.0
    with pytest.raises(ValueError, match="betas in"):
        optimizer.step()


@each_optimizer
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("shape", [(1,), (), (6,), (2, 2)], ids=str)
def test_a_parameter_of_another_shape_is_refused(name: str, backend: str, shape: tuple[int, ...]) -> None:
    """Its states don't fit any more; operations of PyTorch would broadcast some of them."""
    p, q = make_params([(4,), (4,)])
    optimizer = make(name, [{"params": [p, q], "backend": backend}])
    for t in (p, q):
        t.grad = torch.ones_like(t)
    optimizer.step()
    q.grad = None
    q.data = torch.zeros(shape)
    q.grad = torch.ones(shape)
    before = contents(optimizer)
    with pytest.raises((ValueError, RuntimeError), match="expected"):
        optimizer.step()
    for key, value in contents(optimizer).items():
        assert_same_bits(value, before[key], key)


@each_optimizer
def test_no_groups_and_empty_groups(name: str) -> None:
    (p,) = make_params([(4,)])
    optimizer = make(name, [{"params": [p]}])
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    kept = groups_of(optimizer)[0]
    kept["params"] = []
    optimizer.step()
    del optimizer.param_groups[:]
    optimizer.step()
    assert_same_bits(p, before)


@each_optimizer
def test_a_generator_of_parameters_in_an_edited_group(name: str) -> None:
    p, q = (make_params([(4,)])[0] for _ in range(2))
    optimizer, expected = make(name, [{"params": [p]}]), make(name, [{"params": [q]}])
    groups_of(optimizer)[0]["params"] = (t for t in [p])
    for _ in range(2):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        expected.step()
    assert_same_bits(p, q)


@each_optimizer
def test_the_group_given_is_the_group_kept(name: str) -> None:
    (p,) = make_params([(4,)])
    group: dict[str, Any] = {"params": [p], "lr": 0.1}
    optimizer = make(name, [group])
    assert groups_of(optimizer)[0] is group


def test_backends_of_groups_hold_for_their_norm_too() -> None:
    params = make_params([(4,), (4,)], (torch.float32, torch.float64))
    twins = make_params([(4,), (4,)], (torch.float32, torch.float64))
    backends = ("native", "eager")
    mixed = optim.LAMB([{"params": [p], "backend": b} for p, b in zip(params, backends, strict=True)])
    eager = optim.LAMB([{"params": [p]} for p in twins], backend="eager")
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = torch.full_like(p, 3.0), torch.full_like(q, 3.0)
    mixed.step()
    eager.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=0.0)


@each_optimizer
def test_lazy_parameters(name: str) -> None:
    lazy = torch.nn.LazyLinear(3)
    optimizer = make(name, [{"params": list(lazy.parameters())}])
    lazy(torch.randn(2, 5)).square().mean().backward()
    before = lazy.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(lazy.weight, before)


@each_optimizer
def test_parameters_on_meta(name: str) -> None:
    """As a planner of memory steps them; torch.distributed.checkpoint does so with a rate of 0."""
    p = Parameter(torch.zeros(4, device="meta"))
    optimizer = make(name, [{"params": [p]}])
    for lr in (0.0, 0.1, 0.1):
        groups_of(optimizer)[0]["lr"] = lr
        p.grad = torch.zeros(4, device="meta")
        optimizer.step()
    assert {state.device.type for state in optimizer.state[p].values()} == {"meta"}
