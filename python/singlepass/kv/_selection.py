# SPDX-License-Identifier: Apache-2.0
"""Which tokens are salient: probes, and the split of tokens by their saliency."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..reference.kv import pack, unpack

REGULAR, SALIENT, PADDING, FILLER = range(4)  # what a token is; fillers are no tokens, but fill up a byte


def probe_count(length: int, recent: float, random: float, most: int) -> tuple[int, int]:
    """How many of the newest of ``length`` tokens are probes, and how many of the others, at most ``most`` in all."""
    newest = min(length, max(1, round(recent * length)))
    others = min(length - newest, round(random * length))
    if newest + others > most:
        newest = max(1, round(most * newest / (newest + others)))
        others = min(others, most - newest)
    return newest, others


def probe_positions(length: int, recent: float, random: float, most: int, generator: torch.Generator) -> Tensor:
    """Where probes stand among ``length`` tokens, ascending: the newest ones and a random choice of the others. int64,
    on the CPU."""
    newest, others = probe_count(length, recent, random, most)
    drawn = torch.randperm(length - newest, generator=generator, device="cpu")[:others]
    return torch.cat((drawn.sort().values, torch.arange(length - newest, length, device="cpu")))


class ProbeDraw:
    """Draws where probes stand, with a generator of its own.

    Attributes:
        shares: the newest tokens' share, the share of the others, and how many probes there are at most.
    """

    def __init__(self, shares: tuple[float, float, int], seed: int):
        self.shares = shares
        self.generator = torch.Generator().manual_seed(seed)

    def newest(self, length: int) -> int:
        """How many of the newest of so many tokens are probes."""
        return probe_count(length, *self.shares)[0]

    def __call__(self, lengths: Iterable[int]) -> dict[int, Tensor]:
        """Places of probes among so many tokens, for each number what would be drawn if it were the only one."""
        state, drawn = self.generator.get_state(), {}
        for length in sorted(set(lengths)):
            self.generator.set_state(state)
            drawn[length] = probe_positions(length, *self.shares, self.generator)
        return drawn


def classify(saliency: Tensor, mask: Tensor | None, ratio: float, least: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """Marks the ratio of tokens, or the least number of them, of all sequences or (batch,), with the highest saliency
    (batch, heads, tokens), older ones first where it is equal.

    Returns:
        What each token is, uint8 (batch, heads, tokens), and how many of a sequence are salient, int64 (batch,).
    """
    length = saliency.shape[2]
    valid = torch.ones_like(saliency[:, 0], dtype=torch.bool) if mask is None else mask
    salient = (valid.sum(1).double() * ratio + 0.5).floor().long().clamp(min=least)
    order = saliency.masked_fill(~valid[:, None], -torch.inf).argsort(dim=2, descending=True, stable=True)
    chosen = torch.arange(length, device=order.device) < salient[:, None, None]
    kinds = torch.where(chosen, SALIENT, REGULAR).to(torch.uint8).expand_as(order)
    kinds = torch.empty_like(order, dtype=torch.uint8).scatter_(2, order, kinds)
    return torch.where(valid[:, None], kinds, PADDING), salient


def all_of_kind(kind: int, k: Tensor, mask: Tensor | None) -> Tensor:
    """That all tokens of keys k are of one kind, as :func:`classify` says it, but for padding."""
    kinds = torch.full(k.shape[:3], kind, dtype=torch.uint8, device=k.device)
    return kinds if mask is None else torch.where(mask[:, None], kinds, PADDING)


def tokens_of_kind(kinds: Tensor, kind: int, slots: int) -> Tensor:
    """The first ``slots`` tokens of a kind in their order, int32 (batch, heads, slots); zeros where there are fewer."""
    chosen = kinds == kind
    place = torch.where(chosen, chosen.cumsum(2) - 1, slots).clamp_(max=slots)  # what is not wanted goes to the end
    tokens = torch.arange(kinds.shape[2], dtype=torch.int32, device=kinds.device).expand_as(place)
    found = torch.zeros((*kinds.shape[:2], slots + 1), dtype=torch.int32, device=kinds.device)
    return found.scatter_(2, place, tokens)[..., :slots].contiguous()


def pack_kinds(kinds: Tensor) -> Tensor:
    """Four tokens in a byte, the last one filled up: uint8 (batch, heads, ceil(tokens / 4))."""
    padded = torch.nn.functional.pad(kinds, (0, -kinds.shape[2] % 4), value=FILLER)
    return pack(padded.unflatten(2, (-1, 4)), 2)[..., 0]


def packed_anew(packed: Tensor, kinds: Tensor) -> Tensor:
    """What :func:`pack_kinds` packed, with other kinds of the same tokens."""
    every = unpack(packed[..., None], 2).flatten(2)
    every[..., every[0, 0] != FILLER] = kinds
    return pack_kinds(every)


def leading_padding(packed: Tensor, most: int) -> tuple[int, int]:
    """How many of the first bytes hold padding alone, and how many tokens that is, at most ``most``."""
    every = unpack(packed[..., None], 2).flatten(2)
    nothing = ((every == PADDING) | (every == FILLER)).all(0).all(0).view(-1, 4).all(1)
    tokens = (every[0, 0] != FILLER).view(-1, 4).sum(1).cumsum(0)
    count = int((nothing & (tokens <= most)).long().cumprod(0).sum())
    return count, int(tokens[count - 1]) if count else 0


def unpack_kinds(packed: Tensor) -> Tensor:
    """What :func:`pack_kinds` packed, of one or more calls side by side, without fillers."""
    kinds = unpack(packed[..., None], 2).flatten(2)
    return kinds if kinds.numel() == 0 else kinds[..., kinds[0, 0] != FILLER]
