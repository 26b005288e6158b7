# SPDX-License-Identifier: Apache-2.0
"""Tokens of one attention layer as they come, uncompressed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._errors import message, require
from .._ops.kv import decode
from ._functional import NO_SEGMENTS, attend
from ._options import alike, without_padding
from ._prompt import causal_attention
from ._segment import GROWS, grown, held_nbytes
from ._steps import Planned, keep_in_place, write_behind

logger = logging.getLogger("singlepass")

_PLANNED = "MatryoshkaLayer.planned"
_WHERE = "DenseLayer.load_state_dict"
_FOREIGN = "Pass what state_dict() gave."


@dataclass
class Ends:
    """Where the tokens of each sequence begin and end.

    Attributes:
        held: among so many tokens held.
        whole: whether there is no padding between them.
        level: whether none is behind them either.
    """

    held: int
    whole: bool
    level: bool


class DenseLayer(Planned):
    """Keys and values, and which of them are padding. Its methods do what those of the same name do in a
    :class:`ZipCacheLayer`, but it trusts that its caller has checked the arguments, and that padding is zero; and more
    tokens can be removed.

    Args:
        scale: of q @ k^T.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
        sliding_window: number of the newest tokens that a query sees, including its own. None: all.
        slack: how many tokens out of the sliding window are held before they are forgotten together.
        max_tokens: room for so many is made with the first ones, and steps can be planned. None: it grows.
        backend: of the attention that PyTorch does not have.

    Attributes:
        length: number of tokens, those forgotten included.
    """

    mixed = False  # all tokens are kept alike, so that no queries are needed

    def __init__(
        self,
        scale: float,
        softcap: float = 0.0,
        sliding_window: int | None = None,
        slack: int = 0,
        max_tokens: int | None = None,
        backend: str | None = None,
    ):
        self.scale, self.softcap, self._backend = scale, softcap, backend
        self._sliding_window, self._slack, self._max_tokens = sliding_window, slack, max_tokens
        self._room: tuple[Tensor, Tensor] | None = None  # with room for more tokens
        self._spare: tuple[Tensor, Tensor] | None = None  # the room of what was removed
        self._grew = False
        self._bounds: Tensor | None = None  # what ``_ends`` are, int32 (batch, 2), once they are needed
        self.reset()

    def reset(self) -> None:
        """Removes all tokens. Room for ``max_tokens`` is kept."""
        if self._max_tokens is None:
            self._bounds = None
        elif self._room is not None:
            self._spare = self._room
        self.length = 0
        self._forgotten = 0  # so many of the oldest tokens are not held
        self._room = None
        self._mask: Tensor | None = None  # bool (batch, tokens held), false for padding; None: there is none
        self._ends: Ends | None = None  # once they are needed, as long as they are known

    @property
    def window_length(self) -> int:
        """How many tokens can be removed, so that the next one finds all that it sees."""
        return self.length if self._forgotten == 0 else max(self._held - int(self._sliding_window or 0), 0)

    @property
    def nbytes(self) -> int:
        return held_nbytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for t in (*(self._room or self._spare or ()), self._mask, self._bounds) if t is not None]

    @property
    def holds_padding(self) -> bool:
        return self._mask is not None and not bool(self._mask.all())

    @property
    def _held(self) -> int:
        return self.length - self._forgotten

    @property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Those held."""
        if self._room is None:
            raise ValueError(message("DenseLayer", "cached tokens", "an empty cache", "Call append or store."))
        k, v = self._room
        return k[:, :, : self._held], v[:, :, : self._held]

    @property
    def _unseen(self) -> int:
        """How many of the oldest tokens no later query sees."""
        return 0 if self._sliding_window is None else max(self.length - self._sliding_window, 0)

    def begin(self, k: Tensor, v: Tensor) -> None:
        """Makes it a cache of tokens like these, if it knows of none yet."""
        if self._room is not None:
            return
        spare, self._spare = self._spare, None
        if spare is not None and all(map(alike, (k, v), spare)):
            self._room = spare
        else:
            first, second = (x.new_zeros((*x.shape[:2], self._max_tokens or 0, x.shape[3])) for x in (k, v))
            bounds = k.new_zeros((len(k) if self._max_tokens else 0, 2), dtype=torch.int32)
            self._room, self._bounds = (first, second), bounds
            self._fixed = False

    def store(self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        unseen = 0 if self._sliding_window is None else max(k.shape[2] - self._sliding_window, 0)
        self.append(k[:, :, unseen:], v[:, :, unseen:], None if mask is None else mask[:, unseen:], skipped=unseen)

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None, *, skipped: int = 0) -> None:
        """``skipped``: so many tokens come before these that no later query sees, nor any token held."""
        if self._planned:
            room, bounds = self._whole()
            write_behind(room, bounds, k, v)
            return
        self.begin(k, v)
        if skipped:
            self.length += skipped
            self._forget(self.length)
        for place, x in zip(self.reserve(k.shape[2]) or (), (k, v), strict=True):
            place.copy_(x)
        self.take(k.shape[2], mask)

    def reserve(self, tokens: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        if self._planned:
            return None
        self.make_room(0)
        assert self._room is not None
        keys, values = self._room
        begin = self._held
        end = begin + tokens
        if end > keys.shape[2]:
            if self._max_tokens is not None and not self._grew:
                self._grew = True
                logger.warning(GROWS, "MatryoshkaLayer", self._max_tokens)
            self._room = keys, values = grown(keys, 2, begin, end), grown(values, 2, begin, end)
        return keys.narrow(2, begin, tokens), values.narrow(2, begin, tokens)

    def take(self, tokens: int, mask: Tensor | None = None) -> None:
        if mask is not None and self._mask is None:
            self._mask = mask.new_ones((len(mask), self._held))
        if self._mask is not None:
            more = (0, tokens)
            self._mask = F.pad(self._mask, more, value=True) if mask is None else torch.cat((self._mask, mask), 1)
        if mask is not None or (self._ends is not None and not self._ends.level):
            self._ends = None
        self.length += tokens

    def make_room(self, tokens: int) -> None:
        """Makes sure that the next tokens can be removed again, up to ``slack`` of them."""
        if self._unseen > self._forgotten and self._unseen + tokens - self._forgotten > self._slack:
            self._forget(self._unseen)

    def _forget(self, tokens: int) -> None:
        """Frees the oldest tokens, so many of all."""
        k, v = self._tokens
        gone = min(tokens - self._forgotten, k.shape[2])
        self._room = k[:, :, gone:].clone(), v[:, :, gone:].clone()
        self._mask = None if self._mask is None else self._mask[:, gone:]
        self._forgotten, self._ends = tokens, None

    def _find_ends(self) -> Ends:
        """Where tokens begin and end, which is also written to ``_bounds``. Values are read where that is not known and
        there is a mask; what comes later moves the ends."""
        assert self._room is not None
        k, held, known, mask = self._room[0], self._held, self._ends, self._mask
        batch = k.shape[0]
        if self._bounds is None or self._bounds.shape[0] != batch:
            self._bounds, known = k.new_zeros((batch, 2), dtype=torch.int32), None
        if known is not None:
            if known.held != held:
                self._bounds.select(1, 1).add_(held - known.held)
                known.held = held
            return known
        if mask is None or held == 0:
            self._bounds.select(1, 0).zero_()
            self._bounds.select(1, 1).fill_(held)
            self._ends = Ends(held, whole=True, level=True)
            return self._ends
        places = torch.arange(held, device=k.device)
        begin = torch.where(mask, places, held).amin(1)
        end = torch.where(mask, places + 1, 0).amax(1)
        self._bounds.copy_(torch.stack((begin, end), 1))
        whole, level = torch.stack(((mask.sum(1) == end - begin).all(), (end == held).all())).tolist()
        self._ends = Ends(held, whole, level)
        return self._ends

    def _plan(self, tokens: int) -> None:
        ends = self._find_ends()
        remedy = "Leave the step unplanned."
        require(ends.whole and ends.level, _PLANNED, "sequences without padding after their tokens", "some", remedy)
        self.take(tokens)
        ends.held = self._held  # the step itself moves the ends

    def _unplan(self, tokens: int) -> None:
        self.drop_newest(tokens)

    def _fixed_tensors(self) -> list[Tensor]:
        room, bounds = self._whole()
        return [*room, bounds]

    def _counts(self) -> tuple[Tensor, int]:
        return self._whole()[1], self._held

    def _whole(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What planned steps use: the whole room, and where tokens begin and end in it."""
        assert self._room is not None
        assert self._bounds is not None
        return self._room, self._bounds

    def attend_checked(self, q: Tensor, *, sinks: Tensor | None = None, own: bool = False) -> Tensor:
        options: dict[str, Any] = {"first": None, "sinks": sinks, "scale": self.scale, "softcap": self.softcap}
        options["backend"] = self._backend
        if self._planned:
            room, bounds = self._whole()
            return attend(q, NO_SEGMENTS, *room, bounds, **options)[0]
        (k, v), mask, queries = self._tokens, self._mask, q.shape[2]
        hidden = max(self._unseen - self._forgotten, 0)  # by the newest query
        if queries > 1 and hidden > 0:
            return causal_attention(q, k, v, mask, self.scale, self.softcap, sinks, self._sliding_window)
        plain = self.softcap == 0 and sinks is None and k.shape[3] == v.shape[3]
        ends = self._find_ends() if not plain or (queries == 1 and self._is_faster_than_torch(q, k)) else None
        if ends is not None and ends.whole and (queries == 1 or ends.level):
            assert self._bounds is not None
            bounds = self._bounds
            if hidden > 0:
                bounds = bounds.clone()
                bounds.select(1, 0).clamp_(min=hidden)
            return attend(q, NO_SEGMENTS, k, v, bounds, **options)[0]
        k, v, mask = k[:, :, hidden:], v[:, :, hidden:], None if mask is None else mask[:, hidden:]
        if queries != 1 or not plain:
            return causal_attention(q, k, v, mask, self.scale, self.softcap, sinks)
        rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # the query heads of a head as queries of one
        shown = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=shown, scale=self.scale)
        out = out if shown is None else out.masked_fill(~shown.any(3, keepdim=True), 0.0)
        return out.flatten(1, 2)[:, :, None]

    def _is_faster_than_torch(self, q: Tensor, k: Tensor) -> bool:
        """Whether the op reads plain tokens faster than PyTorch's attention does: by the loops for CPUs."""
        return k.device.type == "cpu" and decode.choose("cpu", {q.dtype, k.dtype}, self._backend) == "native"

    def dequantize(self) -> tuple[Tensor, Tensor]:
        k, v = (x.clone() for x in without_padding(*self._tokens, self._mask))
        for x in (k, v):
            x[:, :, : self._unseen - self._forgotten] = 0.0
        return F.pad(k, (0, 0, self._forgotten, 0)), F.pad(v, (0, 0, self._forgotten, 0))

    def token_mask(self) -> Tensor:
        mask = F.pad(self._mask_held(), (self._forgotten, 0), value=False)
        mask[:, : self._unseen] = False
        return mask

    def _mask_held(self) -> Tensor:
        k, _ = self._tokens
        whole = torch.ones(len(k), self._held, dtype=torch.bool, device=k.device)
        return whole if self._mask is None else self._mask.clone()

    def hide(self, mask: Tensor) -> None:
        mask = mask.clone()
        # What left the sliding window is forgotten in its own time, unless its sequence ended before the window.
        mask[:, : self._unseen] |= mask[:, self._unseen :].any(1, keepdim=True)
        self._mask, self._ends = self._mask_held() & mask[:, self._forgotten :], None

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._room is not None:
            keys, values = map(function, self._room)
            if self._max_tokens is not None:
                keys, values = map(keep_in_place, self._room, (keys, values))
            self._room = keys, values
        self._mask, self._ends = None if self._mask is None else function(self._mask), None

    def select_sequences(self, index: Tensor) -> None:
        self._map_batch(lambda t: t.index_select(0, index.to(t.device)))

    def repeat_sequences(self, times: int) -> None:
        self._map_batch(lambda t: t.repeat_interleave(times, 0))

    def drop_newest(self, tokens: int) -> None:
        self.length -= tokens
        self._ends = None
        self._mask = None if self._mask is None else self._mask[:, : self._held]

    def state_dict(self) -> dict[str, Any]:
        k, v = (None, None) if self._room is None else (t.clone() for t in self._tokens)
        mask = None if self._mask is None else self._mask.clone()
        return {"k": k, "v": v, "mask": mask, "forgotten": self._forgotten}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        fits = isinstance(saved, dict) and set(saved) == {"k", "v", "mask", "forgotten"}
        require(fits, _WHERE, "a saved layer", type(saved).__name__, _FOREIGN)
        k, v, mask, forgotten = saved["k"], saved["v"], saved["mask"], saved["forgotten"]
        if k is None:
            require(v is None and mask is None, _WHERE, "nothing without keys", "something", _FOREIGN)
            self.reset()
            return
        fits = isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == v.dim() == 4 and k.dtype == v.dtype
        fits = fits and k.device == v.device
        require(fits and k.shape[:3] == v.shape[:3], _WHERE, "keys and values of as many tokens", "others", _FOREIGN)
        fits = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == k.shape[:3:2])
        require(fits, _WHERE, "a bool mask of these tokens, or None", "another", _FOREIGN)
        least = k.shape[2] + 1 if self._sliding_window is None else self._sliding_window  # held where some are not
        fits = type(forgotten) is int and (forgotten == 0 or (forgotten > 0 and k.shape[2] >= least))
        require(fits, _WHERE, "a number of forgotten tokens", forgotten, _FOREIGN)
        self.reset()
        self.begin(k, v)
        self._forgotten = self.length = forgotten
        self.append(k, v)
        self._mask = None if mask is None else mask.clone()
