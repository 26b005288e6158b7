# SPDX-License-Identifier: Apache-2.0
"""Modules of rational activations: parameters, checkpoints of other packages, initialisation, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from singlepass.functional import rational
from singlepass.nn import GRKAN, KATMLP, GroupRational, Table, fit_rational, no_weight_decay, table
from singlepass.rational._tables import TARGETS

FORMS = "ABCD"
THEIRS = {"KAT": ("weight_numerator", "weight_denominator"), "FlashKAT": ("numerator_v", "denominator_v")}


def spread(*shape: int) -> Tensor:
    """Within the tables' interval, all of it."""
    count = torch.Size(shape).numel()
    return torch.linspace(-3.0, 3.0, count)[torch.randperm(count)].view(shape)


def perturbed(module: nn.Module, scale: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


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


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KATMLP(64, 0), "KATMLP: expected hidden_features as a whole number, 1 or more; got 0"),
        (lambda: KATMLP(64, 64, 0), "KATMLP: expected out_features as a whole number, 1 or more; got 0"),
        (lambda: KATMLP(64.0), r"KATMLP: expected in_features as a whole number, 1 or more; got 64\.0"),
        (lambda: KATMLP(64, drop=(0.1, 0.2, 0.3)), "KATMLP: expected drop as one value or a pair"),
        (lambda: GRKAN(16, 0), "GRKAN: expected out_features as a whole number, 1 or more; got 0"),
        (lambda: GRKAN(16, None), "GRKAN: expected out_features as a whole number, 1 or more; got None"),
    ],
)
def test_sizes_of_layers_that_do_not_fit(make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


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


def test_a_kat_block_loads_by_name() -> None:
    """Keys and shapes as Adamdad/kat's ``KAN`` module has them."""
    mlp = KATMLP(16, 64)
    shapes = {
        "fc1.weight": (64, 16),
        "fc1.bias": (64,),
        "act1.weight_numerator": (1, 6),
        "act1.weight_denominator": (8, 4),
        "act2.weight_numerator": (1, 6),
        "act2.weight_denominator": (8, 4),
        "fc2.weight": (16, 64),
        "fc2.bias": (16,),
    }
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    mlp.load_state_dict(given)
    for name, p in mlp.named_parameters():
        assert torch.equal(p, given[name.replace("numerator", "weight_numerator").replace("denom", "weight_denom")])


@pytest.mark.parametrize("module", [GRKAN(16, 8), KATMLP(16, 32), GroupRational(16)], ids=lambda m: type(m).__name__)
def test_marks_outlive_copies(module: nn.Module) -> None:
    names = {name for name, _ in module.named_parameters() if name.endswith(("numerator", "denominator"))}
    assert len(names) in (2, 4)
    assert module.no_weight_decay() == no_weight_decay(module) == names
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assigned = copy.deepcopy(module)
    assigned.load_state_dict({name: v.clone() for name, v in module.state_dict().items()}, assign=True)
    with torch.device("meta"):
        empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
        assigned,
        empty,
        copy.deepcopy(module).bfloat16(),
    ]
    for other in copies:
        assert no_weight_decay(other) == names
    for other in copies[:4]:
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))
        x = torch.randn(3, 16)
        assert torch.equal(module.eval()(x), other.eval()(x))


def test_state_dicts_round_trip() -> None:
    torch.manual_seed(0)
    old = perturbed(KATMLP(16, 32, form="C"))
    new = KATMLP(16, 32, form="C")
    assert [*old.state_dict()] == [
        f"{layer}.{name}"
        for layer, names in (("act1", "nd"), ("fc1", "wb"), ("act2", "nd"), ("fc2", "wb"))
        for name in ({"n": "numerator", "d": "denominator", "w": "weight", "b": "bias"}[key] for key in names)
    ]
    new.load_state_dict(old.state_dict())
    x = torch.randn(7, 16)
    assert torch.equal(old(x), new(x))


def test_meta_modules_materialise() -> None:
    mlp = KATMLP(16, 32, device="meta").to_empty(device="cpu")
    mlp.reset_parameters()
    x = spread(20, 16)
    assert torch.equal(mlp.act1(x), x)
    x = spread(20, 32)
    assert (mlp.act2(x) - F.gelu(x)).abs().max() < mlp.act2.init.max_error + 1e-5


@pytest.mark.parametrize("form", "AC")
@pytest.mark.parametrize("init", ["gelu", "silu", "relu", "identity", "sigmoid", "swiglu"])
def test_variance_is_preserved(init: str, form: str) -> None:
    torch.manual_seed(1)
    layer = GRKAN(256, 4096, init=init, form=form).requires_grad_(False)
    y = layer(torch.randn(512, 256))
    assert y.square().mean() == pytest.approx(1.0, rel=0.05)
    assert layer.linear.weight.var() == pytest.approx(table(init, form).gain / 256, rel=0.02)
    assert not layer.linear.bias.any()
    assert not perturbed(GRKAN(8, 8)).linear.bias.eq(0).all()


