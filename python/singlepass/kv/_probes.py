# SPDX-License-Identifier: Apache-2.0
"""The queries of a window's tokens that will tell how salient the tokens are, as they come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._errors import message
from ._saliency import attention_sums, mean_attention
from ._steps import MOST_PLANNED


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
        self._rows: ProbeRows | None = None  # of planned steps, as long as there are such
        self._planned = range(0)  # places of tokens whose queries stand in these rows

    def plan(self, begin: int, tokens: int, rows: ProbeRows) -> None:
        """Expects the queries of so many neighbouring tokens in ``rows``, the first one's at place ``begin``."""
        if len(self._planned) == 0:
            self._rows, self._planned = rows, range(begin, begin)
            rows.begin(self.due)
        self._planned = range(self._planned.start, begin + tokens)

    def _settle(self) -> None:
        """Lays aside what planned steps left in rows."""
        planned, self._planned = self._planned, range(0)
        if self._rows is not None and len(planned) > 0:
            self.queries.append(self._rows.read(planned))

    def add(self, q: Tensor, lse: Tensor, begin: int) -> None:
        """Lays aside the queries of neighbouring tokens, the first one's at place ``begin``, in memory that nobody else
        writes to, and their lse; both as in Queries."""
        self._settle()
        heads = self.queries[-1].q.shape[1] if self.queries else q.shape[1]
        if heads != q.shape[1]:
            contract, remedy = f"{heads} query heads, as before", "Call reset() for another model."
            raise ValueError(message("ZipCacheLayer", contract, q.shape[1], remedy))
        if self.queries and self.queries[-1].places[-1] >= begin:  # these tokens were removed again
            self.drop(begin)
        # The newest before this call's stay, for transformers may remove all of this call's tokens.
        recent = begin - self.newest
        while self._settled < len(self.queries) and self.queries[self._settled].places[0] < recent:
            part = self.queries[self._settled].only(lambda place: place in self.due or place >= recent)
            if part is None:
                del self.queries[self._settled]
                continue
            self.queries[self._settled] = part
            if part.places[-1] >= recent:
                break
            self._settled += 1
        places = list(range(begin, begin + q.shape[2]))
        self.queries.append(Queries(places, q, lse))

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
        self._settle()
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
        self._settle()
        self.due.update(range(max(length - self.newest, 0), length))

    def drop(self, length: int) -> None:
        """Forgets the tokens after the first ``length``."""
        self._settle()
        while self.queries and self.queries[-1].places[-1] >= length:
            part = self.queries.pop()
            if part.places[0] < length and (rest := part.only(lambda place: place < length)) is not None:
                self.queries.append(rest)
        self._settled = min(self._settled, len(self.queries))

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        """Forgets all queries but those wanted."""
        kept = [part.only(wanted) for part in self.queries]
        self.queries = [part for part in kept if part is not None]
        self._settled = 0

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        self._settle()
        self.queries = [Queries(part.places, function(part.q), function(part.lse)) for part in self.queries]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [t for part in self.queries for t in (part.q, part.lse)]

    def state(self) -> list[tuple[list[int], Tensor, Tensor]]:
        """Copies of the queries laid aside."""
        self._settle()
        return [(list(part.places), part.q.clone(), part.lse.clone()) for part in self.queries]


class ProbeRows:
    """Where planned steps put their queries: those at random places each in a row of its own, the newest ones in the
    others by turns. Which row is a place's, the device knows too.

    Args:
        size: of the window.
        due: how many random places there are.
        newest: how many of the newest queries are probes.
        like: queries (batch, query heads, any, channels) of the shape, dtype and device of all that are to come.
    """

    def __init__(self, size: int, due: int, newest: int, like: Tensor):
        batch, heads, _, channels = like.shape
        self._turns = newest + MOST_PLANNED
        self._rows = [place % self._turns for place in range(size)]
        self._row_of = torch.tensor(self._rows, device=like.device)
        self._q = like.new_zeros((batch, heads, due + self._turns, channels))
        self._lse = like.new_zeros((batch, heads, due + self._turns), dtype=torch.float32)
        self._due: set[int] = set()

    def __len__(self) -> int:
        """Of the batch."""
        return len(self._q)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self._row_of, self._q, self._lse]

    def begin(self, due: set[int]) -> None:
        """Gives the random places their rows."""
        if due == self._due:
            return
        self._due = set(due)
        own = {place: row for row, place in enumerate(sorted(due))}
        self._rows = [own.get(place, len(own) + place % self._turns) for place in range(len(self._rows))]
        self._row_of.copy_(torch.tensor(self._rows, device="cpu"))

    def add(self, q: Tensor, lse: Tensor, places: Tensor) -> None:
        """Copies queries and what belongs to them, as in Queries, to the rows of their places, int64 (queries,)."""
        rows = self._row_of[places]
        self._q.index_copy_(2, rows, q)
        self._lse.index_copy_(2, rows, lse)

    def read(self, places: range) -> Queries:
        """What stands there of the queries of such tokens."""
        kept = [place for place in places if place in self._due or place >= places.stop - self._turns]
        rows = torch.tensor([self._rows[place] for place in kept], device=self._q.device)
        return Queries(kept, self._q.index_select(2, rows), self._lse.index_select(2, rows))
