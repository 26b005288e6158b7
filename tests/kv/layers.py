# SPDX-License-Identifier: Apache-2.0
"""Layers with tokens in them, and what their attention should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from singlepass.kv import ZipCacheLayer

from ..simt.bounded import Bounded
from ..tolerances import assert_same_bits
from .inputs import Attention, check_bounds, generator


def drawn(
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    width: int = 32,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of so many tokens."""
    gen = generator(seed)
    shapes = ((heads * group, width), (heads, width), (heads, value_width or width))
    q, k, v = (torch.randn(batch, h, length, d, generator=gen).to(dtype) for h, d in shapes)
    return q, k, v


def part(tensors: tuple[Tensor, ...], begin: int, end: int) -> tuple[Tensor, ...]:
    return tuple(t[:, :, begin:end] for t in tensors)


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, oldest: int = 0, mask: Tensor | None = None
) -> np.ndarray:
    """Causal attention of the last tokens' queries, over tokens from the oldest on, of which ``mask`` (batch, tokens)
    shows some, in float64."""
    (q, k, v), (queries, length) = (t.double() for t in (q, k, v)), (q.shape[2], k.shape[2])
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logits = (q @ k.mT) * (q.shape[3] ** -0.5 if scale is None else scale)
    tokens = torch.arange(length)
    shown = (tokens <= torch.arange(length - queries, length)[:, None]) & (tokens >= oldest)
    if mask is not None:
        shown = shown & mask[:, None, None]
    return (logits.masked_fill(~shown, -torch.inf).softmax(-1) @ v).numpy()


def check_attend(layer: ZipCacheLayer, q: Tensor, *, sliding_window: int | None = None, label: str = "") -> Tensor:
    """Attention over what :meth:`dequantize` gives. The kernel's bound holds for the codes' own tokens; that those were
    rounded to float32 once adds two roundings to the dozens of a logit and of a value."""
    out = layer.attend(q, sliding_window=sliding_window)
    assert layer._held is not None
    oldest = 0 if sliding_window is None else max(layer.length - sliding_window, 0)
    segments = [(s.keys, s.values) for s in layer._held.compressed.segments.values()]
    lowest = max(oldest - (layer.length - layer.window_length), 0)
    counts = layer.token_mask()[:, layer.length - layer.window_length :].sum(1)
    window = torch.stack((torch.full_like(counts, lowest), counts), 1).int()
    first = layer._held.compressed.first_slots(oldest)
    case = Attention(q, segments, *layer._held.window.room, window, first, scale=layer.scale)
    error = case.truth()[0].error
    value = dense(q, *layer.dequantize(), layer.scale, oldest, layer.token_mask())
    check_bounds(out, Bounded(value, 1.1 * error), label or f"{layer.length} tokens")
    return out


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Nested data of the same bits."""
    assert type(a) is type(b), f"{path}: {type(a)}, {type(b)}"
    if isinstance(a, Tensor):
        assert_same_bits(a, b, path)
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{i}")
    else:
        assert a == b, path


def kinds(layer: ZipCacheLayer) -> Tensor:
    """What each compressed token is."""
    return layer._held.compressed.kinds


def stream(layer: ZipCacheLayer, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Token by token, each attended to."""
    outs = []
    for i in range(k.shape[2]):
        layer.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        outs.append(layer.attend(q[:, :, i : i + 1]))
    return outs
