# SPDX-License-Identifier: Apache-2.0
"""The product with W = U^T diag(s) V and its gradients against the dense formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass._ops import Op
from singlepass.reference import spectral as reference
from singlepass.spectral import SSTLinear, lorentz, sst_linear
from singlepass.spectral._product import Sizes, evaluation_of, flops

from ..tolerances import assert_same_bits, assert_within, ulp
from .backends import UNIT
from .layers import SIZES, Dense, dense, evaluated, layer_of

EVALUATIONS = ("factored", "materialized")
each_evaluation = pytest.mark.parametrize("evaluation", EVALUATIONS)
each_size = pytest.mark.parametrize("size", SIZES)


def assert_agrees(got: Dense, layer: SSTLinear, x: Tensor, grad: Tensor, unit: float) -> None:
    """Every sum of products is within (number of roundings) * unit of its terms' magnitudes."""
    want, scale = dense(layer, x, grad), dense(layer, x, grad, absolute=True)
    tokens = max(x.numel() // x.shape[-1], 1)
    roundings = tokens + layer.in_features + layer.out_features + len(layer.singular_values) + 8
    names = ("y", "x", "s", "u", "v", *(("bias",) if layer.bias is not None else ()))
    for name in names:
        value, exact, bound = (getattr(d, name) for d in (got, want, scale))
        assert_within(value, exact, roundings * unit * bound, name)


@each_size
@each_evaluation
@pytest.mark.parametrize("gradient", ["enhanced", "default"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_against_float64(size: str, evaluation: str, gradient: str, bias: bool) -> None:
    layer = layer_of(size, bias=bias, evaluation=evaluation, gradient=gradient)
    x, grad = torch.randn(3, 11, layer.in_features), torch.randn(3, 11, layer.out_features)
    assert_agrees(evaluated(layer, x, grad), layer, x, grad, UNIT)


@each_evaluation
@pytest.mark.parametrize("size", ["tall", "panels"])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)], ids=str)
def test_in_sixteen_bits(size: str, evaluation: str, dtype: torch.dtype, unit: float) -> None:
    """What is stored between products is rounded to 16 bits: a few roundings in a row, and the sums' in float32."""
    layer = layer_of(size, dtype, evaluation=evaluation)
    x, grad = torch.randn(13, layer.in_features).to(dtype), torch.randn(13, layer.out_features).to(dtype)
    got, want, scale = evaluated(layer, x, grad), dense(layer, x, grad), dense(layer, x, grad, absolute=True)
    for name in ("y", "x", "s", "u", "v", "bias"):
        value, exact, bound = (getattr(d, name) for d in (got, want, scale))
        assert value.dtype == dtype
        assert_within(value, exact, 8 * unit * bound, name)


LAYOUTS = {
    "vector": lambda n: torch.randn(n),
    "empty": lambda n: torch.randn(0, 5, n),
    "expanded": lambda n: torch.randn(1, n).expand(7, n),
    "transposed": lambda n: torch.randn(n, 9).mT,
    "gaps": lambda n: torch.randn(6, 2 * n)[:, ::2],
    "chunk": lambda n: torch.randn(4, 3, 2 * n).chunk(2, -1)[1],
    "deep": lambda n: torch.randn(2, 1, 3, 2, n),
}


@each_evaluation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout(layout: str, evaluation: str) -> None:
    layer = layer_of("wide", evaluation=evaluation)
    x = LAYOUTS[layout](layer.in_features)
    grad = torch.randn(layer.out_features).expand(*x.shape[:-1], layer.out_features)
    got = evaluated(layer, x, grad)
    assert got.y.shape == (*x.shape[:-1], layer.out_features)
    assert got.y.is_contiguous()
    assert_agrees(got, layer, x, grad, UNIT)


