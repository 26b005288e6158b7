# SPDX-License-Identifier: Apache-2.0
"""torch.library's own checks of the ops, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass._ops import op
from singlepass.kv import Quantized, decode_attention, dequantize, probe_saliency, quantize

from ..tolerances import assert_same_bits
from .inputs import Attention, attention, tokens
from .test_attention import CODECS, RAGGED


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(x: Tensor, axis: str, index: Tensor | None) -> tuple[tuple[Tensor | None, ...], dict[str, int]]:
    """Arguments of kv_quantize_ after x and index, and its options."""
    separable = {"channel_separable": True, "group": 16} if axis == "token" else {}
    q = quantize(x if index is None else x[:, :, : index.shape[2]], 4, axis=axis, block=8, **separable)
    return (q.starts, q.counts, q.codes, q.scales, q.channels), {"bits": 4, "axis": int(axis == "token")}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("transposed", torch.bfloat16), ("narrowed", torch.float16)],
    ids=["contiguous", "transposed", "narrowed"],
)
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_codec_ops_pass_opcheck(axis: str, dtype: torch.dtype, layout: str) -> None:
    x = tokens((2, 2, 21, 32), dtype, layout)
    index = torch.randperm(21).int()[:13].expand(2, 2, -1).contiguous()
    for chosen in (None, index):
        (starts, counts, *parts), options = packed(x, axis, chosen)
        torch.library.opcheck(op("kv_quantize_"), (x, chosen, starts, counts, *parts), options)
        out = torch.zeros_like(x.contiguous())
        torch.library.opcheck(op("kv_dequantize_"), (*parts, chosen, starts, counts, out), options)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
def test_saliency_op_passes_opcheck(more: bool, layout: str) -> None:
    q, k = tokens((2, 4, 5, 32), layout=layout), tokens((2, 2, 21, 32), layout=layout)
    mask, lse = (torch.ones(2, 21, dtype=torch.bool), torch.zeros(2, 4, 5)) if more else (None, None)
    positions = torch.tensor([20, 3, 3, 9, 0])
    options = {"scale": 0.2, "softcap": 5.0} if more else {"scale": 0.2}
    torch.library.opcheck(op("kv_saliency"), (q, k, positions, mask, lse), options)


def arguments(case: Attention) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The op's, of a call of the public function."""
    parts = []
    for keys, values in case.segments:
        channels = values.scales.new_empty(0) if values.channels is None else values.channels
        parts += [keys.codes, keys.scales, values.codes, values.scales, channels, keys.starts, keys.counts]
    axis = int(bool(case.segments) and case.segments[0][0].axis == "token")
    options = {
        "bits": [keys.bits for keys, _ in case.segments],
        "key_axis": axis,
        "scale": 0.1,
        "softcap": case.softcap,
    }
    return (case.q, parts, case.window_k, case.window_v, case.window, case.sinks, case.first), options


@pytest.mark.parametrize("codec", [*CODECS, None])
def test_decode_op_passes_opcheck(codec: str | None) -> None:
    more = codec in ("kivi", "groups", None)
    dtype = torch.bfloat16 if more else torch.float32
    case = attention((), dtype=dtype) if codec is None else attention((RAGGED,), dtype=dtype, **CODECS[codec])
    if more:
        case.sinks, case.softcap = torch.zeros(8), 3.0
        case.first = torch.zeros(len(case.segments), 2, 2, dtype=torch.int32)
    torch.library.opcheck(op("kv_decode"), *arguments(case))


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
