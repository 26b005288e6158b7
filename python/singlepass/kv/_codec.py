# SPDX-License-Identifier: Apache-2.0
"""How tokens are quantised, and the memory that this takes."""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import require
from .._ops.kv import MAX_HEAD_DIM


@dataclass(frozen=True)
class Codec:
    """How keys and values are quantised: :meth:`zipcache` (the default), :meth:`kivi` or :meth:`per_token_head`.

    Attributes:
        key_axis: "channel" or "token": keys have one scale per channel and block, or per token.
        key_group: number of channels that share a key's scale, for key_axis "token"; None: all channels of a head.
        value_group: number of channels that share a value's scale; None: all channels of a head.
        channel_separable: first divide each channel of the values by the square root of its largest magnitude.
        block: number of salient tokens that share per-channel parameters; None: all that are compressed together.
        regular_block: the same for regular tokens.
        rotate: first multiply keys and values by an orthonormal Hadamard matrix, which spreads outliers.

    Example:
        >>> from singlepass.kv import Codec, ZipCacheLayer
        >>> layer = ZipCacheLayer(codec=Codec.kivi(32), salient_ratio=0.0)  # KIVI, all tokens in 2 bits
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
        """Keys per channel, values per token with channel normalisation. Regular tokens are in blocks of at most 32,
        because few bits need finer scales. ``block=None``, as in the paper: one block for a whole prompt."""
        return cls(block=block, regular_block=block and min(block, 32))

    @classmethod
    def kivi(cls, group: int = 32) -> Codec:
        """KIVI (arXiv 2402.02750): keys per channel in blocks of ``group`` tokens, values per token in groups of
        ``group`` channels."""
        return cls(value_group=group, channel_separable=False, block=group, regular_block=group)

    @classmethod
    def per_token_head(cls, rotate: bool = False) -> Codec:
        """One scale per token and head, for keys and for values."""
        return cls(key_axis="token", channel_separable=False, block=None, regular_block=None, rotate=rotate)

    def check_head_dim(self, where: str, head_dim: int) -> None:
        for field in ("key_group", "value_group"):
            group = getattr(self, field)
            fits = group is None or head_dim % group == 0
            require(fits, where, f"a {field} that divides {head_dim} channels", group, "Choose another codec.")


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
    """Bytes of one layer's cache after a prompt, everything included: codes, scales and minima, channel factors,
    blocks, and the token order.

    Args:
        tokens: length of the prompt.
        batch: number of sequences.
        heads: number of key-value heads.
        head_dim: channels of a head, a multiple of 16 up to 512.
        salient_ratio, salient_bits, regular_bits, codec: as for :class:`ZipCacheLayer`.

    Raises:
        ValueError: arguments out of range.

    Example:
        >>> from singlepass.kv import cache_nbytes
        >>> round(cache_nbytes(32768) / 32768, 1)  # per token, keys and values of one head; 512 in 16 bits
        120.0
    """
    where, codec = "cache_nbytes", Codec() if codec is None else codec
    fits = isinstance(tokens, int) and tokens >= 0
    require(fits, where, "0 tokens or more", repr(tokens), "Pass the length of the prompt.")
    for name, count in (("batch", batch), ("heads", heads)):
        fits = isinstance(count, int) and count >= 1
        require(fits, where, f"{name} as a whole number, 1 or more", repr(count), "Leave it out for 1.")
    require(0.0 <= salient_ratio <= 1.0, where, "salient_ratio from 0 to 1", salient_ratio, "It is a share.")
    for name, bits in (("salient_bits", salient_bits), ("regular_bits", regular_bits)):
        require(bits in (2, 4, 8), where, f"{name} 2, 4 or 8", bits, "Choose one of them.")
    fits = head_dim % 16 == 0 and 0 < head_dim <= MAX_HEAD_DIM
    require(fits, where, f"a head_dim of 16, 32, ..., {MAX_HEAD_DIM}", head_dim, "Pad channels with zeros.")
    codec.check_head_dim(where, head_dim)
    key_groups, value_groups = (head_dim // (group or head_dim) for group in (codec.key_group, codec.value_group))
    alike = salient_bits == regular_bits and salient_ratio > 0.0  # no token is told from another
    salient = tokens if alike else int(tokens * salient_ratio + 0.5)
    of_heads, shared = -(-tokens // 4), 0
    kinds = ((salient_bits, codec.block, salient), (regular_bits, codec.regular_block, tokens - salient))
    for bits, block, n in kinds:
        if n == 0:
            continue
        blocks = -(-n // (block or n))
        of_heads += n * (2 * head_dim * bits // 8 + 4 * value_groups)
        of_heads += 4 * (blocks * head_dim if codec.key_axis == "channel" else n * key_groups)
        of_heads += 2 * blocks * head_dim * codec.channel_separable + 4 * blocks
        shared += 4 * (blocks + 1)
    return batch * heads * of_heads + shared