@each_evaluation
@pytest.mark.parametrize("gradient", ["enhanced", "default"])
def test_gradcheck(evaluation: str, gradient: str) -> None:
    """The default gradients are those of the function; enhanced ones are right for everything but the vectors."""
    layer = layer_of("tall", torch.float64, evaluation=evaluation, gradient=gradient)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    u, v, s, bias = layer.active_u, layer.active_v, layer.singular_values, layer.bias
    if gradient == "enhanced":
        u, v = u.detach(), v.detach()

    def call(x: Tensor, u: Tensor, v: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        options = {"gradient": gradient, "evaluation": evaluation}
        return sst_linear(x, u, v, s, layer.frozen_u, layer.frozen_v, bias, **options)

    assert torch.autograd.gradcheck(call, (x, u, v, s, bias), fast_mode=True)


@each_evaluation
def test_enhanced_gradients_are_the_default_ones_without_the_singular_value(evaluation: str) -> None:
    grads = {}
    x, grad = torch.randn(9, 24), torch.randn(9, 40)
    for gradient in ("enhanced", "default"):
        layer = layer_of("tall", gradient=gradient, evaluation=evaluation)
        grads[gradient] = evaluated(layer, x, grad)
    s = layer.singular_values.detach()[: layer.rank, None]
    assert_same_bits(grads["enhanced"].u * s, grads["default"].u)
    assert_same_bits(grads["enhanced"].v * s, grads["default"].v)


def test_the_reference_is_what_the_paper_writes() -> None:
    layer = layer_of("wide", torch.float64, gradient="default")
    u, s, v = (t.requires_grad_() for t in layer.factors())
    x, grad = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    y = reference.linear(x, u, s, v, layer.bias)
    grads = torch.autograd.grad(y, (s, u, v), grad)
    want = dense(layer, x, grad)
    for got, exact in ((y, want.y), (grads[0], want.s), (grads[1][:5], want.u), (grads[2][:5], want.v)):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)


@each_evaluation
def test_only_what_is_needed_is_computed(evaluation: str) -> None:
    layer, x, grad = layer_of("tall", evaluation=evaluation), torch.randn(9, 24), torch.randn(9, 40)
    whole = evaluated(layer, x, grad)
    names = {"x": x, "u": layer.active_u, "v": layer.active_v, "s": layer.singular_values, "bias": layer.bias}
    for name, leaf in names.items():
        for other in names.values():
            other.requires_grad_(other is leaf)
        (got,) = torch.autograd.grad(layer(x), leaf, grad)
        assert_same_bits(got, getattr(whole, name), name)


@each_evaluation
def test_frozen_vectors_in_fewer_bits(evaluation: str) -> None:
    """The layer computes with what its storage holds."""
    for frozen_dtype in (torch.bfloat16, torch.float16, torch.int8):
        layer = layer_of("panels", frozen_dtype=frozen_dtype, evaluation=evaluation)
        x, grad = torch.randn(7, layer.in_features), torch.randn(7, layer.out_features)
        assert_agrees(evaluated(layer, x, grad), layer, x, grad, UNIT)


