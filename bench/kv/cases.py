# SPDX-License-Identifier: Apache-2.0
"""A compressed KV cache of one layer of Llama-3-8B: decode attention over 4-bit and 2-bit tokens, and what fills it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..probe import Probe
from ..registry import Case, Pass, Provider, Step, Tier, dtype_name, fitting, missing, own_reason
from .caches import (
    BLOCK,
    DECODE,
    DEQUANTIZE,
    HEADS,
    LOW_RANK,
    LOW_RANK_CODES,
    MODEL_LENGTHS,
    PROBES,
    PROJECT,
    QUANTIZE,
    QUERY_HEADS,
    RANK,
    REGULAR_BLOCK,
    SALIENCY,
    SHAPES,
    TITLES,
    WIDTH,
    WINDOW,
    CacheShape,
    packed_bytes,
)
from .gates import gate
from .inputs import Call, Inputs, Make, inputs, split
from .low_rank import append_alone, low_rank_truth, own_append, own_low_rank
from .model import MODEL_OPS, model_case

KIVI_GROUP, KIVI_WINDOW = 32, 128
PROBE_FLOPS = 4  # of a multiplication and an addition, in both passes over the keys


Segments = list[tuple[Any, Any]]


def quantized(data: Inputs, backend: str | None) -> Segments:
    """Keys and values of the compressed tokens, the first of them salient."""
    from singlepass.kv import quantize

    salient, compressed = split(data)
    segments = []
    for bits, block, part in ((4, BLOCK, slice(0, salient)), (2, REGULAR_BLOCK, slice(salient, compressed))):
        options: dict[str, Any] = {"block": block, "backend": backend}
        keys = quantize(data.k[:, :, part], bits, axis="channel", **options)
        segments.append((keys, quantize(data.v[:, :, part], bits, axis="token", channel_separable=True, **options)))
    return segments


def restored(data: Inputs, dtype: torch.dtype = torch.float32, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """All keys and values, what was compressed as it comes back."""
    from singlepass.kv import dequantize

    compressed = split(data)[1]
    sides: list[list[Tensor]] = [[], []]
    for pair in quantized(data, backend):
        for parts, q in zip(sides, pair, strict=True):
            parts.append(dequantize(q, dtype, backend=backend))
    k, v = (
        torch.cat((*parts, x[:, :, compressed:].to(dtype)), 2) for parts, x in zip(sides, (data.k, data.v), strict=True)
    )
    return k, v


def own_decode(backend: str, data: Inputs) -> Call:
    from singlepass.kv import decode_attention

    segments, compressed = quantized(data, None), split(data)[1]
    window_k, window_v = (x[:, :, compressed:].contiguous() for x in (data.k, data.v))
    window = torch.tensor([[0, WINDOW]] * len(data.q), dtype=torch.int32, device=data.q.device)
    return lambda: decode_attention(data.q, segments, window_k, window_v, window, backend=backend)[0]


def own_quantize(backend: str, data: Inputs) -> Call:
    """What quantising is judged by: the tokens as they come back."""
    return lambda: torch.cat([x.flatten() for x in restored(data, backend=backend)])


def quantize_alone(backend: str, data: Inputs) -> Call:
    """What is timed."""
    return lambda: quantized(data, backend)[0][0].codes


def own_dequantize(backend: str, data: Inputs) -> Call:
    """What restoring is judged by: all tokens, side by side."""
    from singlepass.kv import dequantize

    segments = quantized(data, None)
    return lambda: torch.cat([dequantize(q, backend=backend).flatten() for pair in segments for q in pair])


def dequantize_alone(backend: str, data: Inputs) -> Call:
    """What is timed."""
    from singlepass.kv import dequantize

    segments = quantized(data, None)
    return lambda: [dequantize(q, backend=backend) for pair in segments for q in pair][-1]


def own_saliency(backend: str, data: Inputs) -> Call:
    from singlepass.kv import probe_saliency

    return lambda: probe_saliency(data.probes, data.k, data.positions, backend=backend)


def sdpa(dtype: torch.dtype, data: Inputs) -> Call:
    """PyTorch's attention over uncompressed tokens."""
    q, k, v = (t.to(dtype) for t in (data.q, data.k, data.v))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def grouped(dtype: torch.dtype, data: Inputs) -> Call:
    """Two matrix products and a softmax, the query heads of a group side by side."""
    q, k, v = (t.to(dtype) for t in (data.q, data.k, data.v))
    rows = q.view(len(q), HEADS, QUERY_HEADS // HEADS, WIDTH)
    return lambda: (((rows @ k.mT) * WIDTH**-0.5).softmax(-1) @ v).view(q.shape)


def grouped_sdpa(dtype: torch.dtype, data: Inputs) -> Call:
    """PyTorch's attention with the query heads of a group as queries of one head."""
    q, k, v = (t.to(dtype) for t in (data.q, data.k, data.v))
    rows = q.view(len(q), HEADS, QUERY_HEADS // HEADS, WIDTH)
    return lambda: F.scaled_dot_product_attention(rows, k, v).view(q.shape)


def copied(data: Inputs) -> Call:
    k, v = torch.empty_like(data.k), torch.empty_like(data.v)

    def call() -> Tensor:
        k.copy_(data.k)
        return v.copy_(data.v)

    return call


def quantized_cache(data: Inputs) -> Call:
    """A step of transformers' QuantizedCache in 4 bits: one token is added, everything restored, then attention."""
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=4)
    layer.update(data.k, data.v)

    def call() -> Tensor:
        k, v = layer.update(data.k[:, :, :1], data.v[:, :, :1])
        return F.scaled_dot_product_attention(data.q, k, v, enable_gqa=True)

    return call


def kivi(data: Inputs) -> Call:
    """Attention by KIVI's own kernels: tokens in 2 bits, in groups of 32, and the newest 128 as they are."""
    pack = importlib.import_module("quant.new_pack").triton_quantize_and_pack_along_last_dim
    product = partial(importlib.import_module("quant.matmul").cuda_bmm_fA_qB_outer, KIVI_GROUP)
    q, k, v = (t.half() for t in (data.q, data.k, data.v))
    compressed = (k.shape[2] - KIVI_WINDOW) // KIVI_GROUP * KIVI_GROUP
    keys = pack(k[:, :, :compressed].mT.contiguous(), KIVI_GROUP, 2)
    values = pack(v[:, :, :compressed].contiguous(), KIVI_GROUP, 2)
    newest_k, newest_v = (x[:, :, compressed:].contiguous() for x in (k, v))
    rows = q.view(len(q), HEADS, QUERY_HEADS // HEADS, WIDTH)

    def call() -> Tensor:
        newest = (rows @ newest_k.mT).view(len(q), QUERY_HEADS, 1, -1)
        logits = torch.cat((product(q, *keys, 2), newest), -1) * WIDTH**-0.5
        weights = logits.softmax(-1, dtype=torch.float32).half()
        grouped_weights = weights[..., compressed:].reshape(len(q), HEADS, QUERY_HEADS // HEADS, -1)
        return product(weights[..., :compressed], *values, 2) + (grouped_weights @ newest_v).view(q.shape)

    return call


def dense_truth(data: Inputs) -> Tensor:
    return sdpa(torch.float64, data)()


def decode_truth(data: Inputs) -> Tensor:
    k, v = restored(data, torch.float64, backend="eager")
    return F.scaled_dot_product_attention(data.q.double(), k, v, enable_gqa=True)


def kivi_reason(device: torch.device) -> str | None:
    return missing("quant", device) or missing("kivi_gemv", device)


def quanto_reason(device: torch.device) -> str | None:
    return missing("transformers", device) or missing("optimum", device)


def provider(
    name: str,
    column: str,
    tier: Tier,
    make: Make,
    truth: Callable[[Inputs], Tensor],
    dtype: torch.dtype,
    timed: Make | None = None,
    roundings: int = 1,
    **options: Any,
) -> Provider:
    def prepare(data: Inputs) -> Step:
        return Step((timed or make)(data))

    return Provider(
        name, column, tier, prepare=prepare, gate=partial(gate, make, truth, dtype, roundings=roundings), **options
    )


OWN: dict[str, Callable[[str, Inputs], Call]] = {
    DECODE: own_decode,
    QUANTIZE: own_quantize,
    DEQUANTIZE: own_dequantize,
    SALIENCY: own_saliency,
    LOW_RANK: partial(own_low_rank, None),
    LOW_RANK_CODES: partial(own_low_rank, (4, 2)),
    PROJECT: own_append,
}
TIMED: dict[str, Callable[[str, Inputs], Call]] = {
    QUANTIZE: quantize_alone,
    DEQUANTIZE: dequantize_alone,
    PROJECT: append_alone,
}
TRUTHS: dict[str, Callable[[Inputs], Tensor]] = {
    DECODE: decode_truth,
    LOW_RANK: partial(low_rank_truth, None),
    LOW_RANK_CODES: partial(low_rank_truth, (4, 2)),
}
OPS_OF = {LOW_RANK: DECODE, LOW_RANK_CODES: DECODE, PROJECT: "kv_project_"}  # which op a layer runs


def eager_truth(op: str, data: Inputs) -> Tensor:
    return OWN[op]("eager", data)()


def providers(op: str, shape: CacheShape, dtype: torch.dtype, on_gpu: bool) -> Iterator[Provider]:
    truth = TRUTHS.get(op, partial(eager_truth, op))
    bytes_of_floats = shape.elements * 4
    for name, tier, footprint in (
        ("native", Tier.FUSED, bytes_of_floats // 8),
        ("triton", Tier.FUSED, bytes_of_floats // 8),
        ("eager", Tier.EAGER, 4 * bytes_of_floats),
    ):
        timed = partial(TIMED[op], name) if op in TIMED else None
        why_not = partial(own_reason, (OPS_OF.get(op, op),), name, dtype)
        make = partial(OWN[op], name)
        # Queries and results are rounded when they are projected, too.
        roundings = 3 if op in (LOW_RANK, LOW_RANK_CODES) else 1
        yield provider(name, name, tier, make, truth, dtype, timed, roundings, why_not=why_not, footprint=footprint)
    if op == QUANTIZE:
        yield provider("copy", "yardstick", Tier.FUSED, copied, lambda data: data.v, dtype, footprint=bytes_of_floats)
    if op not in (DECODE, LOW_RANK, LOW_RANK_CODES):
        return
    # The choice of a user: whichever of them is fastest.
    for name, attention in (("sdpa", sdpa), ("grouped", grouped), ("grouped-sdpa", grouped_sdpa)):
        for kind in (torch.float32, torch.bfloat16):
            dense = partial(attention, kind)
            label = f"{name}-{dtype_name(kind)}"
            options: dict[str, Any] = {"footprint": bytes_of_floats}
            if kind == torch.bfloat16:
                options["differs"] = "tokens and intermediate results in bfloat16"
            yield provider(label, "yardstick", Tier.FUSED, dense, dense_truth, dtype, **options)
    if op != DECODE:
        return
    differs = "tokens in 4 bits, in groups of 64 elements along the tokens"
    options = {"differs": differs, "why_not": quanto_reason, "footprint": 3 * bytes_of_floats}
    yield provider("transformers-quanto", "peer", Tier.PEER, quantized_cache, dense_truth, dtype, **options)
    if on_gpu:
        differs = "tokens in 2 bits, in groups of 32"
        options = {"differs": differs, "why_not": kivi_reason, "footprint": bytes_of_floats}
        yield provider("kivi", "peer", Tier.PEER, kivi, dense_truth, dtype, **options)


def passes(op: str, shape: CacheShape, dtype: torch.dtype) -> tuple[Pass, ...]:
    """Decode reads packed tokens and the window; quantising reads tokens and writes packed ones; saliency reads the
    keys twice."""
    window = shape.batch * HEADS * 2 * WINDOW * WIDTH * dtype.itemsize
    tokens, packed = shape.elements * dtype.itemsize, packed_bytes(shape)
    if op == DECODE:
        return (Pass((packed + window,), ()),)
    if op == LOW_RANK:
        return (Pass((tokens * RANK // WIDTH,), ()),)
    if op == LOW_RANK_CODES:
        return (Pass((packed_bytes(shape, RANK) + window * RANK // WIDTH,), ()),)
    if op == PROJECT:
        return (Pass((2 * HEADS * WIDTH * RANK * 4,), ()),)  # the bases
    if op == SALIENCY:
        return (Pass((tokens // 2,), ()), Pass((tokens // 2,), ()))
    if op == QUANTIZE:
        return (Pass((tokens, packed), ()),)
    return (Pass((packed, shape.elements * 4), ()),)


def flops(op: str, shape: CacheShape) -> int:
    if op == PROJECT:
        return 2 * 2 * shape.batch * HEADS * WIDTH * RANK
    attention = 2 * QUERY_HEADS // HEADS
    per_element = {DECODE: attention, LOW_RANK: attention // 2, LOW_RANK_CODES: attention // 2}
    per_element |= {QUANTIZE: 6, DEQUANTIZE: 3}
    if op == SALIENCY:
        return PROBE_FLOPS * shape.elements // 2 * min(PROBES, shape.length // 10) * QUERY_HEADS // HEADS
    return per_element[op] * shape.elements


def cases(device: torch.device) -> Iterator[Case]:
    """Decode over all shapes, the most telling first; the other ops on one sequence."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES["cuda" if device.type == "cuda" else "cpu"]:
            for op in TITLES:
                alone = shape.batch == 1 and shape.length <= (32768 if op != SALIENCY else 8192)
                if op in OWN and (op == DECODE or alone):
                    yield case(op, shape, dtype, device.type == "cuda")
    for length in MODEL_LENGTHS:
        for op in MODEL_OPS:
            yield model_case(op, length, torch.float32)


QUICK_LENGTHS = (32768, 16384, 8192, 4096)
QUICK_SALIENCY = 4096
QUICK_SECONDS = 2.0  # that a call of the slowest provider, some 1,300 times the floor of attention, may take


def quick_cases(device: torch.device, probe: Probe) -> Iterator[Case]:
    if device.type == "cuda":
        yield from cases(device)
        return

    def seconds(length: int) -> float:
        return 1300.0 * probe.moving(sum(p.bytes for p in passes(DECODE, CacheShape(1, length), torch.float32)))

    longest = CacheShape(1, fitting(QUICK_LENGTHS, seconds, QUICK_SECONDS))
    float32, bfloat16 = torch.float32, torch.bfloat16
    telling = ((DECODE, float32), (DECODE, bfloat16), (LOW_RANK, float32), (QUANTIZE, float32), (SALIENCY, float32))
    for op, dtype in telling:
        yield case(op, CacheShape(1, QUICK_SALIENCY) if op == SALIENCY else longest, dtype, False)
    yield case(DEQUANTIZE, longest, float32, False)


def case(op: str, shape: CacheShape, dtype: torch.dtype, on_gpu: bool) -> Case:
    return Case(
        family="kv",
        op=op,
        size=shape.name,
        dtype=dtype,
        ops=(OPS_OF.get(op, op),),
        passes=passes(op, shape, dtype),
        flops=flops(op, shape),
        elements=shape.elements,
        input_bytes=shape.elements * dtype.itemsize,
        tensors=2,
        inputs=partial(inputs, shape, dtype),
        providers=tuple(providers(op, shape, dtype, on_gpu)),
    )
