# SPDX-License-Identifier: Apache-2.0
"""Tokens in arrays with room around them, and their codes, for the KV cache's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ..kv import truth
from .arrays import Array, decode, encode

each_device = pytest.mark.parametrize("device", ["simt", "cpu"])

# What steps belong to: axis, channels in a group, whether channels are divided first.
CODECS = {
    "channel": (0, None, False),
    "token": (1, None, False),
    "group": (1, 16, False),
    "small group": (1, 2, False),
    "separable": (1, None, True),
    "separable group": (1, 16, True),
}
each_codec = pytest.mark.parametrize("codec", CODECS)
each_bits = pytest.mark.parametrize("bits", [2, 4, 8])


@dataclass(frozen=True)
class Room:
    """What lies around tokens in memory: more heads, tokens and channels, elements before them."""

    heads: int = 0
    tokens: int = 0
    channels: int = 0
    transposed: bool = False
    misalignment: int = 0


DENSE = Room()


@dataclass
class Tokens:
    """Values (B, H, L, D) in an array with room, which is full of NaN."""

    array: Array
    shape: tuple[int, int, int, int]
    dtype: str
    room: Room = DENSE

    @staticmethod
    def of(values: Array, dtype: str, room: Room = DENSE) -> Tokens:
        batch, heads, length, width = values.shape
        more = (batch, heads + room.heads, length + room.tokens, width + room.channels)
        array = np.full(more, np.nan)
        array[:, :heads, :length, :width] = values
        array = array.swapaxes(1, 2) if room.transposed else array
        return Tokens(encode(np.ascontiguousarray(array), dtype), (batch, heads, length, width), dtype, room)

    def values(self, array: Array | None = None) -> Array:
        """In float64, of these tokens or of an array that they were written over to."""
        found = decode(self.array if array is None else array)
        found = found.swapaxes(1, 2) if self.room.transposed else found
        _, heads, length, width = self.shape
        return found[:, :heads, :length, :width]

    def check_room(self, array: Array) -> None:
        """Nothing around the tokens has changed."""
        whole = decode(array)
        view = whole.swapaxes(1, 2) if self.room.transposed else whole
        _, heads, length, width = self.shape
        view[:, :heads, :length, :width] = np.nan
        assert bool(np.isnan(whole).all())

    def argument(self, core: ModuleType) -> Any:
        _, heads, length, width = self.shape
        room = self.room
        sizes = {"heads": heads, "tokens": length, "width": width}
        return core.KvTokens(self.array, **sizes, transposed=room.transposed, misalignment=room.misalignment)


def drawn(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Normal values, of which channel 3 is an outlier far from zero and each token has a size of its own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.random((*shape[:-1], 1))
    x[..., 3] += 7.0
    return x


@dataclass
class Quantized:
    """Codes with their scales, channel factors and blocks, and one head more than there is."""

    codes: Array
    scales: Array
    channels: Array | None
    starts: Array
    counts: Array
    bits: int
    axis: int
    misalignment: int = 0

    @staticmethod
    def room(
        shape: tuple[int, ...],
        starts: Sequence[int],
        counts: Sequence[Sequence[int]],
        bits: int,
        codec: str,
        misalignment: int = 0,
    ) -> Quantized:
        axis, group, separable = CODECS[codec]
        batch, heads, _, width = shape
        slots, blocks = starts[-1], len(starts) - 1
        rest = (blocks, 2, width) if axis == 0 else (slots, 2, width // (group or width))
        return Quantized(
            np.full((batch, heads + 1, slots, width * bits // 8), 0xAB, np.uint8),
            np.full((batch, heads + 1, *rest), np.nan, np.float16),
            np.full((batch, heads + 1, blocks, width), np.nan, np.float16) if separable else None,
            np.asarray(starts, np.int32),
            truth.head_counts(counts, heads, blocks),
            bits,
            axis,
            misalignment,
        )

    def argument(self, core: ModuleType) -> Any:
        parts = (self.codes, self.scales, self.channels, self.starts, self.counts)
        return core.KvPacked(*parts, bits=self.bits, axis=self.axis, misalignment=self.misalignment)

    def inside(self) -> Quantized:
        """Without the additional head, which nothing has written to."""
        assert bool((self.codes[:, -1] == 0xAB).all())
        assert bool(np.isnan(self.scales[:, -1]).all())
        channels = None if self.channels is None else self.channels[:, :-1]
        assert self.channels is None or bool(np.isnan(self.channels[:, -1]).all())
        return replace(self, codes=self.codes[:, :-1], scales=self.scales[:, :-1], channels=channels)

    def restored(self) -> truth.Tokens:
        q = self.inside()
        return truth.dequantize(q.codes, q.scales, q.channels, q.starts, q.counts, q.bits, q.axis)


def place(core: ModuleType, device: str, workers: int = 1) -> Any:
    return core.KvPlacement(device, workers=workers)


def quantize(core: ModuleType, device: str, x: Tokens, index: Array | None, to: Quantized) -> Quantized:
    made = core.kv_quantize(place(core, device), x.argument(core), index, to.argument(core))
    return replace(to, codes=made[0], scales=made[1], channels=made[2])
