# SPDX-License-Identifier: Apache-2.0
"""Probes among a window's tokens, as they come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .functional import probe_saliency, seen_by


class WindowProbes:
    """What the tokens of a window got from the queries that were probes.

    Attributes:
        due: places in the window whose queries are to be probes.
        places: those of the queries that were.
        scores: float32 (batch, heads, window), how much attention each place got from them all, or None without any.
    """

    def __init__(self, due: Iterable[int]):
        self.due = set(due)
        self.places: list[int] = []
        self.scores: Tensor | None = None

    def add(self, q: Tensor, k: Tensor, lse: Tensor, begin: int, **options: Any) -> None:
        """Adds what the window's keys k get from queries q whose turn it is, of tokens from place ``begin`` on.

        Args:
            q: (batch, query heads, queries, channels).
            k: (batch, heads, window, channels).
            lse: (batch, query heads, queries), of everything that they see.
            begin: the place of the first query's own token.
            **options: of :func:`probe_saliency`.
        """
        rows = [i for i in range(q.shape[2]) if begin + i in self.due]
        if not rows:
            return
        places = [begin + i for i in rows]
        positions = torch.tensor(places, dtype=torch.int64, device=k.device)
        mean = probe_saliency(q[:, :, rows], k, positions, lse=lse[:, :, rows].contiguous(), **options)
        scores = mean * seen_by(positions, k.shape[2], None, "probe_nnz")[:, None]
        self.scores = scores if self.scores is None else self.scores + scores
        self.places += places

    def saliency(self, tokens: int, normalization: str) -> Tensor | None:
        """Of the window's first tokens, (batch, heads, tokens); None if there were no probes."""
        if self.scores is None:
            return None
        positions = torch.tensor(self.places, dtype=torch.int64, device=self.scores.device)
        return self.scores[:, :, :tokens] / seen_by(positions, tokens, None, normalization)[:, None]

    def drop(self, length: int) -> None:
        """Forgets the tokens after the first ``length``."""
        # What dropped probes gave to older tokens stays in their scores, and so do the probes in their count.
        self.places = [min(place, length - 1) for place in self.places] if length else []
        if self.scores is not None:
            self.scores[:, :, length:] = 0.0

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        self.scores = None if self.scores is None else function(self.scores)
