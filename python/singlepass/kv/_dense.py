# SPDX-License-Identifier: Apache-2.0
"""Tokens of one attention layer as they come, uncompressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._errors import message, require
from ._functional import attend
from ._options import without_padding
from ._prompt import causal_attention
from ._store import grown, held_nbytes

_WHERE = "DenseLayer.load_state_dict"
_FOREIGN = "Pass what state_dict() gave."


class DenseLayer:
    """Keys and values, and which of them are padding. Its methods do what those of the same name do in a
    :class:`ZipCacheLayer`, but it trusts that its caller has checked the arguments, and that padding is zero; and more
    tokens can be removed.

    Args:
        scale: of q @ k^T.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
        sliding_window: number of the newest tokens that a query sees, including its own. None: all.
        slack: how many tokens out of the sliding window are held before they are forgotten together.
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
        backend: str | None = None,
    ):
        self.scale, self.softcap, self._backend = scale, softcap, backend
        self._sliding_window, self._slack = sliding_window, slack
        self.length = 0
        self._forgotten = 0  # so many of the oldest tokens are not held
        self._room: tuple[Tensor, Tensor] | None = None  # with room for more tokens
        self._mask: Tensor | None = None  # bool (batch, tokens held), false for padding; None: there is none

    @property
    def window_length(self) -> int:
        """How many tokens can be removed, so that the next one finds all that it sees."""
        return self.length if self._forgotten == 0 else max(self._held - int(self._sliding_window or 0), 0)

    @property
    def nbytes(self) -> int:
        return held_nbytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for t in (*(self._room or ()), self._mask) if t is not None]

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
        if self._room is None:
            self._room = k[:, :, :0].clone(), v[:, :, :0].clone()

    def store(self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        unseen = 0 if self._sliding_window is None else max(k.shape[2] - self._sliding_window, 0)
        self.append(k[:, :, unseen:], v[:, :, unseen:], None if mask is None else mask[:, unseen:], skipped=unseen)

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None, *, skipped: int = 0) -> None:
        """``skipped``: so many tokens come before these that no later query sees, nor any token held."""
        self.begin(k, v)
        if skipped:
            self.length += skipped
            self._forget(self.length)
        keys, values = self.reserve(k.shape[2])
        keys.copy_(k)
        values.copy_(v)
        self.take(k.shape[2], mask)

    def reserve(self, tokens: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.make_room(0)
        assert self._room is not None
        begin, end = self._held, self._held + tokens
        keys, values = (grown(held, 2, begin, end) for held in self._room)
        self._room = keys, values
        return keys[:, :, begin:end], values[:, :, begin:end]

    def take(self, tokens: int, mask: Tensor | None = None) -> None:
        if mask is not None and self._mask is None:
            self._mask = mask.new_ones((len(mask), self._held))
        if self._mask is not None:
            more = (0, tokens)
            self._mask = F.pad(self._mask, more, value=True) if mask is None else torch.cat((self._mask, mask), 1)
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
        self._forgotten = tokens

    def attend(self, q: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        (k, v), mask, queries = self._tokens, self._mask, q.shape[2]
        hidden = self._unseen - self._forgotten  # by the newest query
        if queries > 1 and hidden > 0:
            return causal_attention(q, k, v, mask, self.scale, self.softcap, sinks, self._sliding_window)
        if hidden > 0:
            k, v, mask = k[:, :, hidden:], v[:, :, hidden:], None if mask is None else mask[:, hidden:]
        plain = self.softcap == 0 and sinks is None and k.shape[3] == v.shape[3]
        if queries == 1 and plain:  # the query heads of a head as queries of one
            rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
            shown = None if mask is None else mask[:, None, None]
            out = F.scaled_dot_product_attention(rows, k, v, attn_mask=shown, scale=self.scale)
            out = out if shown is None else out.masked_fill(~shown.any(3, keepdim=True), 0.0)
            return out.flatten(1, 2)[:, :, None]
        ends = None if plain else _ends(k, mask, queries)
        if ends is None:
            return causal_attention(q, k, v, mask, self.scale, self.softcap, sinks)
        options: dict[str, Any] = {"first": None, "sinks": sinks, "scale": self.scale, "softcap": self.softcap}
        return attend(q, [], k, v, ends, backend=self._backend, **options)[0]

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
        mask[:, : self._unseen] = True  # what left the sliding window is forgotten in its own time
        self._mask = self._mask_held() & mask[:, self._forgotten :]

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._room is not None:
            self._room = function(self._room[0]), function(self._room[1])
        self._mask = None if self._mask is None else function(self._mask)

    def select_sequences(self, index: Tensor) -> None:
        self._map_batch(lambda t: t.index_select(0, index.to(t.device)))

    def repeat_sequences(self, times: int) -> None:
        self._map_batch(lambda t: t.repeat_interleave(times, 0))

    def drop_newest(self, tokens: int) -> None:
        self.length -= tokens
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
            self._room, self._mask, self._forgotten, self.length = None, None, 0, 0
            return
        fits = isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == v.dim() == 4 and k.dtype == v.dtype
        require(fits and k.shape[:3] == v.shape[:3], _WHERE, "keys and values of as many tokens", "others", _FOREIGN)
        fits = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == k.shape[:3:2])
        require(fits, _WHERE, "a bool mask of these tokens, or None", "another", _FOREIGN)
        least = k.shape[2] + 1 if self._sliding_window is None else self._sliding_window  # held where some are not
        fits = type(forgotten) is int and (forgotten == 0 or (forgotten > 0 and k.shape[2] >= least))
        require(fits, _WHERE, "a number of forgotten tokens", forgotten, _FOREIGN)
        self._room, self._forgotten, self.length = (k.clone(), v.clone()), forgotten, forgotten + k.shape[2]
        self._mask = None if mask is None else mask.clone()


def _ends(k: Tensor, mask: Tensor | None, queries: int) -> Tensor | None:
    """Where the tokens of each sequence begin and end, int32 (batch, 2); None where there is padding between them, or
    after them though there are several queries."""
    length = k.shape[2]
    if mask is None:
        ends = torch.full((len(k), 2), length, dtype=torch.int32, device=k.device)
        ends.select(1, 0).zero_()
        return ends
    places = torch.arange(length, device=k.device)
    begin = torch.where(mask, places, length).amin(1)
    end = torch.where(mask, places + 1, 0).amax(1)
    whole = (mask.sum(1) == end - begin) & ((end == length) | (queries == 1))
    return torch.stack((begin, end), 1).int() if bool(whole.all()) else None
