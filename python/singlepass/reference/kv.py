# SPDX-License-Identifier: Apache-2.0
"""The KV cache's ops in plain PyTorch. :mod:`singlepass._ops.kv` says what they compute.

Codes are made in float32, as everywhere. What reads them computes in float32, or in float64 for tensors of float64.

Sources: He et al., "ZipCache", arXiv 2405.14256 (Algorithm 1: channel-separable tokenwise quantisation; eq. 8:
saliency), and its code's CompressUtils (steps and minima in float16); Liu et al., "KIVI", arXiv 2402.02750 (keys by
channels, values by tokens).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._ops import kv as ops

LARGEST = 65504.0  # of float16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes (..., D) in planes of bits: (..., D * bits / 8) bytes."""
    planes = codes.to(torch.uint8).unflatten(-1, (8 // bits, -1))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (planes << shifts[:, None]).sum(-2, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes (..., D) as uint8 of bytes (..., D * bits / 8)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None, :] >> shifts[:, None]) & (2**bits - 1)).flatten(-2)


def half_at_most(x: Tensor) -> Tensor:
    """The largest float16 that is not above x, of which |x| <= 65504 is expected; zeros are positive."""
    nearest = x.half()
    bits = nearest.view(torch.int16)
    below = torch.where(bits > 0, bits - 1, torch.where(nearest == 0, -0x7FFF, bits + 1)).to(torch.int16)
    return torch.where(nearest.float() > x, below.view(torch.float16), nearest) + 0.0


def half_at_least(x: Tensor) -> Tensor:
    return -half_at_most(-x) + 0.0


def _steps(low: Tensor, high: Tensor, finite: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps and minima in float16 that cover [low, high]; NaN where the group is not finite."""
    minimum = half_at_most(low)
    step = half_at_least((high - minimum.float()) / (2**bits - 1))
    nan = torch.tensor(float("nan"), dtype=torch.float16, device=low.device)
    return torch.where(finite, step, nan), torch.where(finite, minimum, nan)


def _codes(y: Tensor, step: Tensor, minimum: Tensor, bits: int) -> Tensor:
    inverse = torch.where(step > 0, 1.0 / step.float(), 0.0)
    codes = ((y - minimum.float()) * inverse).round()
    return torch.nan_to_num(codes, nan=0.0).clamp(0, 2**bits - 1)


def _rows(x: Tensor, index: Tensor | None, begin: int, end: int) -> Tensor:
    if index is None:
        return x[:, :, begin:end]
    return x.gather(2, index[:, :, begin:end, None].long().expand(-1, -1, -1, x.shape[3]))


@ops.quantize_.eager
def quantize_(
    x: Tensor,
    index: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    *,
    bits: int,
    axis: int,
) -> None:
    """Quantises tokens of x into codes, scales and channels, a block at a time."""
    for i, (begin, end) in enumerate(pairwise(starts.tolist())):
        if begin == end:
            continue
        stored = (torch.arange(end - begin, device=x.device) < counts[:, :, i, None])[..., None]
        rows = torch.where(stored, _rows(x, index, begin, end).float(), 0.0)
        finite = rows.isfinite()
        y = rows.clamp(-LARGEST, LARGEST)
        if axis == 0:
            some = counts[:, :, i, None, None] > 0
            low = torch.where(stored, y, torch.inf).amin(2, keepdim=True).where(some, 0.0)
            high = torch.where(stored, y, -torch.inf).amax(2, keepdim=True).where(some, 0.0)
            step, minimum = _steps(low, high, finite.all(2, keepdim=True), bits)
            scales[:, :, i] = torch.cat((step, minimum), 2)
        else:
            if channels is not None:
                largest = torch.where(finite, y.abs(), 0.0).amax(2, keepdim=True)
                c = largest.double().sqrt().float().half()  # ATen's float32 roots are not correctly rounded
                c = torch.where(c == 0, torch.ones_like(c), c)
                channels[:, :, i] = c[:, :, 0]
                y = y * (1.0 / c.float())
            y = y.unflatten(3, (scales.shape[4], -1))
            whole = finite.unflatten(3, (scales.shape[4], -1)).all(4, keepdim=True)
            step, minimum = _steps(y.amin(4, keepdim=True), y.amax(4, keepdim=True), whole, bits)
            scales[:, :, begin:end] = torch.cat((step, minimum), 4).mT
        packed = torch.where(stored, _codes(y, step, minimum, bits).reshape(rows.shape), 0.0)
        codes[:, :, begin:end] = pack(packed, bits)


def _restored(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    bits: int,
    axis: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x^ (B, H, T, D) in the order of slots, and which slots hold a token (B, H, T)."""
    slots = codes.shape[2]
    sizes = starts.diff().long()
    block = torch.repeat_interleave(torch.arange(len(sizes), device=codes.device), sizes, output_size=int(sizes.sum()))
    place = torch.arange(len(block), device=codes.device) - starts[block]
    stored = place < counts[:, :, block]
    n = unpack(codes[:, :, : len(block)], bits).to(dtype)
    if axis == 0:
        parts = scales[:, :, block].to(dtype)
        x = n * parts[..., 0, :] + parts[..., 1, :]
    else:
        parts = scales[:, :, : len(block)].to(dtype)[..., None]
        x = (n.unflatten(3, (scales.shape[4], -1)) * parts[:, :, :, 0] + parts[:, :, :, 1]).flatten(3)
        if channels is not None:
            x = x * channels[:, :, block].to(dtype)
    missing = slots - len(block)
    if missing:
        x, stored = torch.nn.functional.pad(x, (0, 0, 0, missing)), torch.nn.functional.pad(stored, (0, missing))
    return x, stored


@ops.dequantize_.eager
def dequantize_(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    index: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    out: Tensor,
    *,
    bits: int,
    axis: int,
) -> None:
    """Writes what slots hold to their tokens' places in out."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    x, stored = _restored(codes, scales, channels, starts, counts, bits, axis, dtype)
    b, h, slot = stored.nonzero(as_tuple=True)
    token = slot if index is None else index[b, h, slot].long()
    out[b, h, token] = x[b, h, slot].to(out.dtype)


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float, dtype: torch.dtype) -> Tensor:
    """(B, H, queries of the head's group, L) of q (B, Hq, Lq, D), heads of a group one after another."""
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    logits = scale * (grouped @ k.to(dtype).mT)
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


@ops.saliency.eager
def saliency(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    lse: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Column sums of the probes' attention."""
    batch, heads, length = k.shape[:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    tokens = torch.arange(length, device=k.device)
    seen = (tokens <= positions[:, None]).expand(batch, -1, -1)  # (B, P, L)
    if mask is not None:
        seen = seen & mask[:, None] & mask[:, positions, None]
    seen = seen[:, None, None]
    logits = _logits(q, k, scale, softcap, dtype).unflatten(2, (q.shape[1] // heads, -1)).masked_fill(~seen, -torch.inf)
    given = None if lse is None else lse.to(dtype).unflatten(1, (heads, -1))[..., None]
    total = logits.logsumexp(-1, keepdim=True) if given is None else given
    rows = torch.where(seen, (logits - total).exp(), 0.0)
    return rows.sum((2, 3)).float()


@ops.decode.eager
def decode(
    q: Tensor,
    segments: list[Tensor],
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    *,
    bits: list[int],
    key_axis: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over everything restored at once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, queries = window_k.shape[0], window_k.shape[1], q.shape[2]
    keys, values, seen = [window_k.to(dtype)], [window_v.to(dtype)], []
    slots = torch.arange(window_k.shape[2], device=q.device)
    ends = window[:, 1, None] - torch.arange(queries - 1, -1, -1, device=q.device)  # (B, Lq)
    visible = (slots >= window[:, :1])[:, None] & (slots < ends[..., None])  # (B, Lq, W)
    seen.append(visible[:, None].expand(-1, heads, -1, -1))
    for i, b in enumerate(bits):
        key_codes, key_scales, value_codes, value_scales, value_channels, starts, counts = segments[7 * i : 7 * i + 7]
        channels = value_channels if value_channels.numel() else None
        k, stored = _restored(key_codes, key_scales, None, starts, counts, b, key_axis, dtype)
        v, _ = _restored(value_codes, value_scales, channels, starts, counts, b, 1, dtype)
        held = stored
        if first is not None:
            held = held & (torch.arange(k.shape[2], device=q.device) >= first[i, ..., None])
        keys.append(torch.where(held[..., None], k, 0.0))  # what is not seen may be anything
        values.append(torch.where(held[..., None], v, 0.0))
        seen.append(held[:, :, None].expand(-1, -1, queries, -1))
    shown = torch.cat(seen, 3)[:, :, None]
    logits = _logits(q, torch.cat(keys, 2), scale, softcap, dtype).unflatten(2, (q.shape[1] // heads, -1))
    logits = logits.masked_fill(~shown, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, heads, -1, 1, 1).expand(batch, -1, -1, queries, 1)
        lse = torch.cat((logits, sink), -1).logsumexp(-1, keepdim=True)
    else:
        lse = logits.logsumexp(-1, keepdim=True)
    p = torch.where(shown, (logits - lse).exp(), 0.0)
    v = torch.where(seen[0].any(2)[..., None], values[0], 0.0)
    out = p @ torch.cat((v, *values[1:]), 2)[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)[..., 0].float()


@ops.step_.eager
def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Tensor],
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    *,
    bits: list[int],
    key_axis: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stores the new tokens, then attends."""
    slots = window[:, 1:] + torch.arange(-q.shape[2], 0, device=q.device)  # (B, Lq)
    sequences = torch.arange(len(q), device=q.device)[:, None]
    for held, new in ((window_k, k), (window_v, v)):
        held.transpose(1, 2)[sequences, slots] = new.transpose(1, 2)
    options: dict[str, Any] = {"bits": bits, "key_axis": key_axis, "scale": scale, "softcap": softcap}
    return *decode(q, segments, window_k, window_v, window, sinks, first, **options), q.clone(
        memory_format=torch.contiguous_format
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, L, D) with its first channels turned by rotary embeddings, halves against each other."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    swapped = torch.cat((-second, first), -1)
    return torch.cat((turned * cos[:, None].to(x.dtype) + swapped * sin[:, None].to(x.dtype), rest), -1)


@ops.project_.eager
def project_(
    x: list[Tensor],
    bases: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    out: list[Tensor],
    *,
    heads: list[int],
) -> None:
    """A product for each group of heads."""
    groups = len(bases) // len(x)
    for i, tokens in enumerate(x):
        wide = tokens.double() if tokens.dtype == torch.float64 else tokens.float()
        if i == 0 and cos is not None and sin is not None:
            wide = rotated(wide, cos, sin)
        rows = wide.unflatten(1, (len(heads), -1))  # (B, H, n, L, D)
        begin = 0
        for g in range(i * groups, (i + 1) * groups):
            end = begin + len(bases[g])
            own = rows[:, heads[begin:end]] @ bases[g][:, None].to(wide.dtype)
            out[g].copy_(own.flatten(1, 2))
            begin = end
