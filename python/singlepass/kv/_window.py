# SPDX-License-Identifier: Apache-2.0
"""The newest tokens, uncompressed, and the probes among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._probes import ProbeRows, Queries, WindowProbes
from ._segment import grown
from ._selection import ProbeDraw
from ._steps import keep_in_place, places_of, write_behind

_MOST_BOUNDS = 1024


@functools.cache
def _bounds(device: torch.device) -> Tensor:
    """(0, n) for each n, int32 (1025, 2): made once for all windows, so that steps compute and copy nothing for it."""
    with torch.inference_mode(False):
        ends = torch.arange(_MOST_BOUNDS + 1, dtype=torch.int32, device=device)
        return torch.stack((torch.zeros_like(ends), ends), 1)


@functools.lru_cache(_MOST_BOUNDS)
def _seen(device: torch.device, batch: int, end: int) -> Tensor:
    """(0, end) for each of so many sequences."""
    return _bounds(device)[end].expand(batch, 2)


class Window:
    """The newest tokens of a layer, uncompressed.

    Args:
        k: keys of the batch, heads, channels, dtype and device of all that are to come.
        v: values likewise.
        size: maximum number of tokens.
        draw: of the random probes.
        reserved: whether there is room for all of them from the beginning, and steps can be planned.

    Attributes:
        length: number of tokens of the longest sequence.
        counts: number of tokens of each sequence, int64 (batch,); what stands behind them is padding. None: all have
            the same number.
        room: keys and values (batch, heads, tokens or more, channels), with room for more tokens.
        probes: the queries that will tell how salient the tokens are.
        ends: where tokens begin and end in planned steps, int32 (batch, 2).
    """

    def __init__(self, k: Tensor, v: Tensor, size: int, draw: ProbeDraw, reserved: bool = False):
        slots = size if reserved else 0
        first, second = (x.new_zeros((*x.shape[:2], slots, x.shape[3])) for x in (k, v))
        self.room: tuple[Tensor, Tensor] = first, second
        self.size = size
        self._draw, self._reserved = draw, reserved
        self.ends = k.new_zeros((len(k) if reserved else 0, 2), dtype=torch.int32)
        self._counted = 0  # of the tokens, so many are told by ``ends``
        self._rows: ProbeRows | None = None  # once planned steps have probes
        self.restart()

    def clear(self, draw: ProbeDraw) -> None:
        """Removes all tokens; the next probes are drawn otherwise."""
        self._draw = draw
        self.restart()

    def restart(self) -> None:
        """Removes all tokens, and draws which of the next ones are probes."""
        self.length = 0
        self.counts: Tensor | None = None
        newest = self._draw.newest(self.size)
        self.probes = WindowProbes(self._draw([self.size])[self.size][:-newest].tolist(), newest)

    @property
    def keys(self) -> Tensor:
        return self.room[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self.room[1][:, :, : self.length]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        counts = [] if self.counts is None else [self.counts]
        rows = [] if self._rows is None else self._rows.tensors()
        return [*self.room, self.ends, *counts, *self.probes.tensors(), *rows]

    def fixed(self) -> list[Tensor]:
        """What planned steps use."""
        return [*self.room, self.ends, *([] if self._rows is None else self._rows.tensors())]

    @property
    def mask(self) -> Tensor | None:
        """bool (batch, tokens), false for padding; None if there is none."""
        if self.counts is None:
            return None
        return torch.arange(self.length, device=self.counts.device) < self.counts[:, None]

    def bounds(self, first: int, newer: int) -> Tensor:
        """From which place to which the query sees the window after whose token there are ``newer`` ones, int32 (batch,
        2), if it sees nothing before place ``first``."""
        keys, end = self.room[0], self.length - newer
        batch, device = keys.shape[0], keys.device
        is_real = type(keys) is Tensor and not torch.compiler.is_compiling()
        if is_real and first == 0 and self.counts is None and end <= _MOST_BOUNDS:
            return _seen(device, batch, end)
        bounds = torch.full((batch, 2), first, dtype=torch.int32, device=device)
        bounds[:, 1] = end if self.counts is None else self.counts - newer
        return bounds

    def takes(self, shown: Tensor | None) -> bool:
        """Whether a token of the sequences that are ``shown``, bool (batch,) or None for all, can come next: padding
        can only stand behind a sequence's tokens, not among them."""
        if self.counts is None:
            return True
        goes_on = self.counts < self.length
        return not bool((goes_on if shown is None else goes_on & shown).any())

    def append(self, k: Tensor, v: Tensor, shown: Tensor | None = None) -> None:
        """Adds tokens, of which there must be no more than fit; or one, which is padding in sequences that are not
        ``shown``, bool (batch,)."""
        keys, values = self.reserve(k.shape[2])
        keys.copy_(k)
        values.copy_(v)
        self.take(k.shape[2], shown)

    def reserve(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Where the next tokens go, keys and values. Whoever fills that calls :meth:`take`."""
        self.make_room(tokens)
        keys, values = self.room
        return keys.narrow(2, self.length, tokens), values.narrow(2, self.length, tokens)

    def make_room(self, tokens: int) -> None:
        """Makes sure that there is room for the next tokens."""
        keys, values = self.room
        begin, end = self.length, self.length + tokens
        if end > keys.shape[2]:
            self.room = grown(keys, 2, begin, end, self.size), grown(values, 2, begin, end, self.size)

    def take(self, tokens: int, shown: Tensor | None = None) -> None:
        """Counts the tokens in the room reserved, as :meth:`append` does."""
        begin = self.length
        if self.counts is None and shown is not None and not bool(shown.all()):
            self.counts = torch.full((len(shown),), begin, device=shown.device)
        if self.counts is not None:
            if shown is not None and bool(((self.counts == begin) & ~shown).any()):
                self.probes.keep_newest_of(begin)  # sequences end here, and these are their last queries
            self.counts = self.counts + (tokens if shown is None else shown)
        self.length += tokens

    def plan(self, tokens: int, queries: Tensor | None) -> None:
        """Counts tokens that :meth:`write` will add by itself, each of which has a place. ``queries``: like those that
        :meth:`lay_aside` will lay aside; None: none will come."""
        if self._counted != self.length:
            self.ends.select(1, 1).fill_(self.length)
        if queries is not None:
            if self._rows is None:
                self._rows = ProbeRows(self.size, len(self.probes.due), self.probes.newest, queries)
            self.probes.plan(self.length, tokens, self._rows)
        self.length += tokens
        self._counted = self.length

    def unplan(self, tokens: int) -> None:
        """Removes the tokens planned last, of which some may have been written or none."""
        self.drop_newest(tokens)
        self._counted = -1

    def write(self, k: Tensor, v: Tensor) -> None:
        """Adds tokens that were planned."""
        write_behind(self.room, self.ends, k, v)

    def advance(self, tokens: int) -> None:
        """Moves the end behind tokens that were planned, which come next."""
        self.ends.select(1, 1).add_(tokens)

    def lay_aside(self, q: Tensor, lse: Tensor) -> None:
        """Keeps the queries of the tokens written last, and what belongs to them, as in Queries."""
        assert self._rows is not None
        self._rows.add(q, lse, places_of(self.ends, q.shape[2], -q.shape[2]))

    def saliency(self, normalization: str, **options: Any) -> tuple[Tensor | None, int | Tensor]:
        """As :meth:`WindowProbes.saliency`, of its tokens."""
        return self.probes.saliency(self.keys, self.mask, self._draw.newest(self.length), normalization, **options)

    def drop_newest(self, tokens: int) -> None:
        """Removes so many of the newest places."""
        self.length -= tokens
        if self.counts is not None:
            self.counts = self.counts.clamp(max=self.length)
        self.probes.drop(self.length)

    def hide(self, mask: Tensor) -> None:
        """Makes padding of the newest tokens of each sequence, those that ``mask`` (batch, tokens) does not show."""
        held = mask if self.mask is None else mask & self.mask
        self.counts = held.sum(1)

    def map_batch(self, function: Callable[[Tensor], Tensor], keep_room: bool = False) -> None:
        """Applies a function to every tensor that has a row for each sequence. Room for more tokens is kept or not."""
        self.probes.map_batch(function)
        self.counts = None if self.counts is None else function(self.counts)
        if not self._reserved:
            keys, values = self.room if keep_room else (self.keys, self.values)
            self.room = function(keys), function(values)
            return
        keys, values = (keep_in_place(held, function(held)) for held in self.room)
        self.room, self.ends = (keys, values), keep_in_place(self.ends, function(self.ends))
        if self._rows is not None and len(self._rows) != len(self.ends):
            self._rows = None

    def state(self) -> dict[str, Any]:
        """Copies of everything, as plain data and tensors."""
        return {
            "window_length": self.length,
            "window_counts": None if self.counts is None else self.counts.clone(),
            "window_k": self.keys.clone(),
            "window_v": self.values.clone(),
            "due": sorted(self.probes.due),
            "queries": self.probes.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave, of which everything was checked."""
        self.length = state["window_length"]
        keys, values = (grown(held, 2, 0, self.length) for held in self.room)
        self.room = keys, values
        self.keys.copy_(state["window_k"])
        self.values.copy_(state["window_v"])
        self.counts = None if state["window_counts"] is None else state["window_counts"].clone()
        self.probes = WindowProbes(state["due"], self.probes.newest)
        self.probes.queries = [Queries(list(places), q.clone(), lse.clone()) for places, q, lse in state["queries"]]
