# SPDX-License-Identifier: Apache-2.0
"""Probes among a window's tokens, as they come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._saliency import attention_sums, mean_attention


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

    def only(self, wanted: Callable[[int], bool]) -> Queries:
        """Those at wanted places, in memory of their own: a part of a tensor would keep all of it."""
        rows = [i for i, place in enumerate(self.places) if wanted(place)]
        if len(rows) == len(self.places):
            return self
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

    def add(self, q: Tensor, lse: Tensor, begin: int) -> None:
        """Lays aside queries of neighbouring tokens, the first one's at place ``begin``; q and lse as in Queries."""
        # The newest before this call's stay, for transformers may remove all of this call's tokens.
        self._keep(lambda place: place < begin and (place in self.due or place >= begin - self.newest))
        places = list(range(begin, begin + q.shape[2]))
        self.queries.append(Queries(places, _copy(q), _copy(lse)))

    def saliency(self, k: Tensor, newest: int, normalization: str, **options: Any) -> tuple[Tensor | None, int]:
        """Of the window's tokens, whose keys are k, by the probes at random places and so many of the newest.

        Returns:
            (batch, heads, tokens), infinity for tokens that no probe sees, or None if there are no probes; and how many
            tokens, the newest, that are.
        """
        tokens = k.shape[2]
        self._keep(lambda place: place in self.due or place >= tokens - newest)
        if not self.queries:
            return None, tokens
        places = [place for part in self.queries for place in part.places]
        positions = torch.tensor(places, dtype=torch.int64, device=k.device)
        q, lse = (torch.cat([getattr(part, name) for part in self.queries], 2) for name in ("q", "lse"))
        sums = attention_sums(q, k, positions, lse=lse, **options)
        return mean_attention(sums, positions, None, normalization), tokens - 1 - places[-1]

    def drop(self, length: int) -> None:
        """Forgets the tokens after the first ``length``."""
        self._keep(lambda place: place < length)

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        kept = [part.only(wanted) for part in self.queries]
        self.queries = [part for part in kept if part.places]

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        self.queries = [Queries(part.places, function(part.q), function(part.lse)) for part in self.queries]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [t for part in self.queries for t in (part.q, part.lse)]


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
