# SPDX-License-Identifier: Apache-2.0
"""The parts of a compressed cache, each usable alone: quantise, dequantise, attention on packed codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import require
from .._ops import kv as ops
from ._checks import (
    FLOATS,
    check_bits,
    check_exact,
    check_logits,
    check_needs_no_gradient,
    check_queries,
    check_sinks,
    check_tokens,
    dense,
)

__all__ = ["Quantized", "decode_attention", "dequantize", "quantize"]


@dataclass(frozen=True, repr=False)
class Quantized:
    """Quantised tokens (batch, heads, tokens, channels), the result of :func:`quantize`.

    Attributes:
        codes: packed codes, uint8 (batch, heads, slots, channels * bits / 8).
        scales: scales and minima, float16: (batch, heads, blocks, 2, channels) for axis "channel", else
            (batch, heads, slots, 2, groups).
        channels: factors that channels were divided by, float16 (batch, heads, blocks, channels), or None.
        starts: first slot of each block, and the end, int32 (blocks + 1,).
        counts: number of tokens in each block of each head, int32 (batch, heads, blocks).
        bits: 2, 4 or 8.
        axis: "channel" or "token": scales per channel and block, or per token.

    Example:
        >>> import torch
        >>> from singlepass.kv import quantize
        >>> quantize(torch.randn(1, 2, 64, 32), bits=4)
        Quantized((1, 2, 64, 32), bits=4, axis='channel', blocks=1, nbytes=2320)
    """

    codes: Tensor
    scales: Tensor
    channels: Tensor | None
    starts: Tensor
    counts: Tensor
    bits: int
    axis: str

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.codes.shape[3] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (self.codes, self.scales, self.channels, self.starts, self.counts)
        return sum(part.nbytes for part in parts if part is not None)

    def __repr__(self) -> str:
        shape = (*self.codes.shape[:3], self.head_dim)
        blocks = self.counts.shape[2]
        return f"Quantized({shape}, bits={self.bits}, axis={self.axis!r}, blocks={blocks}, nbytes={self.nbytes})"


def last_dense(x: Tensor) -> Tensor:
    """x, or a copy of it whose channels are neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def quantize_into(x: Tensor, index: Tensor | None, to: Quantized, backend: str | None) -> None:
    """Fills ``to``, views of preallocated tensors, from tokens ``index`` of x."""
    tensors = last_dense(x), index, to.starts, to.counts, to.codes, to.scales, to.channels
    ops.quantize_(*tensors, bits=to.bits, axis=ops.AXES.index(to.axis), backend=backend)


def dequantize_into(q: Quantized, index: Tensor | None, out: Tensor, backend: str | None) -> None:
    """Writes what q holds to places ``index`` of ``out``."""
    tensors = q.codes, q.scales, q.channels, index, q.starts, q.counts, out
    ops.dequantize_(*tensors, bits=q.bits, axis=ops.AXES.index(q.axis), backend=backend)


