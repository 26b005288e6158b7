# SPDX-License-Identifier: Apache-2.0
"""What happens to uncompressed tokens: attention by the vendor's kernels, its masks, and rotation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._errors import require

_QUERIES = 256  # at a time, where logits are held
_ROWS = 1024  # of a mask, looked at at a time


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last tokens' queries over k and v, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    ``seen`` is bool (batch, tokens), false for padding, or None; padding's own results are zeros.
    """
    queries, length = q.shape[2], k.shape[2]
    if softcap > 0 or sinks is not None:
        parts = []
        for i in range(0, queries, _QUERIES):
            shown = _shown(i, min(i + _QUERIES, queries), queries, length, seen, q.device)
            parts.append(explicit_attention(q[:, :, i : i + _QUERIES], k, v, shown, scale, softcap, sinks))
        out = torch.cat(parts, 2) if parts else q.new_zeros((*q.shape[:3], v.shape[3]))
    elif seen is None and queries == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        shown = _shown(0, queries, queries, length, seen, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, scale=scale, enable_gqa=True)
    return out if seen is None else out.masked_fill(~seen[:, None, length - queries :, None], 0.0)


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
        logits = logits.masked_fill(~shown, lowest) if shown.dtype == torch.bool else logits + shown
    if sinks is not None:
        column = sinks.to(logits.dtype).reshape(1, heads, -1, 1, 1).expand(len(q), -1, -1, q.shape[2], 1)
        logits = torch.cat((logits, column), -1)
    weights = F.dropout(logits.softmax(-1)[..., :length].to(v.dtype), dropout)
    return (weights @ v[:, :, None]).flatten(1, 2)


def padding_in(mask: Tensor, before: int, batch: int, tokens: int, held: Tensor | None, where: str) -> Tensor | None:
    """Which of the new tokens are none by a mask (1 or batch, 1, tokens, before + tokens), which is true, or 0 and not
    very negative, where a query sees a token: bool (batch, tokens), false for padding; None if all are tokens.

    ``held`` (batch, before), bool, are the tokens in the cache, or None. ``where`` is who raises.

    Raises:
        ValueError: masks that are anything but causal ones with padding, or hide what the cache holds.
    """
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, tokens, before + tokens)
    contract = f"a mask of shape ({batch}, 1, {tokens}, {before + tokens}), tokens in the cache included"
    remedy = "Choose another attention or another cache for this model."
    require(fits, where, contract, tuple(mask.shape), remedy)
    shown = mask[:, 0]
    plain = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        hidden = shown <= torch.finfo(mask.dtype).min / 2
        plain = (hidden | (shown == 0)).all()
        shown = ~hidden
    seen = shown[:, -1]  # the last query sees all but padding
    columns = torch.arange(before + tokens, device=mask.device)
    for begin in range(before, before + tokens, _ROWS):
        rows = columns[begin : begin + _ROWS]
        same = shown[:, begin - before : begin - before + _ROWS] == ((columns <= rows[:, None]) & seen[:, None])
        plain = plain & (same.all(2) | ~seen[:, rows]).all()  # what padding sees is of no account
    kept = plain if held is None else (seen[:, :before] | ~held).all()
    is_plain, is_kept, whole = torch.stack((plain, kept, seen[:, before:].all())).tolist()
    require(is_plain, where, "a causal mask, but for padding", "another one", remedy)
    remedy = "Pass the attention_mask of the whole conversation, or call reset() before another."
    require(is_kept, where, "a mask that shows all tokens in the cache", "one that hides some", remedy)
    return None if whole else seen[:, before:].expand(batch, -1)


def rotate(x: Tensor) -> Tensor:
    """x (..., channels) times an orthonormal Hadamard matrix, which is its own inverse; where channels are no power of
    two, blocks of the largest that divides them are rotated. Sums and differences alone: a token's bits depend on no
    other token, as those of a product of matrices may."""
    width = x.shape[-1]
    size = width & -width
    y, half = x.to(torch.promote_types(x.dtype, torch.float32)), 1
    while half < size:
        low, high = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y, half = torch.stack((low + high, low - high), -2).flatten(-3), 2 * half
    return (y * size**-0.5).to(x.dtype)
