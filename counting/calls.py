# SPDX-License-Identifier: Apache-2.0
"""The calls of ops that the benchmark's cases are made of, on tensors that need no values: nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from singlepass._ops import OPS, Op
from singlepass._ops import kv as kv_ops
from singlepass.bench.kv.caches import (
    DECODE,
    DEQUANTIZE,
    HEADS,
    PROBES,
    PROJECT,
    QUANTIZE,
    QUERY_HEADS,
    RANK,
    SALIENCY,
    WIDTH,
    WINDOW,
)
from singlepass.bench.rational.activations import BACKWARD, FORWARD, GROUPS
from singlepass.bench.registry import Case
from singlepass.bench.spectral import layers

from . import kv, rational, spectral


@dataclass(frozen=True)
class Call:
    op: Op
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def on(self, run: Callable[..., Any]) -> Any:
        """By a function of the op's signature."""
        return run(*self.arguments, **self.options)


def calls(case: Case) -> list[Call]:
    """All calls of a case, one after the other; those of optimizers are up to their classes."""
    if case.op in (FORWARD, BACKWARD):
        return activated(case)
    if case.op in (QUANTIZE, DEQUANTIZE):
        parts = [(part, by_channels) for part in kv.compressed(case) for by_channels in (True, False)]
        return [codec(*part, case.dtype, back=case.op == DEQUANTIZE) for part in parts]
    if case.op == DECODE:
        return [decode(kv.compressed(case), kv.SHAPE[case.size].batch, case.dtype)]
    if case.op == layers.UPDATE:
        return updated(case)
    return [{PROJECT: appended, SALIENCY: probed}.get(case.op, on_layer)(case)]


def activated(case: Case) -> list[Call]:
    """Training calls the backward op after the forward one."""
    shape = rational.ACTIVATION[case.size].shape
    x, tables = torch.empty(shape, dtype=case.dtype), (torch.empty(1, 6), torch.empty(GROUPS, 4))
    arguments, options = (x, *tables, None, None), {"form": 0, "channel_dim": -1}
    forward = Call(OPS[FORWARD], arguments, options)
    backward = Call(OPS[BACKWARD], (torch.empty_like(x), *arguments), options)
    return [forward, backward] if case.op == BACKWARD else [forward]


def segment(tokens: kv.Tokens, batch: int) -> list[Tensor]:
    """In ZipCache's layout."""
    slots, blocks = tokens.slots, -(-tokens.slots // tokens.block)
    starts = (torch.arange(blocks + 1) * tokens.block).clamp(max=slots).int()
    half: dict[str, Any] = {"dtype": torch.float16}
    codes = [torch.empty(batch, HEADS, slots, WIDTH * tokens.bits // 8, dtype=torch.uint8) for _ in range(2)]
    return [
        codes[0], torch.empty(batch, HEADS, blocks, 2, WIDTH, **half),
        codes[1], torch.empty(batch, HEADS, slots, 2, 1, **half),
        torch.empty(batch, HEADS, blocks, WIDTH, **half), starts, starts.diff().expand(batch, HEADS, -1).contiguous(),
    ]  # fmt: skip


def decode(parts: Sequence[kv.Tokens], batch: int, dtype: torch.dtype) -> Call:
    q = torch.empty(batch, QUERY_HEADS, 1, WIDTH, dtype=dtype)
    windows = [torch.empty(batch, HEADS, WINDOW, WIDTH, dtype=dtype) for _ in range(2)]
    ends = torch.tensor([[0, WINDOW]] * batch, dtype=torch.int32)
    segments = [tensor for part in parts for tensor in segment(part, batch)]
    options = {"bits": [part.bits for part in parts], "key_axis": 0, "scale": 1.0, "softcap": 0.0}
    return Call(kv_ops.decode, (q, segments, *windows, ends, None, None), options)


def codec(part: kv.Tokens, by_channels: bool, dtype: torch.dtype, back: bool) -> Call:
    """Quantises keys or values of one sequence, or restores them, in float32."""
    tensors = segment(part, 1)
    codes, scales, channels = (tensors[0], tensors[1], None) if by_channels else (tensors[2], tensors[3], tensors[4])
    plain = torch.empty(1, HEADS, part.slots, WIDTH, dtype=torch.float32 if back else dtype)
    starts, counts = tensors[5:]
    options = {"bits": part.bits, "axis": 0 if by_channels else 1}
    if back:
        return Call(kv_ops.dequantize_, (codes, scales, channels, None, starts, counts, plain), options)
    return Call(kv_ops.quantize_, (plain, None, starts, counts, codes, scales, channels), options)


def appended(case: Case) -> Call:
    x = [torch.empty(1, HEADS, 1, WIDTH, dtype=case.dtype) for _ in "kv"]
    bases = [torch.empty(HEADS, WIDTH, RANK) for _ in "kv"]
    out = [torch.empty(1, HEADS, 1, RANK, dtype=case.dtype) for _ in "kv"]
    return Call(kv_ops.project_, (x, bases, None, None, out), {"heads": list(range(HEADS))})


def probed(case: Case) -> Call:
    length = kv.SHAPE[case.size].length
    q = torch.empty(1, QUERY_HEADS, min(PROBES, length // 10), WIDTH, dtype=case.dtype)
    k, positions = torch.empty(1, HEADS, length, WIDTH, dtype=case.dtype), torch.zeros(q.shape[2], dtype=torch.int64)
    return Call(kv_ops.saliency, (q, k, positions, None, None), {"scale": 1.0})


def stepped(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Call:
    params, grads = ([torch.empty(shape, dtype=dtype) for shape in shapes] for _ in "pg")
    states = [[torch.empty(shape) for shape in shapes] for _ in "mv"]
    counts, lr = [torch.empty(()) for _ in shapes], torch.tensor(0.1)
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    return Call(OPS[layers.UPDATE], (params, grads, *states, counts, lr), options)


def updated(case: Case) -> list[Call]:
    """Vectors of all layers, then singular values."""
    ranks = [(round(layers.RANK * min(layer)), layer) for layer in layers.MODEL]
    vectors = [(rank, columns) for rank, layer in ranks for columns in layer]
    return [stepped(shapes, case.dtype) for shapes in (vectors, [(min(layer),) for layer in layers.MODEL])]


def on_layer(case: Case) -> Call:
    shape = spectral.SHAPE[case.size]
    x, other = (torch.empty(shape.tokens, shape.width, dtype=case.dtype) for _ in "xy")
    if case.op == layers.SCALE:
        return Call(OPS[case.op], (x, other, torch.empty(shape.width, dtype=case.dtype)))
    arguments = (x, other) if case.op == layers.LORENTZ_BACKWARD else (x,)
    arguments = (*arguments, torch.empty((), dtype=case.dtype))
    return Call(OPS[case.op], arguments, {"k": 1.0, "offset": 1.1})
