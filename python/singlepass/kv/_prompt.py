# SPDX-License-Identifier: Apache-2.0
"""What happens to uncompressed tokens: attention by the vendor's kernels, its masks, and rotation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_QUERIES = 256  # at a time, where logits are held


def behind(
    cached: tuple[Tensor, Tensor], held: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of cached tokens and of new ones behind them, and which are no padding, bool (batch, tokens):
    ``held`` and ``mask`` say that of either; None: there is none."""
    seen = None
    if held is not None:
        now = held.new_ones((len(held), k.shape[2])) if mask is None else mask
        seen = torch.cat((held, now), 1)
    return torch.cat((cached[0], k), 2), torch.cat((cached[1], v), 2), seen


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of the last tokens' queries over k and v, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    ``seen`` is bool (batch, tokens), false for padding, or None; where a query sees nothing the result is zeros. A
    query sees the ``sliding_window`` newest tokens up to its own, or all if that is None.
    """
    queries, length = q.shape[2], k.shape[2]
    if sliding_window is not None and length > sliding_window:
        return _sliding_attention(q, k, v, seen, scale, softcap, sinks, sliding_window)
    plain = softcap == 0 and sinks is None
    if plain and seen is None and queries == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def shown(begin: int, end: int) -> Tensor:
        return _shown(begin, end, queries, length, seen, q.device)

    out = _attention_as_shown(q, k, v, shown, scale, softcap, sinks)
    if seen is None:
        return out
    blind = seen.cumsum(1)[:, length - queries :] == 0
    return out.masked_fill(blind[:, None, :, None], 0.0)


def _sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    sliding_window: int,
) -> Tensor:
    """The same a few queries at a time, each time over the keys that these see."""
    parts, before = [], k.shape[2] - q.shape[2]
    for i in range(0, q.shape[2], _QUERIES):
        part = q[:, :, i : i + _QUERIES]
        first, end = max(before + i + 1 - sliding_window, 0), before + i + part.shape[2]
        rows = torch.arange(before + i, end, device=q.device)[:, None]
        columns = torch.arange(first, end, device=q.device)
        mask = ((columns <= rows) & (columns > rows - sliding_window))[None, None]
        if seen is not None:
            mask = mask & seen[:, None, None, first:end]
        out = masked_attention(part, k[:, :, first:end], v[:, :, first:end], mask, scale, softcap, sinks)
        parts.append(out.masked_fill(~mask.any(3, keepdim=True), 0.0))
    return torch.cat(parts, 2) if parts else q.new_zeros((*q.shape[:3], v.shape[3]))


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries over k and v, as a mask (1 or batch, 1 or query heads, queries, tokens) says, which is bool
    or is added to logits."""

    def shown(begin: int, end: int) -> Tensor:
        part = mask[:, :, begin:end]
        if part.dtype in (torch.bool, q.dtype):
            return part
        return part.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)

    return _attention_as_shown(q, k, v, shown, scale, softcap, sinks)


def _attention_as_shown(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shown: Callable[[int, int], Tensor],
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention by masks of the queries from one to another, a few at a time where logits are held."""
    queries = q.shape[2]
    if softcap == 0 and sinks is None:
        mask = shown(0, queries)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    parts = []
    for i in range(0, queries, _QUERIES):
        mask = shown(i, min(i + _QUERIES, queries))
        parts.append(explicit_attention(q[:, :, i : i + _QUERIES], k, v, mask, scale, softcap, sinks))
    return torch.cat(parts, 2) if parts else q.new_zeros((*q.shape[:3], v.shape[3]))


def _shown(begin: int, end: int, queries: int, length: int, seen: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens queries ``begin`` to ``end`` of the last ``queries`` see, bool (1 or batch, 1, queries, tokens)."""
    rows = torch.arange(begin, end, device=device) + (length - queries)
    shown = (torch.arange(length, device=device) <= rows[:, None])[None, None]
    return shown if seen is None else shown & seen[:, None, None]


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shown: Tensor | None,
    scale: float | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention that holds its logits, with what scaled_dot_product_attention lacks.

    ``shown`` (1 or batch, 1 or query heads, queries, tokens) is bool, or is added to logits; ``sinks`` are
    (query heads,), a logit of nothing for each head.
    """
    heads, length = k.shape[1:3]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = scale * (q.unflatten(1, (heads, -1)) @ k[:, :, None].mT).float()
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if shown is not None:
        shown = shown[:, :, None] if shown.shape[1] == 1 else shown.unflatten(1, (heads, -1))
        lowest = torch.finfo(logits.dtype).min  # unlike -inf, gives no NaN where nothing is shown
        is_bool = shown.dtype == torch.bool
        logits = logits.masked_fill(~shown, lowest) if is_bool else (logits + shown).clamp(min=lowest)
    if sinks is not None:
        column = sinks.to(logits.dtype).reshape(1, heads, -1, 1, 1).expand(len(q), -1, -1, q.shape[2], 1)
        logits = torch.cat((logits, column), -1)
    weights = F.dropout(logits.softmax(-1)[..., :length].to(v.dtype), dropout)
    return (weights @ v[:, :, None]).flatten(1, 2)


def rotate(x: Tensor) -> Tensor:
    """x (..., channels) times an orthonormal Hadamard matrix, which is its own inverse; where channels are no power of
    two, blocks of the largest that divides them are rotated. Sums and differences alone: a token's bits depend on no
    other token, as those of a product of matrices may."""
    head_dim = x.shape[-1]
    size = head_dim & -head_dim
    y, half = x.to(torch.promote_types(x.dtype, torch.float32)), 1
    while half < size:
        low, high = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y, half = torch.stack((low + high, low - high), -2).flatten(-3), 2 * half
    return (y * size**-0.5).to(x.dtype)
