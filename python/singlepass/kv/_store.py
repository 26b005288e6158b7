# SPDX-License-Identifier: Apache-2.0
"""Compressed tokens in growing tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ._codec import Codec
from ._functional import Quantized, block_starts, dequantize_into, empty, quantize_into
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

GROWTH = 1.25


def held_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors hold: all of what is behind them, and once what several share."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def grown(tensor: Tensor, dim: int, used: int, size: int, most: int | None = None) -> Tensor:
    """A tensor with room for ``size`` along a dimension: itself, or a larger copy of what is used. Sizes grow
    geometrically, to ``most`` at most, so that adding token after token copies each byte a bounded number of times."""
    if tensor.shape[dim] >= size:
        return tensor
    room = size if used == 0 else max(size, int(tensor.shape[dim] * GROWTH) + 1)
    room = room if most is None else min(room, most)
    shape = (*tensor.shape[:dim], room, *tensor.shape[dim + 1 :])
    larger = tensor.new_zeros(shape)
    larger.narrow(dim, 0, used).copy_(tensor.narrow(dim, 0, used))
    return larger


class Segment:
    """Keys and values of one number of bits, compressed block by block. What is stored never changes again, but the
    newest tokens of a sequence can be forgotten."""

    def __init__(self, bits: int, block: int | None, codec: Codec, k: Tensor, v: Tensor):
        groups = (k.shape[3] // (codec.key_group or k.shape[3]), v.shape[3] // (codec.value_group or v.shape[3]))
        keys = empty(k, 0, 0, bits, codec.key_axis, groups[0], separable=False)
        values = empty(v, 0, 0, bits, "token", groups[1], separable=codec.channel_separable)
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
        return self._part("key", self._views((0, self.slots), (0, self.blocks)))

    @property
    def values(self) -> Quantized:
        return self._part("value", self._views((0, self.slots), (0, self.blocks)))

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
            self._tensors[name] = grown(tensor, dim, used, size)
        views = self._views((begin, end), (first, last))
        views["starts"][1:] = starts[1:] + begin
        views["counts"].copy_((lengths[:, None, None] - starts[:-1]).clamp(min=0).minimum(starts.diff()))
        views["starts"] = starts
        for x, name in ((k, "key"), (v, "value")):
            quantize_into(x, index, self._part(name, views), backend)
        self.slots, self.blocks = end, last

    def drop_oldest(self, tokens: Tensor) -> Tensor | None:
        """Frees the first blocks, as far as they hold none but the ``tokens`` oldest tokens of each head, int64 (batch,
        heads), if that is a quarter of all slots or more. Returns how many tokens of each head they held."""
        starts, counts = self.keys.starts, self.keys.counts
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
        counts = self._views((0, self.slots), (0, self.blocks))["counts"]
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
        """Applies a function to every tensor that has a row for each sequence, the parts in use."""
        views = self._views((0, self.slots), (0, self.blocks))
        self._tensors |= {name: function(view) for name, view in views.items() if name != "starts"}

    def state(self) -> dict[str, Tensor]:
        """Copies of its tensors, the parts in use."""
        views = self._views((0, self.slots), (0, self.blocks))
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state` gave, of which names, shapes and dtypes were checked."""
        self._tensors = {name: state[name].clone() for name in self._tensors}
        self.slots, self.blocks = state["key_codes"].shape[2], state["counts"].shape[2]

    def stored(self) -> Tensor:
        """Which slots hold a token, int64 0 or 1 (batch, heads, slots)."""
        keys = self.keys
        slots = torch.arange(self.slots, device=keys.starts.device)
        block = torch.searchsorted(keys.starts[1:].contiguous(), slots, right=True)
        return (slots - keys.starts[block] < keys.counts[:, :, block]).long()


class Compressed:
    """The compressed tokens of a layer: a segment for each kind, and which kind each token is of.

    Args:
        bits: of each kind, SALIENT and REGULAR.
        codec: how tokens are quantised.
        k: keys of the batch, heads, channels, dtype and device of all that are to come.
        v: values likewise.
        backend: of the ops.
    """

    def __init__(self, bits: dict[int, int], codec: Codec, k: Tensor, v: Tensor, backend: str | None):
        self._bits, self._codec, self._backend = bits, codec, backend
        self._like = k[:, :, :0].clone(), v[:, :, :0].clone()
        self.segments: dict[int, Segment] = {}
        self._packed = k.new_zeros((*k.shape[:2], 0), dtype=torch.uint8)  # kinds, four tokens in a byte
        self._used = 0
        self.forgotten = 0  # so many of the oldest tokens have left no trace
        self._may_have_padding = False
        self._pairs: list[tuple[Quantized, Quantized]] | None = None  # views, until there are other tensors

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [self._packed, *self._like, *(t for segment in self.segments.values() for t in segment.tensors())]

    @property
    def pairs(self) -> list[tuple[Quantized, Quantized]]:
        """Keys and values of each segment."""
        if self._pairs is None:
            self._pairs = [(segment.keys, segment.values) for segment in self.segments.values()]
        return self._pairs

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
        self._pairs = None
        self._may_have_padding = self._may_have_padding or padded
        for kind, most, held in zip((SALIENT, REGULAR), slots, (salient, lengths - salient), strict=True):
            if most == 0:
                continue
            if kind not in self.segments:
                self.segments[kind] = self.new_segment(kind)
            index = tokens_of_kind(kinds, kind, most) if padded or most < tokens else None
            self.segments[kind].append(k, v, index, most, held, self._backend)
        self._append_kinds(kinds)

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
        self._pairs, self._may_have_padding = None, True

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
        self._pairs = None
        for segment in self.segments.values():
            segment.map_batch(function)
        self._packed = function(self._packed[..., : self._used])
        self._like = function(self._like[0]), function(self._like[1])

    def state(self) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """Copies of the packed kinds and of the segments' tensors."""
        segments = {kind: segment.state() for kind, segment in self.segments.items()}
        return self._packed[..., : self._used].clone(), segments

    def new_segment(self, kind: int) -> Segment:
        """One without tokens."""
        block = self._codec.block if kind == SALIENT else self._codec.regular_block
        return Segment(self._bits[kind], block, self._codec, *self._like)

    def load(self, packed: Tensor, segments: dict[int, dict[str, Tensor]], forgotten: int) -> None:
        """Takes over what :meth:`state` gave, of which everything was checked."""
        self.forgotten = forgotten
        self._packed, self._used, self._may_have_padding = packed.clone(), packed.shape[2], True
        self.segments, self._pairs = {kind: self.new_segment(kind) for kind in segments}, None
        for kind, segment in self.segments.items():
            segment.load(segments[kind])
