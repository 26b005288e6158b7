# SPDX-License-Identifier: Apache-2.0
"""The compressed tokens of a layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._codec import Codec
from ._functional import Segments, dequantize_into
from ._segment import GROWS, Room, Segment, grown
from ._selection import (
    PADDING,
    REGULAR,
    SALIENT,
    leading_padding,
    pack_kinds,
    packed_anew,
    tokens_of_kind,
    unpack_kinds,
)

logger = logging.getLogger("singlepass")


class Reserved(NamedTuple):
    """Room from the beginning.

    Attributes:
        tokens: for so many.
        rooms: for the tokens of each kind that is to be expected.
    """

    tokens: int
    rooms: dict[int, Room]


class Compressed:
    """The compressed tokens of a layer: a segment for each kind, and which kind each token is of.

    Args:
        bits: of each kind, SALIENT and REGULAR.
        codec: how tokens are quantised.
        k: keys of the batch, heads, channels, dtype and device of all that are to come.
        v: values likewise.
        backend: of the ops.
        reserved: the room that there is from the beginning; None: none.
    """

    def __init__(
        self,
        bits: dict[int, int],
        codec: Codec,
        k: Tensor,
        v: Tensor,
        backend: str | None,
        reserved: Reserved | None = None,
    ):
        self._bits, self._codec, self._backend, self._reserved = bits, codec, backend, reserved
        self._like = k[:, :, :0].clone(), v[:, :, :0].clone()
        self.segments = {kind: self.new_segment(kind) for kind in reserved.rooms} if reserved is not None else {}
        size = 0 if reserved is None else -(-reserved.tokens // 4)
        self._packed = k.new_zeros((*k.shape[:2], size), dtype=torch.uint8)  # kinds, four tokens in a byte
        self._used = 0
        self.forgotten = 0  # so many of the oldest tokens have left no trace
        self._may_have_padding = False
        self._operands: Segments | None = None  # until there are other tensors
        self._grew = False

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self._packed, *self._like, *(t for segment in self.segments.values() for t in segment.tensors())]

    @property
    def operands(self) -> Segments:
        """What attention reads."""
        if self._operands is None:
            self._operands = Segments.of([segment.pair for segment in self.segments.values()])
        return self._operands

    @property
    def kinds(self) -> Tensor:
        """What each token is, uint8 (batch, heads, tokens), but for the forgotten ones."""
        return unpack_kinds(self._packed[..., : self._used])

    def mask(self) -> Tensor:
        """bool (batch, tokens), false for padding and what was forgotten."""
        return torch.nn.functional.pad(self.kinds[:, 0] != PADDING, (self.forgotten, 0))

    def has_padding(self) -> bool:
        """Whether some of the tokens are padding."""
        self._may_have_padding = self._may_have_padding and not bool((self.kinds[:, 0] != PADDING).all())
        return self._may_have_padding

    def append(
        self,
        k: Tensor,
        v: Tensor,
        kinds: Tensor,
        slots: tuple[int, int],
        salient: Tensor,
        lengths: Tensor,
        padded: bool,
    ) -> None:
        """Compresses tokens of given kinds.

        Args:
            k: (batch, heads, tokens, channels).
            v: (batch, heads, tokens, value channels).
            kinds: uint8 (batch, heads, tokens).
            slots: how many tokens of a sequence are salient at most, and how many regular.
            salient: how many of each sequence are, int64 (batch,).
            lengths: how many tokens each sequence has, int64 (batch,).
            padded: whether some may be padding.
        """
        tokens = k.shape[2]
        self._operands = None
        self._may_have_padding = self._may_have_padding or padded
        if self._reserved is not None and not self._grew and not self.fits(slots):
            self._grew = True
            logger.warning(GROWS, "ZipCacheLayer", self._reserved.tokens)
        for kind, most, held in zip((SALIENT, REGULAR), slots, (salient, lengths - salient), strict=True):
            if most == 0:
                continue
            if kind not in self.segments:
                self.segments[kind] = self.new_segment(kind)
            index = tokens_of_kind(kinds, kind, most) if padded or most < tokens else None
            self.segments[kind].append(k, v, index, most, held, self._backend)
        self._append_kinds(kinds)

    def fits(self, slots: tuple[int, int]) -> bool:
        """Whether there is room for so many more salient and regular tokens."""
        its = zip((SALIENT, REGULAR), slots, strict=True)
        return all(kind in self.segments and self.segments[kind].fits(most) for kind, most in its if most > 0)

    def skip(self, tokens: int) -> None:
        """Adds tokens that nobody will see."""
        kinds = self._packed.new_full((*self._packed.shape[:2], tokens), PADDING)
        self._append_kinds(kinds)
        self._may_have_padding = True

    def _append_kinds(self, kinds: Tensor) -> None:
        packed = pack_kinds(kinds)
        end = self._used + packed.shape[2]
        self._packed = grown(self._packed, 2, self._used, end)
        self._packed[..., self._used : end] = packed
        self._used = end

    def forget(self, length: int) -> None:
        """Frees what it can of the first ``length`` tokens, which nobody will see again."""
        kinds = self.kinds
        older, dropped = kinds[..., : max(length - self.forgotten, 0)], False
        for kind, segment in self.segments.items():
            gone = segment.drop_oldest((older == kind).sum(2))
            if gone is not None:
                its = kinds == kind
                kinds, dropped = kinds.where(~its | (its.cumsum(2) > gone[..., None]), PADDING), True
        if not dropped and bool((older != PADDING).any()):
            return
        packed = packed_anew(self._packed[..., : self._used], kinds)
        nothing, tokens = leading_padding(packed, older.shape[2])
        self._packed, self._used = packed[..., nothing:].clone(), packed.shape[2] - nothing
        self.forgotten += tokens
        self._operands, self._may_have_padding = None, True

    def restore(self, k: Tensor, v: Tensor) -> None:
        """Writes what is stored to its tokens' places in k and v (batch, heads, tokens or more, channels)."""
        k, v, kinds = k[:, :, self.forgotten :], v[:, :, self.forgotten :], self.kinds
        for kind, segment in self.segments.items():
            tokens = tokens_of_kind(kinds, kind, kinds.shape[2])
            rank = (segment.stored().cumsum(2) - 1).clamp(min=0)
            index = tokens.gather(2, rank).contiguous()
            dequantize_into(segment.keys, index, k, self._backend)
            dequantize_into(segment.values, index, v, self._backend)

    def first_slots(self, oldest: int) -> Tensor:
        """The first slot of each segment whose token is ``oldest`` or newer, int32 (segments, batch, heads)."""
        kinds = self.kinds[..., : max(oldest - self.forgotten, 0)]
        firsts = []
        for kind, segment in self.segments.items():
            older = (kinds == kind).sum(2)  # tokens stand in their order
            firsts.append(torch.searchsorted(segment.stored().cumsum(2), older[..., None] + 1)[..., 0])
        return torch.stack(firsts).int() if firsts else kinds.new_zeros((0, *kinds.shape[:2]), dtype=torch.int32)

    def hide(self, mask: Tensor) -> None:
        """Makes padding of the newest tokens of each sequence, those that ``mask`` (batch, tokens) does not show."""
        kinds = self.kinds
        hidden = (kinds != PADDING) & ~mask[:, None, self.forgotten :]
        for kind, segment in self.segments.items():
            segment.drop_newest((hidden & (kinds == kind)).sum(2))
        self._packed[..., : self._used] = packed_anew(self._packed[..., : self._used], kinds.where(~hidden, PADDING))
        self._may_have_padding = True

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        self._operands = None
        for segment in self.segments.values():
            segment.map_batch(function)
        self._packed = function(self._packed if self._reserved is not None else self._packed[..., : self._used])
        self._like = function(self._like[0]), function(self._like[1])

    def state(self) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """Copies of the packed kinds and of the segments' tensors."""
        segments = {kind: segment.state() for kind, segment in self.segments.items() if segment.slots > 0}
        return self._packed[..., : self._used].clone(), segments

    def new_segment(self, kind: int) -> Segment:
        """One without tokens."""
        block = self._codec.block if kind == SALIENT else self._codec.regular_block
        room = None if self._reserved is None else self._reserved.rooms.get(kind, Room())
        return Segment(self._bits[kind], block, self._codec, *self._like, room)

    def clear(self) -> None:
        """Removes all tokens, and keeps the room."""
        for segment in self.segments.values():
            segment.clear()
        self._used, self.forgotten, self._may_have_padding, self._operands = 0, 0, False, None

    def load(self, packed: Tensor, segments: dict[int, dict[str, Tensor]], forgotten: int) -> None:
        """Takes over what :meth:`state` gave, of which everything was checked."""
        self.forgotten, self._may_have_padding, self._operands = forgotten, True, None
        self._packed, self._used = grown(self._packed, 2, 0, packed.shape[2]), packed.shape[2]
        self._packed[..., : self._used] = packed
        for kind, its in segments.items():
            if kind not in self.segments:
                self.segments[kind] = self.new_segment(kind)
            self.segments[kind].load(its)
