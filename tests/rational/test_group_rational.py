# SPDX-License-Identifier: Apache-2.0
"""The module of a rational activation: what it starts as, its arguments and checkpoints of other packages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from singlepass.functional import rational
from singlepass.nn import GroupRational, Table, fit_rational, table
from singlepass.rational._tables import TARGETS

from .inputs import perturbed, spread

FORMS = "ABCD"
THEIRS = {"KAT": ("weight_numerator", "weight_denominator"), "FlashKAT": ("numerator_v", "denominator_v")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_starts_as_the_named_function(name: str, form: str) -> None:
    act = GroupRational(16, groups=4, init=name, form=form).eval()
    x = spread(40, 16)
    assert (act(x) - TARGETS[name](x)).abs().max() <= table(name, form).max_error + 4e-6
    assert act.numerator.shape == (1, 6)
    assert act.denominator.shape == (4, 5 if form == "C" else 4)
    assert act.numerator.dtype == act.denominator.dtype == torch.float32


def test_groups_have_denominators_of_their_own() -> None:
    act = GroupRational(6, groups=3, init="silu", backend="eager")
    with torch.no_grad():
        act.denominator[1].mul_(4.0)
    x = spread(50, 6)
    near = (act(x) - F.silu(x)).abs().amax(0) < 1e-5
    assert near.tolist() == [True, True, False, False, True, True]
    x.requires_grad_()
    act(x)[:, :2].sum().backward()
    assert act.denominator.grad is not None
    assert act.denominator.grad.abs().amax(1).gt(0).tolist() == [True, False, False]


@pytest.mark.parametrize(("rows_a", "rows_b"), [(1, None), (4, None), (4, 1), (1, 1)])
@pytest.mark.parametrize("channel_dim", [-1, 1, 0])
def test_is_the_functional(rows_a: int, rows_b: int | None, channel_dim: int) -> None:
    torch.manual_seed(0)
    act = GroupRational(8, 4, "tanh", channel_dim=channel_dim, numerator_groups=rows_a, denominator_groups=rows_b)
    perturbed(act)
    assert (act.numerator.shape[0], act.denominator.shape[0]) == (rows_a, 4 if rows_b is None else rows_b)
    x = torch.randn(8, 8, 8)
    bias, gate = torch.randn(8), torch.randn_like(x)
    expected = rational(x, act.numerator, act.denominator, form="A", channel_dim=channel_dim, bias=bias, gate=gate)
    assert torch.equal(act(x, bias=bias, gate=gate), expected)


def test_dropout_and_noise_are_for_training() -> None:
    for act in (GroupRational(8, dropout=0.25), GroupRational(8, form="D")):
        x = spread(1000, 8)
        assert not torch.equal(act(x), act(x))
        act.eval()
        assert torch.equal(act(x), act(x))
    act = GroupRational(8, init="sigmoid", dropout=0.25)
    y = act(spread(1000, 8))
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert y[y != 0].min() > torch.sigmoid(torch.tensor(-3.0)) / 0.75 - 1e-4


def test_inits_that_are_not_names() -> None:
    fitted = fit_rational(F.softplus, "B", (3, 2))
    act = GroupRational(8, init=fitted, form="B", degrees=(3, 2))
    x = spread(20, 8)
    assert (act(x) - F.softplus(x)).abs().max() < fitted.max_error + 1e-5
    pair = GroupRational(8, init=([0.0, 1.0], [1.0]), degrees=(1, 1))
    torch.testing.assert_close(pair(x), F.softsign(x))
    assert pair.init == Table.of((0.0, 1.0), (1.0,), "A")
    assert GroupRational(8, init=fitted, form="D", degrees=(3, 2)).denominator.shape == (8, 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"channels": 12}, r"a number of groups that divides 12 channels; got 8\. "),
        ({"channels": 16.0}, r"channels as a whole number, 1 or more; got 16\.0"),
        ({"groups": 2.0}, r"a number of groups that divides 16 channels; got 2\.0"),
        ({"groups": None}, "a number of groups that divides 16 channels; got None"),
        ({"groups": 0}, "a number of groups that divides 16 channels; got 0"),
        ({"numerator_groups": 3}, "numerator_groups 1 or 8; got 3"),
        ({"denominator_groups": 2}, "denominator_groups 1 or 8; got 2"),
        ({"form": "N"}, "form A, B, C or D; got 'N'"),
        ({"form": None}, "form A, B, C or D; got None"),
        (
            {"degrees": (3, 2)},
            r"degrees \(5, 4\) for 'gelu'; got \(3, 2\)\. Fit one by .*fit_rational\(fn, 'A', \(3, 2\)\)",
        ),
        ({"degrees": 3}, r"degrees \(m, n\) with m from 1 to 7 .*; got 3\."),
        ({"degrees": (3.0, 2)}, r"degrees \(m, n\) with m from 1 to 7 .*; got \(3\.0, 2\)"),
        ({"degrees": (9, 2)}, r"degrees \(m, n\) with m from 1 to 7"),
        ({"init": "elu"}, "a name among geglu, gelu, .*; got 'elu'. Fit one"),
        ({"init": "swish"}, r"a name among geglu, gelu, .*; got 'swish'\. Write 'silu'\."),
        ({"init": "SiLU"}, r"got 'SiLU'\. Write 'silu'\."),
        ({"init": "LeakyReLU"}, r"got 'LeakyReLU'\. Write 'leaky_relu'\."),
        ({"init": torch.zeros(6, 4)}, "init as a name, a Table or a pair .* of finite numbers"),
        ({"init": (torch.zeros(1, 6), torch.zeros(1, 4))}, "init as a name, a Table or a pair"),
        ({"init": (None, [1.0])}, "init as a name, a Table or a pair"),
        ({"init": table("gelu", "B")}, r"a table for form A and .*; got one for form B and"),
        ({"init": ([0.0, 1.0], [1.0])}, r"6 and 4 coefficients for form A .*; got 2 and 1\."),
        ({"init": 3}, "init as a name, a Table or a pair"),
        ({"channel_dim": None}, "channel_dim as a dimension of x; got None"),
        ({"dropout": 1.0}, "0 <= dropout < 1; got 1.0"),
        ({"dropout": None}, "0 <= dropout < 1; got None"),
        ({"backend": "fpga"}, "backend among native, triton, eager; got 'fpga'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=r"^(GroupRational|table): expected .*" + match):
        GroupRational(**{"channels": 16, **arguments})


def test_inputs_that_do_not_fit() -> None:
    act = GroupRational(16, channel_dim=1)
    for shape in ((2, 8, 3), (16,), (16, 32)):
        with pytest.raises(ValueError, match="GroupRational: expected x with 16 channels in dimension 1; got"):
            act(torch.zeros(shape))
    with pytest.raises(ValueError, match="GroupRational: expected x as a tensor; got list"):
        act([1.0])
    with pytest.raises(ValueError, match="bias of shape"):
        act(torch.zeros(2, 16), bias=torch.zeros(8))


@pytest.mark.parametrize("package", THEIRS)
@pytest.mark.parametrize("prefix", ["", "blocks.0.mlp.act1."])
def test_checkpoints_of_others_load(package: str, prefix: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(1, 6), torch.randn(8, 4)
    act = GroupRational(32)
    module: nn.Module = act
    for name in reversed(prefix.split(".")[:-1]):
        module = nn.ModuleDict({name: module})
    given = {prefix + THEIRS[package][0]: a, prefix + THEIRS[package][1]: b}
    before = dict(given)
    module.load_state_dict(given)
    assert given == before
    assert torch.equal(act.numerator, a)
    assert torch.equal(act.denominator, b)
    x = torch.randn(5, 32)
    q = 1 + sum(b[:, i].abs().repeat_interleave(4) * x.abs() ** (i + 1) for i in range(4))
    torch.testing.assert_close(act(x), sum(a[0, i] * x**i for i in range(6)) / q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("package", THEIRS)
def test_checkpoints_that_do_not_fit(package: str) -> None:
    a, b = THEIRS[package]
    good = {a: torch.ones(1, 6), b: torch.ones(8, 4)}
    act = GroupRational(32)
    before = copy.deepcopy(act.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for denominator"):
        act.load_state_dict({**good, b: torch.ones(4, 4)})
    with pytest.raises(RuntimeError, match=r"Missing key.*numerator"):
        GroupRational(32).load_state_dict({b: torch.ones(8, 4)})
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{a}"):
        GroupRational(32).load_state_dict({**before, a: torch.ones(1, 6)})
    with pytest.raises(RuntimeError, match=r"expected form A, which KAT's kernels compute; got a module of form B\."):
        GroupRational(32, form="B").load_state_dict(good)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    act = GroupRational(16, init="silu")
    x = spread(40, 16).to(dtype)
    y = act(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.silu(x.float()).to(dtype), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_leaves_coefficients_alone(dtype: torch.dtype) -> None:
    """transformers sets it to bfloat16 while it builds such a model."""
    expected = GroupRational(16, init="silu")
    try:
        torch.set_default_dtype(dtype)
        act = GroupRational(16, init="silu")
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(act.parameters(), expected.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, q)


def test_says_what_it_is() -> None:
    text = repr(GroupRational(32, 4, "silu", "B", channel_dim=1, dropout=0.5))
    assert text == "GroupRational(32, groups=4, init='silu', form='B', degrees=(5, 4), channel_dim=1, dropout=0.5)"
    act = GroupRational(8, 4, ([0.0, 1.0], [1.0]), degrees=(1, 1), numerator_groups=4, denominator_groups=1)
    text = "GroupRational(8, groups=4, form='A', degrees=(1, 1), numerator_groups=4, denominator_groups=1)"
    assert repr(act) == text
    assert repr(GroupRational(8, backend="eager")).endswith("backend='eager')")
