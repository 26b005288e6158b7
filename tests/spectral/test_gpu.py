# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: graphs, streams, determinism, training there."""

from __future__ import annotations

import pytest
import torch

from singlepass import spectral
from singlepass._ops import OPS
from singlepass.spectral import SST, LorentzLinear, SSTLinear

from ..tolerances import assert_same_bits
from .layers import linear

pytestmark = pytest.mark.gpu

each_backend = pytest.mark.parametrize("backend", ["native", "triton"])


def layer_on_gpu(backend: str, evaluation: str = "auto") -> SSTLinear:
    return SSTLinear.from_linear(linear(256, 192).cuda(), 16, evaluation=evaluation, backend=backend)


@each_backend
@pytest.mark.parametrize("evaluation", ["factored", "materialized"])
def test_forward_and_backward_in_a_graph(evaluation: str, backend: str) -> None:
    layer = layer_on_gpu(backend, evaluation)
    x, grad = torch.randn(300, 192, device="cuda", requires_grad=True), torch.randn(300, 256, device="cuda")
    leaves = [x, layer.singular_values, layer.active_u, layer.active_v]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(x), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        grads = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        x.normal_()
        grad.normal_()
    graph.replay()
    want = layer(x)
    assert_same_bits(y.detach(), want.detach())
    for got, expected in zip(grads, torch.autograd.grad(want, leaves, grad), strict=True):
        assert_same_bits(got, expected)


@each_backend
def test_the_update_in_a_graph(backend: str) -> None:
    step = OPS["spectral_step_"].on(backend)
    shapes = ((16, 256), (16, 192), (192,))
    params = [torch.nn.functional.normalize(torch.randn(*shape, device="cuda"), dim=-1).abs() for shape in shapes]
    grads = [torch.randn_like(p) for p in params]
    hyper = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}

    def lists() -> list[list[torch.Tensor]]:
        zeros = [[torch.zeros_like(p) for p in params] for _ in "mv"]
        return [[p.clone() for p in params], grads, *zeros, [torch.zeros((), device="cuda") for _ in params]]

    captured, eager, lr = lists(), lists(), torch.tensor(0.01, device="cuda")
    step(*lists(), lr, **hyper)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured, lr, **hyper)
    for _ in range(3):
        graph.replay()
        step(*eager, lr, **hyper)
    for a, b in zip(captured[0] + captured[4], eager[0] + eager[4], strict=True):
        assert_same_bits(a, b)


@each_backend
def test_repeated_runs_give_the_same_bits(backend: str) -> None:
    layer = layer_on_gpu(backend)
    x, grad = torch.randn(5000, 192, device="cuda"), torch.randn(5000, 256, device="cuda")
    leaves = [layer.singular_values, layer.active_u, layer.active_v]
    first = torch.autograd.grad(layer(x), leaves, grad)
    for _ in range(5):
        for a, b in zip(torch.autograd.grad(layer(x), leaves, grad), first, strict=True):
            assert_same_bits(a, b)


@each_backend
def test_on_another_stream(backend: str) -> None:
    layer = LorentzLinear(192, 256, 16, device="cuda", backend=backend)
    x = torch.randn(400, 192, device="cuda")
    want = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(got.detach(), want.detach())


@each_backend
@pytest.mark.parametrize("evaluation", ["factored", "materialized"])
def test_compiles_into_one_graph(evaluation: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = layer_on_gpu(backend, evaluation)
    x, grad = torch.randn(300, 192, device="cuda", requires_grad=True), torch.randn(300, 256, device="cuda")
    leaves = [x, layer.singular_values, layer.active_u, layer.active_v]
    expected = torch.autograd.grad(layer(x), leaves, grad)
    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x), leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@each_backend
def test_training_follows_the_cpu(backend: str) -> None:
    """The same draws and, up to the order of sums, the same numbers."""
    models = []
    for device, name in (("cpu", "native"), ("cuda", backend)):
        model = torch.nn.Sequential(linear(32, 24, seed=1), torch.nn.Tanh(), linear(8, 32, seed=2)).to(device)
        spectral.convert(model, 4, skip=["2"], backend=name)
        optimizer = SST(model, lr=1e-3, steps_per_iteration=5, iterations_per_round=100, backend=name)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(64, n, generator=generator).to(device) for n in (24, 8))
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        models.append(model)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=2e-3)