def empty(like: Tensor, slots: int, blocks: int, bits: int, axis: str, groups: int, separable: bool) -> Quantized:
    """Room for so many slots and blocks; counts are zero."""
    batch, heads, _, head_dim = like.shape
    device = like.device
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}
    shape = (batch, heads, blocks, 2, head_dim) if axis == "channel" else (batch, heads, slots, 2, groups)
    return Quantized(
        torch.empty((batch, heads, slots, head_dim * bits // 8), dtype=torch.uint8, device=device),
        torch.empty(shape, **half),
        torch.empty((batch, heads, blocks, head_dim), **half) if separable else None,
        torch.zeros(blocks + 1, dtype=torch.int32, device=device),
        torch.zeros((batch, heads, blocks), dtype=torch.int32, device=device),
        bits,
        axis,
    )


def quantize(
    x: Tensor,
    bits: int,
    *,
    axis: str = "channel",
    group: int | None = None,
    block: int | None = None,
    channel_separable: bool = False,
    backend: str | None = None,
) -> Quantized:
    """Quantises tokens to ``bits`` bits, uniformly between the extremes of each group, and packs the codes.

    Args:
        x: (batch, heads, tokens, channels); float32, bfloat16, float16 or float64 (eager only), any strides; channels
            a multiple of 16 up to 512. Magnitudes above 65504 are clamped; a NaN or an infinity makes its group NaN.
        bits: 2, 4 or 8.
        axis: "channel", for keys: a scale and a minimum per channel of a block; "token", for values: per token.
        group: for axis "token", how many channels share a scale; None: all.
        block: how many tokens share per-channel parameters; None: all.
        channel_separable: for axis "token", first divide each channel by the square root of its largest magnitude in
            the block.
        backend: "native", "triton" or "eager"; None selects one.

    Returns:
        Quantized: the error of every element is at most half a scale.

    Raises:
        ValueError: invalid shapes, dtypes or options, or a tensor that requires gradients.

    Source: He et al., "ZipCache", arXiv 2405.14256, Algorithm 1.

    Example:
        >>> import torch
        >>> from singlepass.kv import dequantize, quantize
        >>> x = torch.arange(64.0).view(1, 1, 4, 16)
        >>> q = quantize(x, bits=2)
        >>> q.nbytes
        92
        >>> bool((dequantize(q) - x).abs().max() == 0)
        True
    """
    op = "quantize"
    check_tokens(op, "x", x)
    check_needs_no_gradient(op, x=x)
    check_bits(op, "bits", bits)
    require(axis in ops.AXES, op, 'axis "channel" or "token"', repr(axis), "Choose one of them.")
    head_dim, tokens = x.shape[3], x.shape[2]
    by_token = axis == "token"
    plain = group is None and not channel_separable
    remedy = 'Pass axis="token", or leave group and channel_separable out.'
    require(by_token or plain, op, 'axis "token" with group or channel_separable', repr(axis), remedy)
    group = head_dim if group is None else group
    fits = type(group) is int and group > 0 and head_dim % group == 0
    require(fits, op, f"a group that divides {head_dim} channels", repr(group), "Choose another.")
    block = max(tokens, 1) if block is None else block
    fits = type(block) is int and block > 0
    require(fits, op, "a block of at least one token", repr(block), "Leave it out for all tokens.")
    blocks = -(-tokens // block)
    q = empty(x, tokens, blocks, bits, axis, head_dim // group, channel_separable)
    q.starts.copy_(block_starts(tokens, block, x.device))
    q.counts.copy_(q.starts.diff())
    quantize_into(x, None, q, backend)
    return q


def block_starts(slots: int, block: int, device: torch.device) -> Tensor:
    """The starts of blocks of that size that cover so many slots, and their end; int32."""
    return torch.arange(0, -(-slots // block) * block + 1, block, dtype=torch.int32, device=device).clamp_(max=slots)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """Restores the tokens that :func:`quantize` packed.

    Args:
        q: the result of :func:`quantize`.
        dtype: of the result.
        backend: "native", "triton" or "eager"; None selects one.

    Returns:
        Tensor: (batch, heads, tokens, channels); zeros in slots without a token.

    Raises:
        ValueError: another type or dtype.

    Example:
        >>> import torch
        >>> from singlepass.kv import dequantize, quantize
        >>> x = torch.randn(1, 2, 64, 32)
        >>> bool((dequantize(quantize(x, bits=8)) - x).abs().max() < 0.05)
        True
    """
    require(isinstance(q, Quantized), "dequantize", "a Quantized", type(q).__name__, "Pass what quantize gave.")
    require(dtype in FLOATS, "dequantize", "a floating-point dtype", dtype, "Convert the result.")
    out = torch.zeros((*q.codes.shape[:3], q.head_dim), dtype=dtype, device=q.codes.device)
    dequantize_into(q, None, out, backend)
    return out


def _check_segment(op: str, keys: Quantized, values: Quantized, window_k: Tensor, window_v: Tensor) -> None:
    for part in (keys, values):
        require(isinstance(part, Quantized), op, "Quantized keys and values", type(part).__name__, "Call quantize.")
    require(values.axis == "token", op, 'values of axis "token"', values.axis, "Quantise them so.")
    require(keys.bits == values.bits, op, f"values of {keys.bits} bits, as keys", values.bits, "Quantise alike.")
    for name, part, window in (("keys", keys, window_k), ("values", values, window_v)):
        shape = (*window.shape[:2], keys.codes.shape[2], window.shape[3])
        got = (*part.codes.shape[:3], part.head_dim)
        require(got == shape, op, f"{name} {shape}, as the window's but for slots", got, "Quantise the same tokens.")
    blocks, found = keys.counts.shape[2], values.counts.shape[2]
    if values.channels is None:  # else factors belong to blocks, which are those of the keys
        return
    require(found == blocks, op, f"values in {blocks} blocks, as keys", found, "Quantise both with the same block.")
    if keys.starts.is_cpu and not torch.compiler.is_compiling():  # to read them elsewhere takes time
        starts, theirs = keys.starts.tolist(), values.starts.tolist()
        require(starts == theirs, op, f"values whose blocks start at {starts}, as keys", theirs, "Quantise both alike.")


def decode_attention(
    q: Tensor,
    segments: Sequence[tuple[Quantized, Quantized]],
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    *,
    first: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens' queries over compressed tokens, computed on their packed codes, and over a window
    of uncompressed tokens.

    C++ and CUDA C++ multiply codes as integers: bfloat16 and float16 queries become integers of 16 bits, which is
    faster than float32 and rounds less than they do themselves. For float32 queries, CUDA takes integers of 31 bits.

    Args:
        q: (batch, query heads, queries, channels); float32, bfloat16 or float16 (eager: float64 too). At most as many
            queries as the window has slots, unless it has none.
        segments: pairs (keys, values) of compressed tokens, which all queries attend to. The two of a pair have the
            same starts and counts, and all keys the same axis. CUDA C++ accepts at most four pairs.
        window_k: (batch, heads, slots, channels), the uncompressed keys; heads divides query heads.
        window_v: (batch, heads, slots, value channels).
        window: int32 (batch, 2), the first slot of the window that holds a token, and the end. The last token is the
            last query's own, and attention in the window is causal. A query whose own token is before the window
            attends to the segments only.
        first: int32 (segments, batch, heads), the first visible slot of each segment; None: all are visible.
        sinks: float32 (query heads,), the logit of an attention sink for each head, or None.
        scale: of q @ k^T; None: channels^-0.5.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
        backend: "native", "triton" or "eager"; None selects one.

    Returns:
        tuple: the output (batch, query heads, queries, value channels) in q's dtype, and the log-sum-exp of the logits,
        float32 (batch, query heads, queries). A query that sees nothing has 0 and -inf.

    Raises:
        ValueError: invalid shapes, dtypes or options, or a tensor that requires gradients.

    Example:
        >>> import torch
        >>> from singlepass.kv import decode_attention, quantize
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> packed = quantize(k[:, :, :99], 4), quantize(v[:, :, :99], 4, axis="token")
        >>> window = torch.tensor([[0, 1]], dtype=torch.int32)  # the newest token is uncompressed
        >>> out, lse = decode_attention(q, [packed], k[:, :, 99:], v[:, :, 99:], window)
        >>> out.shape
        torch.Size([1, 8, 1, 64])
    """
    op = "decode_attention"
    check_tokens(op, "window_k", window_k)
    check_tokens(op, "window_v", window_v)
    check_queries(op, q, window_k)
    check_needs_no_gradient(op, q=q, window_k=window_k, window_v=window_v)
    check_logits(op, scale, softcap)
    batch, heads, slots = window_k.shape[:3]
    fits = slots == 0 or q.shape[2] <= slots
    remedy = "Pass the last ones alone, or a window that holds all their tokens."
    require(fits, op, f"at most {slots} queries, as the window has slots", q.shape[2], remedy)
    fits = window_v.shape[:3] == window_k.shape[:3] and window_v.dtype == window_k.dtype
    contract = f"window_v {tuple(window_k.shape[:3])} of {window_k.dtype}, as window_k"
    require(fits, op, contract, f"{tuple(window_v.shape)} of {window_v.dtype}", "Only channels may differ.")
    check_exact(op, "window", window, torch.int32, (batch, 2), window_k)
    check_exact(op, "first", first, torch.int32, (len(segments), batch, heads), window_k)
    sinks = check_sinks(op, sinks, q)
    pairs = all(isinstance(segment, tuple) and len(segment) == 2 for segment in segments)
    require(pairs, op, "segments as a list of pairs", type(segments).__name__, "Pass [(keys, values), ...].")
    for keys, values in segments:
        _check_segment(op, keys, values, window_k, window_v)
    axes = {keys.axis for keys, _ in segments}
    require(len(axes) <= 1, op, "keys of one axis", sorted(axes), "Quantise them alike.")
    return attend(
        q,
        Segments.of(segments),
        last_dense(window_k),
        last_dense(window_v),
        window.contiguous(),
        first=dense(first),
        sinks=sinks,
        scale=scale,
        softcap=softcap,
        backend=backend,
    )


class Segments(NamedTuple):
    """Compressed tokens as the op takes them.

    Attributes:
        tensors: seven of each segment, see the op.
        bits: of each segment.
        key_axis: the number of the keys' axis.
    """

    tensors: list[Tensor]
    bits: list[int]
    key_axis: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Quantized, Quantized]]) -> Segments:
        """Of keys and values, each pair a segment."""
        tensors: list[Tensor] = []
        for keys, values in pairs:
            channels = values.scales.new_empty(0) if values.channels is None else values.channels
            tensors += (keys.codes, keys.scales, values.codes, values.scales, channels, keys.starts, keys.counts)
        key_axis = ops.AXES.index(pairs[0][0].axis) if pairs else 0
        return cls(tensors, [keys.bits for keys, _ in pairs], key_axis)


NO_SEGMENTS = Segments.of(())


def attend(
    q: Tensor,
    segments: Segments,
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    *,
    first: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What :func:`decode_attention` does once it has checked its arguments, with a window whose channels are
    neighbours."""
    held = segments.tensors, window_k, window_v, window, sinks, first
    return ops.decode(last_dense(q), *held, **_options(q, segments, scale, softcap, backend))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    *,
    first: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attend` of new tokens, which are stored before at the end of what is seen of the window; and a copy of the
    queries."""
    held = segments.tensors, window_k, window_v, window, sinks, first
    options = _options(q, segments, scale, softcap, backend)
    return ops.step_(last_dense(q), last_dense(k), last_dense(v), *held, **options)


def _options(q: Tensor, segments: Segments, scale: float | None, softcap: float, backend: str | None) -> dict[str, Any]:
    return {
        "bits": segments.bits,
        "key_axis": segments.key_axis,
        "scale": float(q.shape[3] ** -0.5 if scale is None else scale),
        "softcap": float(softcap),
        "backend": backend,
    }
