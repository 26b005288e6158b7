# SPDX-License-Identifier: Apache-2.0
"""Planned steps: the host counts tokens and makes room before a step, whose lengths stand on the device alone. So the
same step can run again and again, compiled or captured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .._errors import message, require

MOST_PLANNED = 16  # tokens of a step


class Planned:
    """A cache whose steps can be planned. Subclasses say how the host counts a step's tokens."""

    _planned = 0  # tokens of the step that runs
    _fixed = False  # whether torch.compile was told which tensors stay

    @contextmanager
    def planned(self, tokens: int = 1) -> Iterator[None]:
        """A step within which the cache takes so many tokens and attends to their queries, once each, by the device
        alone: it reads no number of the host that changes, allocates nothing that stays, and moves nothing. What runs
        within can be compiled by ``torch.compile``, without recompilation at later steps, or captured in a CUDA graph
        and replayed, each time in a ``with`` of its own. The window is compressed before it, if it is full.

        Needs ``max_tokens``. Batches without padding among the newest tokens, no sliding window.

        Args:
            tokens: 1 to 16, each time as many as the step was compiled or captured for.

        Raises:
            ValueError: a cache without ``max_tokens``, one that would have to grow, an empty one; on a CPU also a step
                in which as many tokens as planned did not come. It is unchanged.
        """
        self._require_unplanned("another")
        self._check_plan(tokens)
        try:
            with ExitStack() as parts:
                for part in self._parts():
                    parts.enter_context(part.planned(tokens))
                self._plan(tokens)
                self._planned = tokens
                self._fixed = self._fixed or fix(self._fixed_tensors())
                yield
                self._check_written(tokens)
        except BaseException:
            if self._planned:
                self._unplan(tokens)
            raise
        finally:
            self._planned = 0

    def _require_unplanned(self, call: str) -> None:
        if self._planned:
            contract = "append and attend alone within a planned step"
            raise ValueError(message(type(self).__name__, contract, call, "Leave the step before."))

    def _parts(self) -> Sequence[Planned]:
        """What it consists of, whose steps are planned before."""
        return ()

    def _check_plan(self, tokens: int) -> None:
        """Raises if such a step can't be planned, as far as it knows without its parts."""

    def _plan(self, tokens: int) -> None:
        """Counts such tokens, and makes room for them."""

    def _fixed_tensors(self) -> list[Tensor]:
        """What it uses in planned steps, without its parts."""
        return []

    def _counts(self) -> tuple[Tensor, int] | None:
        """Where the device counts the tokens that :func:`write_behind` writes, and their number by the host's count.
        None: its parts count."""
        return None

    def _check_written(self, tokens: int) -> None:
        """Raises unless the tokens that the host counted came. Elsewhere than on a CPU, to ask would take time."""
        counts = self._counts()
        if counts is not None and counts[0].is_cpu:
            got = tokens + int(counts[0][0, 1]) - counts[1]
            contract, remedy = f"the {tokens} tokens that were planned", "Append and attend once within the step."
            require(got == tokens, f"{type(self).__name__}.planned", contract, got, remedy)

    def _unplan(self, tokens: int) -> None:
        """Removes the tokens planned last."""


def check_planned(where: str, tokens: int, length: int, max_tokens: int | None) -> None:
    """Raises unless so many tokens can be planned behind ``length`` others."""
    remedy = "Make the cache with max_tokens=, which says how much room it reserves."
    require(max_tokens is not None, where, "a cache with max_tokens", "one that grows", remedy)
    fits = type(tokens) is int and 1 <= tokens <= MOST_PLANNED
    require(fits, where, f"1 to {MOST_PLANNED} tokens", repr(tokens), "Pass longer pieces to prefill.")
    remedy = "Make the cache with a larger max_tokens."
    require(length + tokens <= int(max_tokens or 0), where, f"at most {max_tokens} tokens", length + tokens, remedy)


def check_step(where: str, tokens: int, planned: int, other: object) -> None:
    """Raises unless a step has the tokens that were planned, and nothing else is asked for, such as a mask."""
    require(tokens == planned, where, f"the {planned} tokens that were planned", tokens, "Plan as many as come.")
    remedy = "Leave masks and sliding windows out, or the step unplanned."
    require(other is None, where, "a planned step of tokens alone", "a mask or a sliding window", remedy)


def places_of(ends: Tensor, tokens: int, first: int) -> Tensor:
    """Places of tokens, int64 (tokens,), the first of which is ``first`` after the end of what is held (0) or before
    it (-tokens)."""
    return ends[0, 1] + torch.arange(first, first + tokens, device=ends.device)


def write_behind(room: tuple[Tensor, Tensor], ends: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes tokens behind those held, and moves the end, ``ends`` int32 (batch, 2), behind them."""
    places = places_of(ends, k.shape[2], 0)
    for held, new in zip(room, (k, v), strict=True):
        held.index_copy_(2, places, new)
    ends.select(1, 1).add_(k.shape[2])


def fix(tensors: Iterable[Tensor]) -> bool:
    """Tells torch.compile that tensors stay where they are, or it would copy them for the CUDA graphs that it makes.
    False if it is not in use yet: to load it takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return False
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)
    return True


def keep_in_place(held: Tensor, new: Tensor) -> Tensor:
    """``new`` in the memory of ``held`` if it fits there, since compiled and captured steps know that place."""
    return held.copy_(new) if held.shape == new.shape else new
