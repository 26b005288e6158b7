# SPDX-License-Identifier: Apache-2.0
"""How tokens are quantised, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import require


@dataclass(frozen=True)
class Codec:
    """How keys and values are quantised. Choose one of the three by its name.

    Attributes:
        key_axis: "channel" or "token", what a key's step belongs to.
        key_group: channels that share a key's step where it belongs to tokens; None: all of a head.
        value_group: channels that share a value's step; None: all of a head.
        channel_separable: divide a value's channels first by the square roots of their largest magnitudes.
        block: salient tokens that share what belongs to channels; None: all that are compressed at a time.
        regular_block: regular tokens that do; None likewise.
        rotate: multiply keys and values by an orthonormal Hadamard matrix first, which spreads outliers.
    """

    key_axis: str = "channel"
    key_group: int | None = None
    value_group: int | None = None
    channel_separable: bool = True
    block: int | None = 128
    regular_block: int | None = 32
    rotate: bool = False

    def __post_init__(self) -> None:
        require(self.key_axis in ("channel", "token"), "Codec", '"channel" or "token"', self.key_axis, "Choose one.")
        for field in ("key_group", "value_group", "block", "regular_block"):
            size = getattr(self, field)
            fits = size is None or (isinstance(size, int) and size > 0)
            require(fits, "Codec", f"a positive {field} or None", size, "None takes everything.")
        fits = self.key_axis == "token" or self.key_group is None
        require(fits, "Codec", "no key_group for keys by channels", self.key_group, "Leave it out.")

    @classmethod
    def zipcache(cls, block: int | None = 128) -> Codec:
        """Keys by channels, values channel-separable by tokens; regular tokens, whose few bits need closer steps, in
        blocks of 32 at most. block=None is the paper's: one set of channel parameters for a whole prompt."""
        return cls(block=block, regular_block=block and min(block, 32))

    @classmethod
    def kivi(cls, group: int = 32) -> Codec:
        """Keys by channels in blocks of ``group`` tokens, values by tokens in groups of ``group`` channels (arXiv
        2402.02750)."""
        return cls(value_group=group, channel_separable=False, block=group, regular_block=group)

    @classmethod
    def per_token_head(cls, rotate: bool = False) -> Codec:
        """One step for each token and head, of keys and of values."""
        return cls(key_axis="token", channel_separable=False, block=None, regular_block=None, rotate=rotate)

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
        120.0
    """
    where, codec = "cache_nbytes", Codec() if codec is None else codec
    require(tokens >= 0, where, "0 tokens or more", tokens, "Pass the length of the prompt.")
    require(0.0 <= salient_ratio <= 1.0, where, "salient_ratio from 0 to 1", salient_ratio, "It is a share.")
    for name, bits in (("salient_bits", salient_bits), ("regular_bits", regular_bits)):
        require(bits in (2, 4, 8), where, f"{name} 2, 4 or 8", bits, "Choose one of them.")
    require(head_dim > 0 and head_dim % 16 == 0, where, "head_dim a multiple of 16", head_dim, "Pad channels.")
    codec.check_width(where, head_dim)
    key_groups, value_groups = (head_dim // (group or head_dim) for group in (codec.key_group, codec.value_group))
    salient = int(tokens * salient_ratio + 0.5)
    of_heads, of_sequences, shared = -(-tokens // 4), 0, 0
    kinds = ((salient_bits, codec.block, salient), (regular_bits, codec.regular_block, tokens - salient))
    for bits, block, n in kinds:
        if n == 0:
            continue
        blocks = -(-n // (block or n))
        of_heads += n * (2 * head_dim * bits // 8 + 4 * value_groups)
        of_heads += 4 * (blocks * head_dim if codec.key_axis == "channel" else n * key_groups)
        of_heads += 2 * blocks * head_dim * codec.channel_separable
        of_sequences += 4 * blocks
        shared += 4 * (blocks + 1)
    return batch * (heads * of_heads + of_sequences) + shared
