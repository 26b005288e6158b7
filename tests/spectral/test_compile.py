# SPDX-License-Identifier: Apache-2.0
"""torch.library's own checks of the ops, torch.compile, and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from singlepass import spectral
from singlepass.spectral import LorentzLinear

from ..tolerances import assert_same_bits
from .layers import evaluated, layer_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize("frozen_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("evaluation", ["factored", "materialized"])
def test_compiles_into_one_graph(evaluation: str, frozen_dtype: torch.dtype | None) -> None:
    layer = layer_of("tall", evaluation=evaluation, frozen_dtype=frozen_dtype)
    x, grad = torch.randn(9, 24), torch.randn(9, 40)
    want = evaluated(layer, x, grad)
    layer.zero_grad()
    layer.compile(fullgraph=True, backend="aot_eager")
    got = evaluated(layer, x, grad)
    for name in ("y", "x", "s", "u", "v", "bias"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)


@pytest.mark.inductor
def test_compiles_with_inductor() -> None:
    layer = LorentzLinear(24, 40, 5)
    x, grad = torch.randn(9, 24), torch.randn(9, 40)
    want = evaluated(layer, x, grad)
    layer.zero_grad()
    layer.compile(fullgraph=True)
    got = evaluated(layer, x, grad)
    for name in ("y", "x", "s", "u", "v", "bias"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-5)


def test_few_graphs_serve_any_number_of_tokens() -> None:
    """At most two: one for each way to evaluate the product."""
    counter = CompileCounter()
    layer = layer_of("square")
    call = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (2, 3, 17, 40, 300, 500, 20):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(call(x), layer(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_exports() -> None:
    layer = layer_of("tall", evaluation="factored").requires_grad_(False)
    shapes = ({0: torch.export.Dim("tokens", min=2)},)
    exported = torch.export.export(layer, (torch.randn(4, 24),), dynamic_shapes=shapes)
    other = torch.randn(99, 24)
    torch.testing.assert_close(exported.module()(other), layer(other), rtol=1e-5, atol=1e-6)


def test_merged_models_export() -> None:
    model = torch.nn.Sequential(layer_of("tall"), torch.nn.ReLU())
    x = torch.randn(4, 24)
    want = model(x)
    exported = torch.export.export(spectral.merge(model), (x,))
    torch.testing.assert_close(exported.module()(x), want, rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_same_gradients() -> None:
    layer, x, grad = layer_of("tall"), torch.randn(9, 24), torch.randn(9, 40)
    want = evaluated(layer, x, grad)
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False).backward(grad)
    assert_same_bits(leaf.grad, want.x)
    assert_same_bits(layer.singular_values.grad, want.s)
    assert_same_bits(layer.active_u.grad, want.u)
