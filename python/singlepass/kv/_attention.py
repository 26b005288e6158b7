# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest tokens' queries, or of new ones', over what a layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import message, require
from ._checks import check_needs_no_gradient, check_queries, check_sinks
from ._functional import attend, step
from ._modes import lasting
from ._options import check_new_tokens
from ._prompt import rotate
from ._steps import check_step
from ._tokens import LayerTokens

_OP = "ZipCacheLayer"

Pair = tuple[Tensor, Tensor]  # keys and values


class LayerAttention(LayerTokens):
    """The attention of a :class:`ZipCacheLayer`."""

    @lasting
    def attend(self, q: Tensor, *, sliding_window: int | None = None, sinks: Tensor | None = None) -> Tensor:
        """Attention of the newest tokens' queries over all cached tokens, computed on the packed codes.

        Args:
            q: (batch, query heads, queries, channels). The last query belongs to the last token, and the tokens of all
                queries must still be in the window.
            sliding_window: number of the newest tokens that a query sees, including its own; None: that of the layer.
            sinks: float32 (query heads,), the logit of an attention sink for each head, or None.

        Returns:
            Tensor: (batch, query heads, queries, value channels), q's dtype.

        Raises:
            ValueError: invalid shapes or options, or a tensor that requires gradients.
        """
        check_queries(_OP, q, self._tokens().window.room[0])
        check_needs_no_gradient(_OP, q=q)
        sinks = check_sinks(_OP, sinks, q)
        if self._planned:
            check_step(_OP, q.shape[2], self._planned, sliding_window)
        if sliding_window is not None:
            most = "" if self.sliding_window is None else f", at most {self.sliding_window}"
            fits = sliding_window >= 1 and (self.sliding_window is None or sliding_window <= self.sliding_window)
            contract = f"a sliding window of at least 1{most}"
            require(fits, _OP, contract, sliding_window, "Leave it out for that of the layer.")
        return self.attend_checked(q, sliding_window, sinks=sinks)

    @lasting
    def step(self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """:meth:`append` and :meth:`attend` of tokens that come with their queries, in one op.

        Args:
            q: (batch, query heads, tokens, channels).
            k: (batch, heads, tokens, channels). There must be no more tokens than the window takes.
            v: (batch, heads, tokens, value channels).
            sinks: as for :meth:`attend`.

        Returns:
            Tensor: (batch, query heads, tokens, value channels), q's dtype.

        Raises:
            ValueError: as both. The cache is unchanged.
        """
        check_new_tokens(_OP, k, v, None if self._held is None else self._held.window.room, self.codec, self.backend)
        check_queries(_OP, q, k)
        check_needs_no_gradient(_OP, q=q)
        sinks = check_sinks(_OP, sinks, q)
        tokens = k.shape[2]
        if not q.shape[2] == tokens <= self.window:
            contract = f"a query for each token, and at most the {self.window} tokens of a window"
            raise ValueError(message(_OP, contract, f"{q.shape[2]} for {tokens}", "Pass prompts to prefill."))
        if self.codec.rotate:
            q, k, v = rotate(q), rotate(k), rotate(v)
        if self._planned:
            check_step(_OP, tokens, self._planned, None)
            self._tokens().window.advance(tokens)
            out = self._attend_planned(q, sinks, (k, v))
        else:
            window = self._tokens_like(k, v).window
            if window.length + tokens > self.window or not window.takes(None):
                self._flush()
            if tokens > 1 and self.sliding_window is not None:
                window.append(k, v)
                self.length += tokens
                out = self._attend_each(q, self.sliding_window, sinks)
            else:
                window.make_room(tokens)
                out = self._attend(q, self.sliding_window, sinks, -tokens, (k, v))
                self.take(tokens)
        return rotate(out) if self.codec.rotate else out

    def attend_checked(
        self, q: Tensor, sliding_window: int | None = None, *, sinks: Tensor | None = None, own: bool = False
    ) -> Tensor:
        """Attention of the newest tokens' queries, whose shape was checked. ``own``: nobody else writes to them.

        Raises:
            ValueError: several queries of tokens that the window does not hold, or some after padding.
        """
        rotated = self.codec.rotate
        q, own = (rotate(q), True) if rotated else (q, own)
        if self._planned:
            out = self._attend_planned(q, sinks)
            return rotate(out) if rotated else out
        queries, window = q.shape[2], self._tokens().window
        if queries > 1:
            contract = f"at most {window.length} queries, whose tokens the window holds"
            remedy = "Pass longer pieces to prefill, which appends and attends by itself."
            require(queries <= window.length, _OP, contract, queries, remedy)
            remedy = "Pass the tokens to prefill, with a mask."
            require(window.takes(None), _OP, "one query at a time after padding", queries, remedy)
        if sliding_window is None:
            sliding_window = self.sliding_window
        if sliding_window is None or self.length <= sliding_window or queries == 1:
            out = self._attend(q, sliding_window, sinks, own=own)
        else:
            out = self._attend_each(q, sliding_window, sinks)
        return rotate(out) if rotated else out

    def _attend_each(self, q: Tensor, sliding_window: int, sinks: Tensor | None) -> Tensor:
        """The same for each query alone, where a sliding window shows other tokens to each."""
        newer = range(q.shape[2] - 1, -1, -1)
        outs = [self._attend(x, sliding_window, sinks, n) for x, n in zip(q.split(1, 2), newer, strict=True)]
        return torch.cat(outs, 2)

    def _attend_planned(self, q: Tensor, sinks: Tensor | None, new: Pair | None = None) -> Tensor:
        """Attention of the queries of the tokens written last, or of new ones, by the device alone."""
        window = self._tokens().window
        out, lse, q = self._attention(q, window.ends, None, sinks, new)
        if self.mixed:
            window.lay_aside(q, lse)
        return out

    def _attend(
        self,
        q: Tensor,
        sliding_window: int | None,
        sinks: Tensor | None,
        newer: int = 0,
        new: Pair | None = None,
        own: bool = False,
    ) -> Tensor:
        """The same, of queries after whose tokens there are ``newer`` ones, or fewer than none if they are ``new``; of
        one where the sliding window matters. ``own``: nobody else writes to them."""
        self._note_queries(q)
        window, compressed = self._tokens()
        begin, end = self.length - window.length, window.length - newer
        lowest, first = 0, None
        if sliding_window is not None and begin + end > sliding_window:
            oldest = begin + end - sliding_window
            lowest = max(oldest - begin, 0)
            first = compressed.first_slots(oldest)
        out, lse, kept = self._attention(q, window.bounds(lowest, newer), first, sinks, new)
        place = end - q.shape[2]  # -1: right after a prompt, which is compressed already
        sees_all = lowest == 0  # else it tells nothing of the window's first tokens
        if self.mixed and sees_all and 0 <= place < end:
            kept = kept if own or new is not None else q.clone(memory_format=torch.contiguous_format)
            window.probes.add(kept, lse, place)
        return out

    def _attention(
        self, q: Tensor, bounds: Tensor, first: Tensor | None, sinks: Tensor | None, new: Pair | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`decode_attention` gives it, over the tokens of the window within ``bounds``, the last of which may
        be new, and the segments' slots from ``first`` on. And the queries, copied if tokens are new."""
        window, compressed = self._tokens()
        segments = compressed.operands
        if new is not None:
            return step(q, *new, segments, *window.room, bounds, first=first, sinks=sinks, **self._logits)
        return *attend(q, segments, *window.room, bounds, first=first, sinks=sinks, **self._logits), q
