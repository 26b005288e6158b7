# SPDX-License-Identifier: Apache-2.0
"""torch.library's own checks of the ops, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from singlepass.kv import Quantized, decode_attention, dequantize, probe_saliency, quantize

from ..tolerances import assert_same_bits
from .inputs import attention, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_attention_compiles_into_one_graph(compiler: str) -> None:
    case = attention(queries=2)

    def step(q: Tensor, k: Tensor, v: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = decode_attention(2.0 * q, case.segments, k, v, window)
        return out + 1.0, lse

    inputs = (case.q, case.window_k, case.window_v, case.window)
    for a, b in zip(torch.compile(step, fullgraph=True, backend=compiler)(*inputs), step(*inputs), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_the_way_there_and_back_compiles_into_one_graph(axis: str, compiler: str) -> None:
    def there(x: Tensor) -> tuple[Quantized, Tensor]:
        q = quantize(x * 2.0, 4, axis=axis, block=16)
        return q, dequantize(q) + 1.0

    x = tokens((2, 2, 40, 32))
    (q, back), (expected, expected_back) = torch.compile(there, fullgraph=True, backend=compiler)(x), there(x)
    for name in ("codes", "scales", "starts", "counts"):
        assert_same_bits(getattr(q, name), getattr(expected, name), name)
    assert_same_bits(back, expected_back)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_saliency_compiles_into_one_graph(compiler: str) -> None:
    def scores(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        return probe_saliency(q * 2.0, k, positions) + 1.0

    inputs = tokens((2, 4, 5, 32)), tokens((2, 2, 21, 32)), torch.tensor([20, 3, 3, 9, 0])
    compiled = torch.compile(scores, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*inputs), scores(*inputs), rtol=1e-6, atol=0.0)  # the division may be another's
