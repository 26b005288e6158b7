# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: graphs, streams, launches, poisoned and misaligned memory.

The numerics of the CUDA and Triton kernels are in the other files of this folder, whose places include both.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from singlepass.functional import rational

from ..memory import need
from ..tolerances import assert_same_bits
from .inputs import NAMES, Inputs, Place, check, make

pytestmark = pytest.mark.gpu

each_kernel = pytest.mark.parametrize(
    "place", [Place("native", "cuda"), Place("triton", "cuda")], ids=lambda p: p.backend
)


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


@each_kernel
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_the_same_bits_ten_times(place: Place, dtype: torch.dtype) -> None:
    inputs = make("rows", dtype=dtype, channels=768, fused=True, device="cuda")
    inputs.x = torch.randn(4096, 768, device="cuda").to(dtype).requires_grad_()
    inputs.gate, inputs.grad = torch.randn(2, 4096, 768, device="cuda").to(dtype)
    inputs.gate.requires_grad_()
    first = inputs.results(place.backend)
    for _ in range(9):
        same(first, inputs.results(place.backend))


@each_kernel
def test_graphs(place: Place) -> None:
    inputs = make("rows", fused=True, device="cuda")
    inputs.results(place.backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = inputs.results(place.backend)
    with torch.no_grad():
        inputs.x.copy_(torch.randn_like(inputs.x))
        inputs.numerator.mul_(1.5)
    graph.replay()
    same(captured, inputs.results(place.backend))


@each_kernel
def test_dropout_in_a_graph_draws_anew(place: Place) -> None:
    x = torch.ones(1000, 8, device="cuda")
    a, b = torch.tensor([[0.0, 1.0]], device="cuda"), torch.zeros(1, 1, device="cuda")
    rational(x, a, b, dropout=0.5, backend=place.backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rational(x, a, b, dropout=0.5, backend=place.backend)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


@each_kernel
def test_another_stream(place: Place) -> None:
    inputs = make("rows", fused=True, device="cuda")
    expected = inputs.results(place.backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = inputs.results(place.backend)
    stream.synchronize()
    same(expected, found)


@each_kernel
@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_misaligned_tensors(place: Place, dtype: torch.dtype, offset: int) -> None:
    def misaligned(t: Tensor) -> Tensor:
        memory = torch.full((t.numel() + 16,), float("nan"), dtype=t.dtype, device="cuda")
        moved = memory[offset : offset + t.numel()].view(t.shape)
        moved.copy_(t.detach())
        return moved

    inputs: Inputs = make("rows", dtype=dtype, fused=True, device="cuda")
    bounds = inputs.bounds()
    inputs.x, inputs.gate = (misaligned(t).requires_grad_() for t in (inputs.x, inputs.gate))
    inputs.grad = misaligned(inputs.grad)
    check(inputs.results(place.backend), bounds, place.backend)


@each_kernel
@pytest.mark.large
def test_more_elements_than_32_bits_count(place: Place) -> None:
    n = 2**31 + 64
    need("cuda", 5 * 2 * n)
    x = torch.ones(n // 8, 8, dtype=torch.bfloat16, device="cuda")
    x[-1], x[2**27] = 2.0, 3.0
    inputs = [x.requires_grad_(), torch.tensor([[0.0, 1.0]], device="cuda"), torch.ones(1, 1, device="cuda")]
    y = rational(*inputs, backend=place.backend)
    assert float(y[0, 0]) == 0.5
    assert y[-1].tolist() == [pytest.approx(2 / 3, rel=2**-8)] * 8
    assert y[2**27].tolist() == [0.75] * 8
