# SPDX-License-Identifier: Apache-2.0
"""What PyTorch does to functions beside calling them and their backward pass: plain PyTorch runs, not kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from singlepass.functional import rational
from singlepass.nn import GroupRational, LorentzLinear, SSTLinear

MODULES: dict[str, Callable[..., nn.Module]] = {
    **{f"rational {form}": partial(GroupRational, 6, 2, "silu", form) for form in "ABC"},
    "SSTLinear": partial(SSTLinear, 6, 5, 2),
    "SSTLinear, default gradient": partial(SSTLinear, 6, 5, 2, gradient="default"),
    "LorentzLinear": partial(LorentzLinear, 6, 5, 2),
}
each_module = pytest.mark.parametrize("name", MODULES)


def module_of(name: str, dtype: torch.dtype = torch.float32, backend: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name](dtype=dtype, backend=backend)


def input_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", [None, "eager"])
@each_module
def test_torch_func_has_the_gradients_of_backward(name: str, backend: str | None) -> None:
    module, x = module_of(name, torch.float64, backend), input_of(torch.float64)
    params = trained(module)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x,)).square().sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(params, x)
    wanted = torch.autograd.grad(module(x).square().sum(), [x, *params.values()])
    for got, want in zip([grad_x, *grads.values()], wanted, strict=True):
        torch.testing.assert_close(got, want)
    each = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(params, x)
    torch.testing.assert_close(each, wanted[0])


@each_module
def test_forward_mode_agrees_with_backward(name: str) -> None:
    module, x = module_of(name, torch.float64), input_of(torch.float64)
    direction = torch.linspace(-1.0, 1.0, x.numel(), dtype=torch.float64).view_as(x)
    y, tangent = torch.func.jvp(module, (x.detach(),), (direction,))
    (grad,) = torch.autograd.grad(module(x), x, torch.ones_like(y))
    torch.testing.assert_close(tangent.sum(), (grad * direction).sum())


@each_module
def test_second_derivatives_by_plain_pytorch(name: str) -> None:
    module, x = module_of(name, torch.float64, "eager"), input_of(torch.float64)
    assert gradgradcheck(lambda x: module(x).sin(), (x,))
    hessian = torch.func.hessian(lambda x: module(x).sin().sum())(x.detach()[0])
    torch.testing.assert_close(hessian, hessian.mT)
    (first,) = torch.autograd.grad(module(x[0]).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[0, 2], x)
    torch.testing.assert_close(second[0], hessian[2])


def test_second_derivatives_by_everything() -> None:
    """Of coefficients too, away from the kink of |b|, and where one input is made of another."""
    shapes = (4, 6), (1, 6), (2, 4), (6,)
    tensors = [torch.rand(*shape, dtype=torch.float64) + 0.1 for shape in shapes]
    x, a, b, bias = (t.requires_grad_() for t in tensors)

    def call(x: Tensor, a: Tensor, b: Tensor, bias: Tensor, form: str) -> Tensor:
        return rational(x, a, b, form=form, bias=bias, gate=x * x)

    for form in "AB":
        assert gradgradcheck(partial(call, form=form), (x, a, b, bias))


@each_module
def test_kernels_are_differentiated_once(name: str) -> None:
    module, x = module_of(name, backend="native"), input_of()
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"expected to be differentiated once; .*\. Pass backend=.eager., plain"):
        first.sum().backward()


@each_module
def test_tangents_of_incoming_gradients_are_not_lost(name: str) -> None:
    """Kernels know nothing of them; plain PyTorch, whose gradients are linear in the incoming one, takes them along."""
    module, x = module_of(name, backend="native"), input_of()
    y = module(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="expected plain tensors and reverse mode for kernels; got a tangent"):
            torch.autograd.grad(y, x, dual)
    module, x = module_of(name, torch.float64, "eager"), input_of(torch.float64)
    inputs = [x, *trained(module).values()]
    y = module(x)
    tangent = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, inputs, forward_ad.make_dual(torch.ones_like(y), tangent))
        tangents = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    for got, want in zip(tangents, torch.autograd.grad(module(x), inputs, tangent), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [None, "eager"])
@each_module
def test_many_gradients_at_a_time(name: str, backend: str | None) -> None:
    """As a Jacobian takes them: autograd's own vmap, and torch.vmap around a backward pass."""
    module, x = module_of(name, backend=backend), input_of()
    inputs = [x, *trained(module).values()]
    y = module(x)
    directions = torch.randn(3, *y.shape)
    wanted = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
    batched = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda g: torch.autograd.grad(y, inputs, g, retain_graph=True))(directions)
    for want, *found in zip(zip(*wanted, strict=True), batched, mapped, strict=True):
        for got in found:
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["A", "D"])
def test_vmap_draws_once_or_for_each_sample(form: str) -> None:
    """Samples have numbers of their own with randomness="different", and the same ones with "same"."""
    module, x = GroupRational(64, form=form, dropout=0.5), torch.ones(3, 5, 64)
    for randomness in ("same", "different"):
        y = torch.vmap(module, randomness=randomness)(x)
        assert torch.equal(y[0], y[1]) == torch.equal(y[1], y[2]) == (randomness == "same")
        assert 0.4 < (y == 0.0).float().mean() < 0.6
        grads = torch.vmap(torch.func.grad(lambda x: module(x).sum()), randomness=randomness)(x)
        assert torch.equal(grads[0], grads[1]) == (randomness == "same")


@each_module
def test_kernels_that_were_asked_for_refuse(name: str) -> None:
    module, x = module_of(name, backend="native"), input_of()
    with pytest.raises(RuntimeError, match=r"expected plain tensors and reverse mode for kernels; got a transform of"):
        torch.func.grad(lambda x: module(x).sum())(x)


@each_module
def test_traces_have_operators_of_torch_alone(name: str) -> None:
    module, x = module_of(name), input_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, x)
    assert "singlepass::" not in str(traced.inlined_graph)
    other = 2.0 * x.detach()[:3]
    torch.testing.assert_close(traced(other), module(other), rtol=1e-4, atol=1e-5)


@each_module
def test_exports_to_onnx_have_operators_of_torch_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx.export(dynamo=True) is torch.export, and a translation of what that found."""
    module, x = module_of(name).eval(), input_of().detach()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(module, (x,), strict=False)
    assert "singlepass" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)], ids=str)
def test_dtensors(mesh: DeviceMesh, placement: Replicate | Shard) -> None:
    plain, x = module_of("rational A"), input_of()
    sharded = distribute_module(module_of("rational A"), mesh)
    y = sharded(distribute_tensor(x, mesh, [placement]))
    assert isinstance(y, DTensor)
    torch.testing.assert_close(y.full_tensor(), plain(x))
    y.sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(sharded.numerator.grad.full_tensor(), plain.numerator.grad)
    with pytest.raises(ValueError, match="rational: expected DTensors alone, or none; got some"):
        sharded(x)
    with pytest.raises(RuntimeError, match="plain tensors and reverse mode for kernels; got a DTensor"):
        rational(y, sharded.numerator, sharded.denominator, backend="native")


def test_dtensors_have_neither_dropout_nor_noise(mesh: DeviceMesh) -> None:
    """Replicas would draw different numbers."""
    x = distribute_tensor(input_of(), mesh, [Replicate()])
    for options in ({"dropout": 0.5}, {"form": "D"}):
        module = distribute_module(GroupRational(6, 2, "silu", **options), mesh)
        with pytest.raises(ValueError, match=r"rational: expected neither dropout nor noise for DTensors.*nn\.Dropout"):
            module(x)
        assert isinstance(module.eval()(x), DTensor)