def test_variance_through_an_mlp() -> None:
    torch.manual_seed(1)
    mlp = KATMLP(512, 2048, 512, act_init="silu")
    with torch.no_grad():
        y = mlp(torch.randn(256, 512))
    assert y.square().mean() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("bias", [True, False, (True, False)])
def test_an_mlp_is_its_parts(bias: bool | tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    mlp = perturbed(KATMLP(16, 32, 24, bias=bias))
    x = torch.randn(2, 5, 16)
    expected = mlp.fc2(mlp.act2(mlp.fc1(mlp.act1(x))))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in mlp.named_parameters()]
    found = torch.autograd.grad(mlp(x).square().sum(), [*mlp.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [*mlp.parameters()])
    for name, p, q in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_hooks_and_adapters_of_fc1_work() -> None:
    torch.manual_seed(0)
    mlp = KATMLP(8, 16)
    x = torch.randn(3, 8)
    before = mlp(x)
    seen: list[Tensor] = []
    handle = mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(mlp(x), before)
    assert len(seen) == 1
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    doubled = Doubled(8, 16)
    doubled.load_state_dict(mlp.fc1.state_dict())
    mlp.fc1 = doubled
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.act2(doubled(x))))
    assert not torch.allclose(mlp(x), before)


def test_calls_of_fc1_that_were_changed_work() -> None:
    """As accelerate does to offload weights, and profilers do by hooks for all modules."""
    mlp, x, seen = KATMLP(8, 16), torch.randn(3, 8), []
    before = mlp(x)
    forward = mlp.fc1.forward
    mlp.fc1.forward = lambda x: seen.append(x) or forward(x)  # type: ignore[func-returns-value, method-assign]
    torch.testing.assert_close(mlp(x), before)
    assert len(seen) == 1
    del mlp.fc1.forward
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    mlp(x)
    handle.remove()
    assert seen[1:] == [GroupRational, nn.Linear, GroupRational, nn.Linear, KATMLP]


def test_offloaded_weights_arrive(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    mlp, x = KATMLP(8, 16), torch.randn(3, 8)
    before = mlp(x)
    for offload in (accelerate.cpu_offload, lambda model, device: accelerate.disk_offload(model, tmp_path, device)):
        model = offload(nn.Sequential(copy.deepcopy(mlp)), torch.device("cpu"))
        assert model[0].fc1.weight.is_meta
        torch.testing.assert_close(model(x), before)


def test_dropouts_of_an_mlp() -> None:
    mlp = KATMLP(8, 16, drop=(0.1, 0.3), bias=False)
    assert (mlp.act1.dropout, mlp.act2.dropout) == (0.1, 0.3)
    assert KATMLP(8, 16, drop=0.2).act1.dropout == 0.2
    with pytest.raises(ValueError, match="KATMLP: expected norm_layer None"):
        KATMLP(8, norm_layer=nn.LayerNorm)
    assert KATMLP(8, act_layer=nn.GELU).fc2.out_features == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_and_autocast(dtype: torch.dtype) -> None:
    act = GroupRational(16, init="silu")
    x = spread(40, 16).to(dtype)
    y = act(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.silu(x.float()).to(dtype), atol=1e-3, rtol=1e-2)
    torch.manual_seed(0)
    mlp = KATMLP(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = mlp(spread(4, 16))
    assert low.dtype == torch.bfloat16
    mlp.bfloat16()(spread(4, 16).bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in mlp.parameters())


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


def test_training_moves_every_parameter() -> None:
    torch.manual_seed(0)
    mlp = KATMLP(8, 16)
    before = copy.deepcopy(mlp.state_dict())
    optimizer = torch.optim.SGD(mlp.parameters(), 1e-2)
    mlp(torch.randn(64, 8)).square().sum().backward()
    optimizer.step()
    for name, p in mlp.state_dict().items():
        assert (p != before[name]).all(), name


def test_says_what_it_is() -> None:
    text = repr(GroupRational(32, 4, "silu", "B", channel_dim=1, dropout=0.5))
    assert text == "GroupRational(32, groups=4, init='silu', form='B', degrees=(5, 4), channel_dim=1, dropout=0.5)"
    act = GroupRational(8, 4, ([0.0, 1.0], [1.0]), degrees=(1, 1), numerator_groups=4, denominator_groups=1)
    text = "GroupRational(8, groups=4, form='A', degrees=(1, 1), numerator_groups=4, denominator_groups=1)"
    assert repr(act) == text
    assert repr(GroupRational(8, backend="eager")).endswith("backend='eager')")


def test_compiles_and_exports_whole() -> None:
    torch.manual_seed(0)
    mlp = KATMLP(16, 32).eval()
    x = torch.randn(4, 16)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))
    torch.testing.assert_close(torch.export.export(mlp, (x,)).module()(x), mlp(x))
