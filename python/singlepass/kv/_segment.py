# SPDX-License-Identifier: Apache-2.0
"""Compressed tokens of one number of bits, in tensors that grow or have room from the beginning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ._codec import Codec
from ._functional import Quantized, block_starts, empty, quantize_into
from ._steps import keep_in_place

GROWTH = 1.25
GROWS = "%s: more comes than max_tokens=%d reserved room for, which grows now and may again: capture graphs anew."


def held_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors hold: all of what is behind them, and once what several share."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def grown(tensor: Tensor, dim: int, used: int, size: int, most: int | None = None, extra: int = 0) -> Tensor:
    """A tensor with room for ``size`` along a dimension: itself, or a larger copy of what is used. Sizes grow
    geometrically, to ``most`` at most, so that adding token after token copies each byte a bounded number of times.
    Tensors that differ by ``extra`` elements alone go on doing so."""
    if tensor.shape[dim] >= size:
        return tensor
    room = size if used == extra else max(size, int((tensor.shape[dim] - extra) * GROWTH) + 1 + extra)
    room = room if most is None else min(room, most)
    shape = (*tensor.shape[:dim], room, *tensor.shape[dim + 1 :])
    larger = tensor.new_zeros(shape)
    larger.narrow(dim, 0, used).copy_(tensor.narrow(dim, 0, used))
    return larger


class Room(NamedTuple):
    """How much a segment can hold."""

    slots: int = 0
    blocks: int = 0

    @classmethod
    def of(cls, tokens: int, share: float, window: int, block: int | None) -> Room:
        """For that share of so many tokens, which come in a prompt and window by window."""
        windows = -(-tokens // window) + 1  # the last ones are not full
        own = math.ceil(window * share)
        return cls(math.ceil(tokens * share) + windows, windows * -(-own // (block or own)))


class Segment:
    """Keys and values of one number of bits, compressed block by block. What is stored never changes again, but the
    newest tokens of a sequence can be forgotten.

    With room from the beginning, its tensors stay the same as long as they suffice. Blocks that hold nothing yet have a
    count of zero, and begin where the last one ends.
    """

    def __init__(self, bits: int, block: int | None, codec: Codec, k: Tensor, v: Tensor, room: Room | None = None):
        groups = (k.shape[3] // (codec.key_group or k.shape[3]), v.shape[3] // (codec.value_group or v.shape[3]))
        self._reserved, room = room is not None, room or Room()
        keys = empty(k, *room, bits, codec.key_axis, groups[0], separable=False)
        values = empty(v, *room, bits, "token", groups[1], separable=codec.channel_separable)
        self.bits, self.slots, self.blocks = bits, 0, 0
        self._block, self._codec = block, codec
        self._tensors = {
            "key_codes": keys.codes,
            "key_scales": keys.scales,
            "value_codes": values.codes,
            "value_scales": values.scales,
            "starts": keys.starts,
            "counts": keys.counts,
        }
        if values.channels is not None:
            self._tensors["value_channels"] = values.channels

    @property
    def keys(self) -> Quantized:
        return self._part("key", self._used())

    @property
    def values(self) -> Quantized:
        return self._part("value", self._used())

    @property
    def pair(self) -> tuple[Quantized, Quantized]:
        """Keys and values for attention: with the room for more, if that was there from the beginning."""
        tensors = self._tensors if self._reserved else self._used()
        return self._part("key", tensors), self._part("value", tensors)

    def _used(self) -> dict[str, Tensor]:
        """The parts of all tensors that are in use."""
        return self._views((0, self.slots), (0, self.blocks))

    def fits(self, slots: int) -> bool:
        """Whether there is room for so many more tokens, compressed together."""
        blocks = -(-slots // (self._block or max(slots, 1)))
        codes, counts = self._tensors["key_codes"], self._tensors["counts"]
        return self.slots + slots <= codes.shape[2] and self.blocks + blocks <= counts.shape[2]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return list(self._tensors.values())

    def append(
        self, k: Tensor, v: Tensor, index: Tensor | None, slots: int, lengths: Tensor, backend: str | None
    ) -> None:
        """Compresses tokens ``index`` (batch, heads, slots) of k and v, of which sequence b has ``lengths[b]``."""
        if slots == 0:
            return
        starts = block_starts(slots, self._block or slots, k.device)
        begin, end, first, last = self.slots, self.slots + slots, self.blocks, self.blocks + len(starts) - 1
        for name, tensor in self._tensors.items():
            dim, unit, extra = self.extent(name)
            used, size = (begin, end) if unit == "slots" else (first + extra, last + extra)
            self._tensors[name] = grown(tensor, dim, used, size, extra=extra)
        views = self._views((begin, end), (first, last))
        views["starts"][1:] = starts[1:] + begin
        views["counts"].copy_((lengths[:, None, None] - starts[:-1]).clamp(min=0).minimum(starts.diff()))
        views["starts"] = starts
        for x, name in ((k, "key"), (v, "value")):
            quantize_into(x, index, self._part(name, views), backend)
        self._tensors["starts"][last + 1 :] = end
        self.slots, self.blocks = end, last

    def drop_oldest(self, tokens: Tensor) -> Tensor | None:
        """Frees the first blocks, as far as they hold none but the ``tokens`` oldest tokens of each head, int64 (batch,
        heads), if that is a quarter of all slots or more. Returns how many tokens of each head they held."""
        used = self._used()
        starts, counts = used["starts"], used["counts"]
        up_to_here = counts.cumsum(2)
        blocks = int((up_to_here <= tokens[..., None]).all(0).all(0).sum())
        slots = int(starts[blocks])
        if slots == 0 or 4 * slots < self.slots:
            return None
        views = self._views((slots, self.slots), (blocks, self.blocks))
        self._tensors = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
        self._tensors["starts"] -= slots
        self.slots, self.blocks = self.slots - slots, self.blocks - blocks
        return up_to_here[..., blocks - 1]

    def drop_newest(self, tokens: Tensor) -> None:
        """Forgets so many of the newest tokens of each head, int64 (batch, heads)."""
        counts = self._used()["counts"]
        up_to_here = counts.cumsum(2)
        kept = (up_to_here[..., -1:] - tokens[..., None]) - (up_to_here - counts)
        counts.copy_(kept.clamp(min=0).minimum(counts))

    def extent(self, name: str) -> tuple[int, str, int]:
        """The dimension along which a tensor grows, what it counts, and how many it has more than those."""
        if name == "starts":
            return 0, "blocks", 1
        by_block = name in ("counts", "value_channels") or (name == "key_scales" and self._codec.key_axis == "channel")
        return 2, "blocks" if by_block else "slots", 0

    def _views(self, slots: tuple[int, int], blocks: tuple[int, int]) -> dict[str, Tensor]:
        """The parts of all tensors that belong to these slots and blocks."""
        views = {}
        for name, tensor in self._tensors.items():
            dim, unit, extra = self.extent(name)
            begin, end = slots if unit == "slots" else blocks
            views[name] = tensor.narrow(dim, begin, end - begin + extra)
        return views

    def _part(self, name: str, views: dict[str, Tensor]) -> Quantized:
        axis = self._codec.key_axis if name == "key" else "token"
        channels = views.get(f"{name}_channels")
        codes, scales = views[f"{name}_codes"], views[f"{name}_scales"]
        return Quantized(codes, scales, channels, views["starts"], views["counts"], self.bits, axis)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence: with room for more, or without."""
        if self._reserved:
            changed = {name: keep_in_place(t, function(t)) for name, t in self._tensors.items() if name != "starts"}
        else:
            changed = {name: function(view) for name, view in self._used().items() if name != "starts"}
        self._tensors |= changed

    def clear(self) -> None:
        """Removes all tokens, and keeps the room."""
        self.slots, self.blocks = 0, 0
        self._tensors["counts"].zero_()
        self._tensors["starts"].zero_()

    def state(self) -> dict[str, Tensor]:
        """Copies of its tensors, the parts in use."""
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in self._used().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state` gave, of which names, shapes and dtypes were checked."""
        self.slots, self.blocks = state["key_codes"].shape[2], state["counts"].shape[2]
        for name, tensor in self._tensors.items():
            dim, unit, extra = self.extent(name)
            self._tensors[name] = grown(tensor, dim, 0, (self.slots if unit == "slots" else self.blocks) + extra)
        for name, view in self._used().items():
            view.copy_(state[name])
        self._tensors["starts"][self.blocks + 1 :] = self.slots

    def stored(self) -> Tensor:
        """Which slots hold a token, int64 0 or 1 (batch, heads, slots)."""
        used = self._used()
        starts = used["starts"]
        slots = torch.arange(self.slots, device=starts.device)
        block = torch.searchsorted(starts[1:].contiguous(), slots, right=True)
        return (slots - starts[block] < used["counts"][:, :, block]).long()
