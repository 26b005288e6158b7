# SPDX-License-Identifier: Apache-2.0
"""GRKAN and KATMLP: initialisation, checkpoints, copies, hooks and offloading, and what they compute."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from singlepass.nn import GRKAN, KATMLP, GroupRational, no_weight_decay, table

from .inputs import perturbed, spread


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


def test_autocast_and_low_precision_parameters() -> None:
    torch.manual_seed(0)
    mlp = KATMLP(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = mlp(spread(4, 16))
    assert low.dtype == torch.bfloat16
    mlp.bfloat16()(spread(4, 16).bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in mlp.parameters())


def test_training_moves_every_parameter() -> None:
    torch.manual_seed(0)
    mlp = KATMLP(8, 16)
    before = copy.deepcopy(mlp.state_dict())
    optimizer = torch.optim.SGD(mlp.parameters(), 1e-2)
    mlp(torch.randn(64, 8)).square().sum().backward()
    optimizer.step()
    for name, p in mlp.state_dict().items():
        assert (p != before[name]).all(), name


def test_compiles_and_exports_whole() -> None:
    torch.manual_seed(0)
    mlp = KATMLP(16, 32).eval()
    x = torch.randn(4, 16)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mlp(x))
    torch.testing.assert_close(torch.export.export(mlp, (x,)).module()(x), mlp(x))
