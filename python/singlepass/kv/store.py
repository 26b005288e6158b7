# SPDX-License-Identifier: Apache-2.0
"""How tokens are stored, and the growing tensors that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import require
from .functional import Quantized, block_starts, empty, quantize_into

REGULAR, SALIENT, PADDING, FILLER = range(4)  # what a token is; fillers are no tokens, but fill up a byte
GROWTH = 1.25


@dataclass(frozen=True)
class Codec:
    """How keys and values are quantised. Choose one of the three by its name.

    Attributes:
        key_axis: "channel" or "token", what a key's step belongs to.
        key_group: channels that share a key's step where it belongs to tokens; None: all of a head.
        value_group: channels that share a value's step; None: all of a head.
        channel_separable: divide a value's channels first by the square roots of their largest magnitudes.
        block: tokens that share what belongs to channels; None: all that are compressed at a time.
        rotate: multiply keys and values by an orthonormal Hadamard matrix first, which spreads outliers.
    """

    key_axis: str = "channel"
    key_group: int | None = None
    value_group: int | None = None
    channel_separable: bool = True
    block: int | None = 128
    rotate: bool = False

    def __post_init__(self) -> None:
        require(self.key_axis in ("channel", "token"), "Codec", '"channel" or "token"', self.key_axis, "Choose one.")
        for field in ("key_group", "value_group", "block"):
            size = getattr(self, field)
            fits = size is None or (isinstance(size, int) and size > 0)
            require(fits, "Codec", f"a positive {field} or None", size, "None takes everything.")
        fits = self.key_axis == "token" or self.key_group is None
        require(fits, "Codec", "no key_group for keys by channels", self.key_group, "Leave it out.")

    @classmethod
    def zipcache(cls, block: int | None = 128) -> Codec:
        """Keys by channels, values channel-separable by tokens. block=None is the paper's: one set of channel
        parameters for a whole prompt."""
        return cls(block=block)

    @classmethod
    def kivi(cls, group: int = 32) -> Codec:
        """Keys by channels in blocks of ``group`` tokens, values by tokens in groups of ``group`` channels (arXiv
        2402.02750)."""
        return cls(value_group=group, channel_separable=False, block=group)

    @classmethod
    def per_token_head(cls, rotate: bool = False) -> Codec:
        """One step for each token and head, of keys and of values."""
        return cls(key_axis="token", channel_separable=False, block=None, rotate=rotate)

    def check_width(self, where: str, width: int) -> None:
        for field in ("key_group", "value_group"):
            group = getattr(self, field)
            fits = group is None or width % group == 0
            require(fits, where, f"a {field} that divides {width} channels", group, "Choose another codec.")


def cache_nbytes(
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 128,
    salient_ratio: float = 0.6,
    salient_bits: int = 4,
    regular_bits: int = 2,
    codec: Codec | None = None,
) -> int:
    """Bytes that a prompt of so many tokens takes in one layer, everything included: codes, steps and minima, channel
    factors, blocks, and what is needed to bring tokens back into their order.

    Example:
        >>> from singlepass.kv import cache_nbytes
        >>> round(cache_nbytes(32768) / 32768, 1)  # of 512 in 16 bits, keys and values of one head
        112.7
    """
    codec = Codec() if codec is None else codec
    key_groups, value_groups = (head_dim // (group or head_dim) for group in (codec.key_group, codec.value_group))
    salient = int(tokens * salient_ratio + 0.5)
    of_heads, of_sequences, shared = -(-tokens // 4), 0, 0
    for bits, n in ((salient_bits, salient), (regular_bits, tokens - salient)):
        if n == 0:
            continue
        blocks = -(-n // (codec.block or n))
        of_heads += n * (2 * head_dim * bits // 8 + 4 * value_groups)
        of_heads += 4 * (blocks * head_dim if codec.key_axis == "channel" else n * key_groups)
        of_heads += 2 * blocks * head_dim * codec.channel_separable
        of_sequences += 4 * blocks
        shared += 4 * (blocks + 1)
    return batch * (heads * of_heads + of_sequences) + shared


def grown(tensor: Tensor, dim: int, used: int, size: int) -> Tensor:
    """A tensor with room for ``size`` along a dimension: itself, or a larger copy of what is used. Sizes grow
    geometrically, so that adding token after token copies each byte a bounded number of times."""
    if tensor.shape[dim] >= size:
        return tensor
    room = size if used == 0 else max(size, int(tensor.shape[dim] * GROWTH) + 1)
    shape = (*tensor.shape[:dim], room, *tensor.shape[dim + 1 :])
    larger = tensor.new_zeros(shape)
    larger.narrow(dim, 0, used).copy_(tensor.narrow(dim, 0, used))
    return larger


class Segment:
    """Keys and values of one number of bits, compressed block by block. What is stored never changes again."""

    def __init__(self, bits: int, codec: Codec, k: Tensor, v: Tensor):
        groups = (k.shape[3] // (codec.key_group or k.shape[3]), v.shape[3] // (codec.value_group or v.shape[3]))
        keys = empty(k, 0, 0, bits, codec.key_axis, groups[0], separable=False)
        values = empty(v, 0, 0, bits, "token", groups[1], separable=codec.channel_separable)
        self.bits, self.slots, self.blocks = bits, 0, 0
        self._codec = codec
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

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(view.nbytes for view in self._views((0, self.slots), (0, self.blocks)).values())

    def append(
        self, k: Tensor, v: Tensor, index: Tensor | None, slots: int, lengths: Tensor, backend: str | None
    ) -> None:
        """Compresses tokens ``index`` (batch, heads, slots) of k and v, of which sequence b has ``lengths[b]``."""
        if slots == 0:
            return
        starts = block_starts(slots, self._codec.block or slots, k.device)
        begin, end, first, last = self.slots, self.slots + slots, self.blocks, self.blocks + len(starts) - 1
        for name, tensor in self._tensors.items():
            dim, unit, extra = self._extent(name)
            used, size = (begin, end) if unit == "slots" else (first + extra, last + extra)
            self._tensors[name] = grown(tensor, dim, used, size)
        views = self._views((begin, end), (first, last))
        views["starts"][1:] = starts[1:] + begin
        views["counts"].copy_((lengths[:, None] - starts[:-1]).clamp(min=0).minimum(starts.diff()))
        views["starts"] = starts
        for x, name in ((k, "key"), (v, "value")):
            quantize_into(x, index, self._part(name, views), backend)
        self.slots, self.blocks = end, last

    def _extent(self, name: str) -> tuple[int, str, int]:
        """The dimension along which a tensor grows, what it counts, and how many it has more than those."""
        if name == "starts":
            return 0, "blocks", 1
        if name == "counts":
            return 1, "blocks", 0
        by_block = name == "value_channels" or (name == "key_scales" and self._codec.key_axis == "channel")
        return 2, "blocks" if by_block else "slots", 0

    def _views(self, slots: tuple[int, int], blocks: tuple[int, int]) -> dict[str, Tensor]:
        """The parts of all tensors that belong to these slots and blocks."""
        views = {}
        for name, tensor in self._tensors.items():
            dim, unit, extra = self._extent(name)
            begin, end = slots if unit == "slots" else blocks
            views[name] = tensor.narrow(dim, begin, end - begin + extra)
        return views

    def _part(self, name: str, views: dict[str, Tensor]) -> Quantized:
        axis = self._codec.key_axis if name == "key" else "token"
        channels = views.get(f"{name}_channels")
        codes, scales = views[f"{name}_codes"], views[f"{name}_scales"]
        return Quantized(codes, scales, channels, views["starts"], views["counts"], self.bits, axis)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        for name, tensor in self._tensors.items():
            if name != "starts":
                self._tensors[name] = function(tensor)

    def state(self) -> dict[str, Tensor]:
        """Copies of its tensors, the parts in use."""
        views = self._views((0, self.slots), (0, self.blocks))
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state` gave, of which names, shapes and dtypes were checked."""
        self._tensors = {name: state[name].clone() for name in self._tensors}
        self.slots, self.blocks = state["key_codes"].shape[2], state["counts"].shape[1]
