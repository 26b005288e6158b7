# SPDX-License-Identifier: Apache-2.0
"""What an attention mask says: which tokens are padding, or more than that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import require

_ROWS = 1024  # looked at at a time
_WHOLE = "Pass the attention_mask of the whole conversation, or call reset() before another."


class Read(NamedTuple):
    """What a mask says.

    Attributes:
        padding: which of the new tokens are none, bool (batch, tokens), false for padding; None: all are tokens.
        is_plain: whether the mask is causal but for padding. If it is not, all new tokens are tokens.
        cached: which tokens in the cache are still tokens, bool (batch, before); None: all that were.
    """

    padding: Tensor | None
    is_plain: bool
    cached: Tensor | None = None


CAUSAL = Read(None, True)


def read_mask(
    mask: Tensor,
    before: int,
    shape: tuple[int, int, int],
    held: Tensor | None,
    where: str,
    *,
    final: bool = False,
    sliding_window: int | None = None,
) -> Read:
    """Tells causal masks with padding from others.

    Only a token that no query sees, not even its own, can be padding; and only where all else is causal.

    Args:
        mask: (1 or batch, 1 or query heads, tokens, before + tokens), true where a query sees a token, or what is added
            to the logit, very negative where it sees none.
        before: how many tokens the cache holds.
        shape: (batch, query heads, tokens) of the queries.
        held: bool (batch, before), which of the tokens in the cache are no padding; None: all.
        where: who raises.
        final: whether tokens that it hides, the newest of a sequence, are padding from now on: they were added after
            the end of that sequence. Else a later mask may show them, as one for drafts does.
        sliding_window: number of the newest tokens that a query sees in a causal mask, including its own; None: all.

    Raises:
        ValueError: masks of other shapes or dtypes, or that show padding, which the cache does not hold.
    """
    batch, heads, tokens = shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    fits = fits and mask.shape[2:] == (tokens, before + tokens)
    contract = f"a mask of shape ({batch}, 1, {tokens}, {before + tokens}), tokens in the cache included"
    require(fits, where, contract, tuple(mask.shape), _WHOLE)
    known = mask.dtype == torch.bool or mask.is_floating_point()
    require(known, where, "a bool or floating-point mask", mask.dtype, "Convert it: true shows a token.")
    held = mask.new_ones((1, before), dtype=torch.bool) if held is None else held
    seen = mask.new_zeros((len(mask), before + tokens), dtype=torch.bool)
    for _, shown, _ in _pieces(mask):
        seen |= shown.any(2).any(1)
    stray = (seen[:, :before] & ~held).any()
    columns = torch.arange(before + tokens, device=mask.device)
    width = before + tokens if sliding_window is None else sliding_window
    hidden = held & ~seen[:, :before] & (columns[:before] > before - width)  # though the first query might see them
    ends = hidden & ~((hidden.cumsum(1) > 0) & held & ~hidden).any(1, keepdim=True)  # nothing is shown after them
    cached = held & ~ends if final else held.expand(len(hidden), -1)
    rows = len(cached)
    want = torch.cat((cached, seen[:, before:].expand(rows, -1)), 1)[:, None, None]
    plain = torch.ones((), dtype=torch.bool, device=mask.device)
    for begin, shown, binary in _pieces(mask):
        last = (torch.arange(begin, begin + shown.shape[2], device=mask.device) + before)[:, None]
        causal = (columns <= last) & (columns > last - width)
        plain = plain & binary & (shown == (causal & want)).all()
    flags = torch.stack((stray, plain, seen[:, before:].all(), (cached == held).all()))
    is_stray, is_plain, whole, same = flags.tolist()
    contract = "a mask that hides padding, which the cache does not hold"
    require(not is_stray, where, contract, "one that shows some", _WHOLE)
    if not is_plain:
        return Read(None, False)
    padding = None if whole else seen[:, before:].expand(batch, -1)
    return Read(padding, True, None if same else cached.expand(batch, -1))


def _pieces(mask: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A mask piece by piece: the first query, bool (batch, heads, queries, tokens) what is shown, and whether that is
    all that it says."""
    for begin in range(0, mask.shape[2], _ROWS):
        piece = mask[:, :, begin : begin + _ROWS]
        if mask.dtype == torch.bool:
            yield begin, piece, torch.ones((), dtype=torch.bool, device=mask.device)
        else:
            shown = ~(piece <= torch.finfo(mask.dtype).min / 2)  # a NaN hides nothing
            yield begin, shown, (~shown | (piece == 0)).all()