@each_evaluation
def test_autocast(evaluation: str) -> None:
    layer, x = layer_of("tall", evaluation=evaluation), torch.randn(9, 24)
    grad = torch.randn(9, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    want, scale = dense(layer, x, grad), dense(layer, x, grad, absolute=True)
    for name, p in (("s", layer.singular_values), ("u", layer.active_u), ("v", layer.active_v), ("bias", layer.bias)):
        assert p.grad.dtype == torch.float32
        # Inputs, vectors, gradients and what stands between are rounded to bfloat16.
        assert_within(p.grad, getattr(want, name), 8 * 2.0**-9 * getattr(scale, name), name)


def test_the_cheaper_way_is_taken() -> None:
    d, r = 1024, 64
    assert evaluation_of(Sizes(1, d, d, d, r), True) == "factored"
    assert evaluation_of(Sizes(d, d, d, d, r), True) == "factored"
    assert evaluation_of(Sizes(8 * d, d, d, d, r), True) == "materialized"
    assert evaluation_of(Sizes(d // 2, d, d, d, r), False) == "factored"
    assert evaluation_of(Sizes(2 * d, d, d, d, r), False) == "materialized"
    # Of the published cost model: 1.375 times full rank factored at any size, 1.17 materialised at d = 2048, N = 8192.
    counts = flops(Sizes(8192, 2048, 2048, 2048, 128), True)
    dense_flops = 6 * 8192 * 2048**2
    assert counts["factored"] / dense_flops == pytest.approx(1.375)
    assert counts["materialized"] / dense_flops == pytest.approx(1.172, abs=1e-3)


@pytest.mark.parametrize("tokens", [4, 400])
def test_auto_is_one_of_the_two(tokens: int) -> None:
    layer, x, grad = layer_of("square"), torch.randn(tokens, 32), torch.randn(tokens, 32)
    sizes = Sizes(tokens, 32, 32, 32, 8)
    auto = evaluated(layer, x, grad)
    layer.evaluation = evaluation_of(sizes, True)
    layer.zero_grad()
    chosen = evaluated(layer, x, grad)
    assert_same_bits(auto.y, chosen.y)
    assert_same_bits(auto.s, chosen.s)
    assert evaluation_of(sizes, True) == ("materialized" if tokens == 400 else "factored")


def test_differentiating_twice_raises() -> None:
    layer, x = layer_of("tall"), torch.randn(3, 24, requires_grad=True)
    for y in (layer(x), lorentz(x, torch.zeros((), requires_grad=True))):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="expected to be differentiated once"):
            grad.sum().backward()


def test_changing_a_saved_vector_is_noticed() -> None:
    layer = layer_of("tall")
    y = layer(torch.randn(3, 24)).sum()
    with torch.no_grad():
        layer.active_u.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


BAD = {
    "x's width": (lambda t: t | {"x": torch.ones(3, 5)}, r"x of shape \(\.\.\., 6\)"),
    "rows of v": (lambda t: t | {"active_v": torch.ones(3, 6)}, "active and frozen rows"),
    "number of values": (lambda t: t | {"singular_values": torch.ones(3)}, "active and frozen rows"),
    "frozen columns": (lambda t: t | {"frozen_u": torch.ones(2, 5)}, "active and frozen rows"),
    "dtype": (lambda t: t | {"x": torch.ones(3, 6).double()}, r"x of torch\.float32"),
    "gradient": (lambda t: t | {"gradient": "none"}, "gradient among"),
    "evaluation": (lambda t: t | {"evaluation": "dense"}, "evaluation among"),
    "device": (lambda t: t | {"x": torch.ones(3, 6, device="meta")}, "tensors of one device"),
    "codes without scales": (lambda t: t | {"frozen_u": t["frozen_u"].to(torch.int8)}, r"scales of shape \(2, 1\)"),
    "scales without codes": (lambda t: t | {"scales": (torch.ones(2, 1), torch.ones(2, 1))}, r"scales of shape \(0,\)"),
    "bias": (lambda t: t | {"bias": torch.ones(6)}, r"bias of shape \(8,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    change, text = BAD[name]
    rows = {"active_u": torch.ones(2, 8), "frozen_u": torch.ones(2, 8)}
    good = rows | {"active_v": torch.ones(2, 6), "frozen_v": torch.ones(2, 6)}
    good |= {"x": torch.ones(3, 6), "singular_values": torch.ones(4)}
    assert sst_linear(**good).shape == (3, 8)
    with pytest.raises(ValueError, match=f"sst_linear: expected {text}"):
        sst_linear(**change(good))


def test_bad_input_of_lorentz_is_refused() -> None:
    one = torch.zeros(())
    for z, scale, options, text in (
        (torch.ones(3, 1), one, {}, "z of shape"),
        (torch.ones(3, 4).int(), one, {}, "a floating-point z"),
        (torch.ones(3, 4), torch.zeros(2), {}, "log_scale as one number"),
        (torch.ones(3, 4), 0.0, {}, "log_scale as a tensor"),
        (torch.ones(3, 4), one, {"k": 4.0, "offset": 1.1}, "k > 0 and offset"),
        (torch.ones(3, 4), one, {"k": -1.0}, "k > 0 and offset"),
    ):
        with pytest.raises(ValueError, match=f"lorentz: expected {text}"):
            lorentz(z, scale, **options)


def test_an_explicit_backend_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("tall", evaluation="factored"), torch.randn(3, 24, requires_grad=True)
    called = []
    real = Op.on

    def spied(op: Op, backend: str) -> Callable[..., Any]:
        called.append((op.name, backend))
        return real(op, backend)

    monkeypatch.setattr(Op, "on", spied)
    for backend in ("native", "eager"):
        layer.backend = backend
        layer(x).sum().backward()
        assert called[-1] == ("spectral_scale_", backend)
    with pytest.raises(RuntimeError, match="kernels take float32"):
        lorentz(x.double(), torch.zeros(()), backend="native")


def test_the_bounds_notice_errors() -> None:
    layer, x, grad = layer_of("one"), torch.ones(1, 1), torch.ones(1, 1)
    got = evaluated(layer, x, grad)
    off = replace(got, y=got.y + 40 * ulp(got.y.double(), torch.float32).float())
    with pytest.raises(AssertionError, match="y: 1 of 1 elements are wrong"):
        assert_agrees(off, layer, x, grad, UNIT)
