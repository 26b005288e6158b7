# SPDX-License-Identifier: Apache-2.0
"""The newest tokens, uncompressed, and the probes among them, as they come one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._saliency import attention_sums, mean_attention
from ._selection import ProbeDraw
from ._store import grown

_MOST_BOUNDS = 1024


@functools.cache
def _bounds(device: torch.device) -> Tensor:
    """(0, n) for each n, int32 (1025, 2): made once for all windows, so that steps compute and copy nothing for it."""
    with torch.inference_mode(False):
        ends = torch.arange(_MOST_BOUNDS + 1, dtype=torch.int32, device=device)
        return torch.stack((torch.zeros_like(ends), ends), 1)


@dataclass
class Queries:
    """Queries of tokens in a window.

    Attributes:
        places: where in the window those tokens stand, ascending.
        q: (batch, query heads, queries, channels).
        lse: float32 (batch, query heads, queries), of everything that they see.
    """

    places: list[int]
    q: Tensor
    lse: Tensor

    def only(self, wanted: Callable[[int], bool]) -> Queries | None:
        """Those at wanted places, in memory of their own: a part of a tensor would keep all of it. None: none."""
        rows = [i for i, place in enumerate(self.places) if wanted(place)]
        if len(rows) == len(self.places):
            return self
        if not rows:
            return None
        return Queries([self.places[i] for i in rows], self.q[:, :, rows], self.lse[:, :, rows])


class WindowProbes:
    """The queries that will tell how salient a window's tokens are.

    Where a window ends is not known before it does, for a prompt may come at any time. So queries at random places are
    laid aside, and the newest ones until there are newer. Those of tokens that are removed again leave no trace.

    Attributes:
        due: the random places.
        newest: how many of the newest queries are laid aside, besides those of the last call.
        queries: what is laid aside, in the order of places.
    """

    def __init__(self, due: Iterable[int], newest: int):
        self.due = set(due)
        self.newest = newest
        self.queries: list[Queries] = []
        self._settled = 0  # so many of the first stay, for they are at random places: they are not looked at again

    def add(self, q: Tensor, lse: Tensor, begin: int) -> None:
        """Lays aside a copy of the queries of neighbouring tokens, the first one's at place ``begin``, and their lse
        itself; both as in Queries."""
        # The newest before this call's stay, for transformers may remove all of this call's tokens.
        recent = begin - self.newest
        self._keep(lambda place: place < begin and (place in self.due or place >= recent), self._settled)
        while self._settled < len(self.queries) and self.queries[self._settled].places[-1] < recent:
            self._settled += 1
        places = list(range(begin, begin + q.shape[2]))
        self.queries.append(Queries(places, q.clone(memory_format=torch.contiguous_format), lse))

    def saliency(
        self, k: Tensor, mask: Tensor | None, newest: int, normalization: str, **options: Any
    ) -> tuple[Tensor | None, int | Tensor]:
        """Of the window's tokens, whose keys are k, by the probes at random places and so many of the newest.

        Returns:
            (batch, heads, tokens), infinity for tokens that no probe sees and 0 for padding, which ``mask`` (batch,
            tokens) does not show; None if there are no probes. And how many tokens, the newest of a sequence, no probe
            sees, of all or int64 (batch,).
        """
        tokens = k.shape[2]
        self._keep(lambda place: place in self.due or place >= tokens - newest)
        if not self.queries:
            return None, tokens
        places = [place for part in self.queries for place in part.places]
        positions = torch.tensor(places, dtype=torch.int64, device=k.device)
        q, lse = (torch.cat([getattr(part, name) for part in self.queries], 2) for name in ("q", "lse"))
        unseen: int | Tensor = tokens - 1 - places[-1]
        if mask is not None:
            own = mask[:, positions]
            lse = lse.masked_fill(~own[:, None], torch.inf)  # the queries of padding: exp(logit - lse) = 0
            unseen = mask.sum(1) - 1 - torch.where(own, positions, -1).amax(1)
        sums = attention_sums(q, k, positions, lse=lse, **options)
        return mean_attention(sums, positions, mask, normalization), unseen

    def keep_newest_of(self, length: int) -> None:
        """Lays aside for good what is still there of the newest queries of the first ``length`` tokens."""
        self.due.update(range(max(length - self.newest, 0), length))

    def drop(self, length: int) -> None:
        """Forgets the tokens after the first ``length``."""
        self._keep(lambda place: place < length)

    def _keep(self, wanted: Callable[[int], bool], begin: int = 0) -> None:
        """Forgets all queries but those wanted, and those of the first ``begin`` calls."""
        kept = [part.only(wanted) for part in self.queries[begin:]]
        self.queries[begin:] = [part for part in kept if part is not None]
        self._settled = min(self._settled, begin)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        self.queries = [Queries(part.places, function(part.q), function(part.lse)) for part in self.queries]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [t for part in self.queries for t in (part.q, part.lse)]


class Window:
    """The newest tokens of a layer, uncompressed.

    Args:
        k: keys of the batch, heads, channels, dtype and device of all that are to come.
        v: values likewise.
        size: maximum number of tokens.
        draw: of the random probes.

    Attributes:
        length: number of tokens of the longest sequence.
        counts: number of tokens of each sequence, int64 (batch,); what stands behind them is padding. None: all have
            the same number.
        room: keys and values (batch, heads, tokens or more, channels), with room for more tokens.
        probes: the queries that will tell how salient the tokens are.
    """

    def __init__(self, k: Tensor, v: Tensor, size: int, draw: ProbeDraw):
        first, second = (x.new_zeros((*x.shape[:2], 0, x.shape[3])) for x in (k, v))
        self.room: tuple[Tensor, Tensor] = first, second
        self.size = size
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
        return [*self.room, *counts, *self.probes.tensors()]

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
        is_real = type(keys) is Tensor and not torch.compiler.is_compiling()
        if is_real and first == 0 and self.counts is None and end <= _MOST_BOUNDS:
            return _bounds(keys.device)[end].expand(len(keys), 2)
        bounds = torch.full((len(keys), 2), first, dtype=torch.int32, device=keys.device)
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
        begin, end = self.length, self.length + tokens
        keys, values = (grown(held, 2, begin, end, self.size) for held in self.room)
        self.room = keys, values
        return keys[:, :, begin:end], values[:, :, begin:end]

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
        keys, values = self.room if keep_room else (self.keys, self.values)
        self.room = function(keys), function(values)
        self.counts = None if self.counts is None else function(self.counts)
        self.probes.map_batch(function)

    def state(self) -> dict[str, Any]:
        """Copies of everything, as plain data and tensors."""
        return {
            "window_length": self.length,
            "window_counts": None if self.counts is None else self.counts.clone(),
            "window_k": self.keys.clone(),
            "window_v": self.values.clone(),
            "due": sorted(self.probes.due),
            "queries": [(list(part.places), part.q.clone(), part.lse.clone()) for part in self.probes.queries],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave, of which everything was checked."""
        self.room, self.length = (state["window_k"].clone(), state["window_v"].clone()), state["window_length"]
        self.counts = None if state["window_counts"] is None else state["window_counts"].clone()
        self.probes = WindowProbes(state["due"], self.probes.newest)
        self.probes.queries = [Queries(list(places), q.clone(), lse.clone()) for places, q, lse in state["queries"]]
