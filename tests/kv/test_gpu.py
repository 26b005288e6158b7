# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: graphs, streams, the same bits again, sizes, and a cache from prompt to answer.

The numerics of the CUDA and Triton kernels are in the other files of this folder, whose backends include both.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from singlepass.kv import (
    Codec,
    MatryoshkaLayer,
    Quantized,
    ZipCacheLayer,
    decode_attention,
    dequantize,
    probe_saliency,
    quantize,
)

from ..tolerances import assert_same_bits

pytestmark = pytest.mark.gpu
each_kernel = pytest.mark.parametrize("backend", ["native", "triton"])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def segments(tokens: int, backend: str) -> list[tuple[Quantized, Quantized]]:
    """Keys and values of 2 sequences and 4 heads of 128 channels, in 4 and in 2 bits."""
    made = []
    for bits in (4, 2):
        k, v = random(2, 4, tokens, 128, seed=bits), random(2, 4, tokens, 128, seed=bits + 1)
        keys = quantize(k, bits, block=128, backend=backend)
        values = quantize(v, bits, axis="token", block=128, channel_separable=True, backend=backend)
        made.append((keys, values))
    return made


def window(slots: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([[0, slots], [5, slots - 1]], dtype=torch.int32, device="cuda")
    return random(2, 4, slots, 128, seed=7), random(2, 4, slots, 128, seed=8), ends


@each_kernel
def test_the_same_bits_ten_times(backend: str) -> None:
    q, parts, rest = random(2, 32, 1, 128), segments(5000, backend), window()
    first = decode_attention(q, parts, *rest, backend=backend)
    k, positions = random(2, 4, 5000, 128), torch.arange(0, 5000, 40, device="cuda")
    saliency = probe_saliency(random(2, 32, 125, 128), k, positions, backend=backend)
    for _ in range(9):
        for again, result in zip(decode_attention(q, parts, *rest, backend=backend), first, strict=True):
            assert_same_bits(again, result)
        assert_same_bits(probe_saliency(random(2, 32, 125, 128), k, positions, backend=backend), saliency)


@each_kernel
def test_graphs(backend: str) -> None:
    """A captured step follows its queries, its window and how far that is filled."""
    q, parts, rest = random(2, 32, 1, 128), segments(2000, backend), window()
    decode_attention(q, parts, *rest, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(q, parts, *rest, backend=backend)
    for end in (64, 65, 128):
        q.normal_()
        rest[0].normal_()
        rest[2][:, 1] = end
        graph.replay()
        for a, b in zip(captured, decode_attention(q, parts, *rest, backend=backend), strict=True):
            assert_same_bits(a, b)


@each_kernel
def test_a_captured_codec(backend: str) -> None:
    x = random(2, 4, 1000, 128)
    dequantize(quantize(x, 4, block=128, backend=backend), backend=backend)
    q = quantize(x, 4, block=128, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dequantize(q, backend=backend)
    q.codes.random_(0, 256)
    graph.replay()
    assert_same_bits(captured, dequantize(q, backend=backend))


PLANNED = {
    "4 and 2 bits": lambda backend: ZipCacheLayer(max_tokens=600, backend=backend),
    "low rank": lambda backend: low_rank(None, backend),
    "low rank, 4 and 2 bits": lambda backend: low_rank((4, 2), backend),
}


def low_rank(bits: tuple[int, int] | None, backend: str) -> MatryoshkaLayer:
    bases = torch.linalg.qr(torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(5))).Q.to("cuda")
    return MatryoshkaLayer(bases, bases, key_ranks=64, value_ranks=96, bits=bits, max_tokens=600, backend=backend)


@each_kernel
@pytest.mark.parametrize("name", PLANNED)
def test_a_captured_step_of_a_cache(name: str, backend: str) -> None:
    """One graph for 300 tokens and two compressions, which the host makes between replays."""
    q, k, v = (random(2, heads, 400, 128, seed=heads) for heads in (16, 4, 4))
    layer, other = PLANNED[name](backend), PLANNED[name](backend)
    for its in (layer, other):
        its.prefill(q[:, :, :96], k[:, :, :96], v[:, :, :96])
    new = [x[:, :, :1].clone() for x in (q, k, v)]

    def step(its: ZipCacheLayer | MatryoshkaLayer) -> Tensor:
        its.append(new[1], new[2])
        return its.attend(new[0])

    with layer.planned():  # once as it is: libraries load what they need
        step(layer)
    layer.drop_newest(1)
    graph = torch.cuda.CUDAGraph()
    for t in range(96, 396):
        for held, x in zip(new, (q, k, v), strict=True):
            held.copy_(x[:, :, t : t + 1])
        with layer.planned():
            if t == 96:
                with torch.cuda.graph(graph):
                    captured = step(layer)
            graph.replay()
        with other.planned():
            assert_same_bits(captured, step(other), f"token {t}")
    assert layer.length == other.length == 396
    for a, b in zip(layer.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a, b)


@each_kernel
def test_a_compiled_step_of_a_cache_makes_graphs_of_its_own(backend: str) -> None:
    q, k, v = (random(2, heads, 400, 128, seed=heads) for heads in (16, 4, 4))
    layers = [ZipCacheLayer(max_tokens=400, backend=backend) for _ in range(2)]

    def step(its: ZipCacheLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        its.append(k, v)
        return its.attend(q)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for its in layers:
        its.prefill(q[:, :, :96], k[:, :, :96], v[:, :, :96])
    for t in range(96, 396):
        new = [x[:, :, t : t + 1].clone() for x in (q, k, v)]
        torch.compiler.cudagraph_mark_step_begin()
        with layers[0].planned(), torch.compiler.set_stance("default" if t == 96 else "fail_on_recompile"):
            found = compiled(layers[0], *new)
        with layers[1].planned():
            assert_same_bits(found, step(layers[1], *new), f"token {t}")
    torch._dynamo.reset()


@each_kernel
def test_another_stream(backend: str) -> None:
    q, parts, rest = random(2, 32, 1, 128), segments(3000, backend), window()
    expected = decode_attention(q, parts, *rest, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = decode_attention(q, parts, *rest, backend=backend)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


@each_kernel
def test_attention_compiles_into_one_graph(backend: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = decode_attention(2.0 * q, parts, k, v, ends, backend=backend)
        return out + 1.0, lse

    torch._dynamo.reset()
    parts, inputs = segments(500, backend), (random(2, 32, 1, 128), *window())
    for a, b in zip(torch.compile(step, fullgraph=True)(*inputs), step(*inputs), strict=True):
        assert_same_bits(a, b)


@each_kernel
def test_codes_are_those_of_the_cpu(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = random(2, 4, 3000, 128, dtype=dtype)
        for bits in (2, 4, 8):
            for options in ({}, {"axis": "token", "channel_separable": True}, {"axis": "token", "group": 32}):
                found = quantize(x, bits, block=128, backend=backend, **options)
                expected = quantize(x.cpu(), bits, block=128, **options)
                assert_same_bits(found.codes.cpu(), expected.codes)
                assert_same_bits(found.scales.cpu(), expected.scales)
                assert_same_bits(dequantize(found, backend=backend).cpu(), dequantize(expected))


@each_kernel
@pytest.mark.parametrize("codec", [Codec.zipcache(), Codec.kivi(), Codec.per_token_head(rotate=True)], ids=str)
def test_a_cache_from_prompt_to_answer(backend: str, codec: Codec) -> None:
    """On the GPU as on the CPU, with all tokens or none of them salient: which ones are may differ by a rounding."""
    for ratio in (0.0, 1.0):
        results = []
        for device in ("cuda", "cpu"):
            options = {"backend": backend} if device == "cuda" else {}
            layer = ZipCacheLayer(salient_ratio=ratio, codec=codec, **options)
            q, k, v = (random(2, h, 700, 128, dtype=torch.float32, seed=h).to(device) for h in (16, 4, 4))
            outputs = [layer.prefill(q[:, :, :500], k[:, :, :500], v[:, :, :500])]
            for t in range(500, 700):
                layer.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
                outputs.append(layer.attend(q[:, :, t : t + 1]))
            results.append(torch.cat([out.cpu() for out in outputs[1:]], 2))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@each_kernel
@pytest.mark.parametrize("bits", [None, 4])
def test_a_low_rank_cache_from_prompt_to_answer(backend: str, bits: int | None) -> None:
    bases = [torch.linalg.qr(torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(i))).Q for i in (0, 1)]
    q, k, v = random(2, 16, 900, 128, seed=1), random(2, 4, 900, 128, seed=2), random(2, 4, 900, 128, seed=3)
    outs = []
    for device in ("cuda", "cpu"):
        its_bases = [basis.to(device) for basis in bases]
        ranks = {"key_ranks": [64, 64, 32, 128], "value_ranks": [64, 64, 96, 80]}
        on = backend if device == "cuda" else "native"
        layer = MatryoshkaLayer(*its_bases, **ranks, bits=bits, window=64, backend=on)
        parts = [x.to(device) for x in (q, k, v)]
        layer.prefill(*(x[:, :, :800] for x in parts))
        steps = []
        for i in range(800, 900):
            layer.append(*(x[:, :, i : i + 1] for x in parts[1:]))
            steps.append(layer.attend(parts[0][:, :, i : i + 1]))
        outs.append(torch.cat(steps, 2).float().cpu())
    assert (outs[0] - outs[1]).norm() < 0.02 * outs[1].norm()  # of bfloat16; some codes may differ by one


@each_kernel
def test_no_memory_but_the_results(backend: str) -> None:
    """A step allocates its result and partial sums, which do not grow with the width of what is read."""
    q, parts, rest = random(2, 32, 1, 128), segments(65536, backend), window()
    decode_attention(q, parts, *rest, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decode_attention(q, parts, *rest, backend=backend)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * sum(keys.codes.nbytes for keys, _ in parts)


def repeated(q: Quantized, heads: int) -> Quantized:
    """The only head, for all heads."""
    codes, scales, counts = (t.expand(-1, heads, *t.shape[2:]) for t in (q.codes, q.scales, q.counts))
    return dataclasses.replace(q, codes=codes, scales=scales, counts=counts)


@each_kernel
@pytest.mark.slow("2^31 bytes of codes")
def test_more_than_two_billion_bytes_of_codes(backend: str) -> None:
    """Offsets beyond 32 bits: the last head's attention is that of its own tokens, as if all heads had these."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    heads, tokens = 36, 1 << 20
    x = torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16, device="cuda")
    x[:, :-1] = 0.0
    x[:, -1:] = random(1, 1, tokens, 128)
    keys = quantize(x, 4, block=128, backend=backend)
    values = quantize(x, 4, axis="token", block=128, backend=backend)
    q, none = random(1, heads, 1, 128), torch.zeros(1, heads, 0, 128, dtype=torch.bfloat16, device="cuda")
    ends = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    out, lse = decode_attention(q, [(keys, values)], none, none, ends, backend=backend)
    own = x[:, -1:].contiguous()
    alone = (quantize(own, 4, block=128, backend=backend), quantize(own, 4, axis="token", block=128, backend=backend))
    again = decode_attention(
        q[:, -1:].expand(q.shape), [(repeated(alone[0], heads), repeated(alone[1], heads))], none, none, ends,
        backend=backend,
    )  # fmt: skip
    assert_same_bits(out[:, -1:], again[0][:, -1:])
    assert_same_bits(lse[:, -1:], again[1][:, -1:])
