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
    :class:`ZipCacheLayer`, but it trusts that its caller has checked the arguments, and that padding is zero; and all
    tokens can be removed.

    Attributes:
        length: number of tokens.
        scale: of q @ k^T.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
    """

    mixed = False  # all tokens are kept alike, so that no queries are needed

    def __init__(self, scale: float, softcap: float = 0.0, backend: str | None = None):
        self.scale, self.softcap, self._backend = scale, softcap, backend
        self.length = 0
        self._room: tuple[Tensor, Tensor] | None = None  # with room for more tokens
        self._mask: Tensor | None = None  # bool (batch, length), false for padding; None: there is none

    @property
    def window_length(self) -> int:
        """How many tokens can be removed."""
        return self.length

    @property
    def nbytes(self) -> int:
        return held_nbytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for t in (*(self._room or ()), self._mask) if t is not None]

    @property
    def holds_padding(self) -> bool:
        return self._mask is not None and not bool(self._mask.all())

    @property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        if self._room is None:
            raise ValueError(message("DenseLayer", "cached tokens", "an empty cache", "Call append or store."))
        k, v = self._room
        return k[:, :, : self.length], v[:, :, : self.length]

    def store(self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        self.append(k, v, mask)

    def begin(self, k: Tensor, v: Tensor) -> None:
        """Makes it a cache of tokens like these, if it knows of none yet."""
        if self._room is None:
            self._room = k[:, :, :0].clone(), v[:, :, :0].clone()

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        self.begin(k, v)
        keys, values = self.reserve(k.shape[2])
        keys.copy_(k)
        values.copy_(v)
        self.take(k.shape[2], mask)

    def reserve(self, tokens: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert self._room is not None
        begin, end = self.length, self.length + tokens
        keys, values = (grown(held, 2, begin, end) for held in self._room)
        self._room = keys, values
        return keys[:, :, begin:end], values[:, :, begin:end]

    def take(self, tokens: int, mask: Tensor | None = None) -> None:
        if mask is not None and self._mask is None:
            self._mask = mask.new_ones((len(mask), self.length))
        if self._mask is not None:
            more = (0, tokens)
            self._mask = F.pad(self._mask, more, value=True) if mask is None else torch.cat((self._mask, mask), 1)
        self.length += tokens

    def make_room(self, tokens: int) -> None:
        """There always is."""

    def attend(self, q: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        (k, v), queries = self._tokens, q.shape[2]
        plain = self.softcap == 0 and sinks is None and k.shape[3] == v.shape[3]
        if queries == 1 and plain:  # the query heads of a head as queries of one
            mask = None if self._mask is None else self._mask[:, None, None]
            rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
            out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=self.scale)
            out = out if mask is None else out.masked_fill(~mask.any(3, keepdim=True), 0.0)
            return out.flatten(1, 2)[:, :, None]
        ends = None if plain else self._ends(k, queries)
        if ends is None:
            return causal_attention(q, k, v, self._mask, self.scale, self.softcap, sinks)
        options: dict[str, Any] = {"first": None, "sinks": sinks, "scale": self.scale, "softcap": self.softcap}
        return attend(q, [], k, v, ends, backend=self._backend, **options)[0]

    def _ends(self, k: Tensor, queries: int) -> Tensor | None:
        """Where the tokens of each sequence begin and end, int32 (batch, 2); None where there is padding between them,
        or after them though there are several queries."""
        if self._mask is None:
            return torch.tensor([[0, self.length]], dtype=torch.int32, device=k.device).expand(len(k), 2).contiguous()
        places = torch.arange(self.length, device=k.device)
        begin = torch.where(self._mask, places, self.length).amin(1)
        end = torch.where(self._mask, places + 1, 0).amax(1)
        whole = (self._mask.sum(1) == end - begin) & ((end == self.length) | (queries == 1))
        return torch.stack((begin, end), 1).int() if bool(whole.all()) else None

    def dequantize(self) -> tuple[Tensor, Tensor]:
        k, v = without_padding(*self._tokens, self._mask)
        return k.clone(), v.clone()

    def token_mask(self) -> Tensor:
        k, _ = self._tokens
        whole = torch.ones(len(k), self.length, dtype=torch.bool, device=k.device)
        return whole if self._mask is None else self._mask.clone()

    def hide(self, mask: Tensor) -> None:
        self._mask = self.token_mask() & mask

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
        self._mask = None if self._mask is None else self._mask[:, : self.length]

    def state_dict(self) -> dict[str, Any]:
        k, v = (None, None) if self._room is None else (t.clone() for t in self._tokens)
        return {"k": k, "v": v, "mask": None if self._mask is None else self._mask.clone()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        fits = isinstance(saved, dict) and set(saved) == {"k", "v", "mask"}
        require(fits, _WHERE, "a saved layer", type(saved).__name__, _FOREIGN)
        k, v, mask = saved["k"], saved["v"], saved["mask"]
        if k is None:
            require(v is None and mask is None, _WHERE, "nothing without keys", "something", _FOREIGN)
            self._room, self._mask, self.length = None, None, 0
            return
        fits = isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == v.dim() == 4 and k.dtype == v.dtype
        require(fits and k.shape[:3] == v.shape[:3], _WHERE, "keys and values of as many tokens", "others", _FOREIGN)
        fits = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == k.shape[:3:2])
        require(fits, _WHERE, "a bool mask of these tokens, or None", "another", _FOREIGN)
        self._room, self.length = (k.clone(), v.clone()), k.shape[2]
        self._mask = None if mask is None else mask.clone()
