# SPDX-License-Identifier: Apache-2.0
"""Views tensors of any strides as rows, channels and columns, and divides these among programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

NARROW = (16, 32, 64, 128)  # widths of tiles, besides a tile of a single row
MOST_BIAS_PARTIALS = 1 << 17


class Layout(NamedTuple):
    """All that a launch depends on of a tensor but its address. ``misaligned``: the address modulo 16."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misaligned: int

    @classmethod
    def of(cls, t: Tensor | None) -> Layout | None:
        return None if t is None else cls(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)

    @property
    def is_contiguous(self) -> bool:
        strides = [math.prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        return all(n <= 1 or a == b for n, a, b in zip(self.shape, self.stride, strides, strict=True))


@dataclass
class View:
    """A tensor as (rows, channels, columns), the columns contiguous: strides of rows (``outer``) and of channels."""

    outer: int
    channel: int
    misaligned: int
    is_copy: bool


class Order:
    """The dimensions in the order of the result's memory: those before the channels, the channels, those after."""

    def __init__(self, y: Layout, channel_dim: int) -> None:
        self.y, self.channel = y, channel_dim
        dims = [d for d in range(len(y.shape)) if d == channel_dim or y.shape[d] != 1]
        dims.sort(key=y.stride.__getitem__, reverse=True)
        place = dims.index(channel_dim)
        # A single channel can be anywhere. In front of all other dimensions it leaves the longest runs of columns.
        self.outer, self.inner = dims[:place], dims[place + 1 :]
        self.channels = y.shape[channel_dim]
        if self.channels == 1:
            self.outer, self.inner = [], self.outer + self.inner
        self.rows = math.prod(y.shape[d] for d in self.outer)
        self.columns = math.prod(y.shape[d] for d in self.inner)

    def view(self, t: Layout) -> View:
        """The view of a tensor, or of a copy in the result's layout if its strides do not fit a view."""
        fits = self._fits(t)
        seen = t if fits else self.y
        outer = seen.stride[self.outer[-1]] if self.outer else 0
        channel = seen.stride[self.channel] if self.inner else 1
        return View(outer, channel, t.misaligned if fits else 0, not fits)

    def _fits(self, t: Layout) -> bool:
        for dims in (self.outer, self.inner):
            if any(t.stride[d] != t.stride[k] * t.shape[k] for d, k in pairwise(dims)):
                return False
        if self.inner:
            return t.stride[self.inner[-1]] == 1
        return self.channels == 1 or t.stride[self.channel] == 1


@dataclass
class Geometry:
    """The shape of the work. Without a bias, channels of a group become columns where contiguous, and so may rows."""

    rows: int
    channels: int
    columns: int
    groups: int
    bias: str | None = None

    @classmethod
    def of(cls, order: Order, groups: int, views: list[View], has_bias: bool) -> Geometry:
        g = cls(order.rows, order.channels, order.columns, groups)
        if has_bias:
            g.bias = "planes" if order.inner else "columns"
            if g.bias == "columns":
                g.columns = g.group_size
            return g
        if not order.inner or all(v.channel == g.columns for v in views):
            g.columns *= g.group_size
            g.channels = groups
            for v in views:
                v.channel = g.columns
            if groups == 1 and all(v.outer == g.columns for v in views):
                g.rows, g.columns = 1, g.columns * g.rows
        return g

    @property
    def group_size(self) -> int:
        return self.channels // self.groups

    def strides(self, views: list[View]) -> Iterator[int]:
        """All strides in use, in elements. Rows and channels start at multiples of their greatest common divisor."""
        for v in views:
            if self.rows > 1:
                yield v.outer
            if self.channels > 1 and self.bias != "columns":
                yield v.channel

    def block(self, tile: int) -> tuple[int, int]:
        """The widest tile that wastes few columns. Rows do not matter: batches of any size run the same code."""
        covered = {width: -(-self.columns // width) * width for width in (*NARROW, tile)}
        width = max(width for width in covered if covered[width] <= 1.0625 * min(covered.values()))
        return tile // width, width


@dataclass
class Parts:
    """The division of a group's work among programs. Each of the ``units`` has the same number of ``tiles``."""

    units: int
    tiles: int
    column_tiles: int
    unit_parts: int
    tile_parts: int

    @classmethod
    def of(
        cls, g: Geometry, block: tuple[int, int], tiles_each: int, enough_programs: int, most_programs: int | None
    ) -> Parts:
        row_tiles, column_tiles = -(-g.rows // block[0]), -(-g.columns // block[1])
        if g.bias == "columns":
            units, tiles = column_tiles, row_tiles
        else:
            units, tiles = g.group_size, row_tiles * column_tiles
        count = g.groups * units * tiles
        each = max(1, min(tiles_each, count // enough_programs))
        if most_programs is not None:
            each = max(each, -(-count // most_programs))
        tile_parts = -(-tiles // each)
        if most_programs is not None and g.bias is not None:
            tile_parts = min(tile_parts, max(1, MOST_BIAS_PARTIALS // g.channels))
        unit_parts = -(-units // max(1, each // tiles))
        return cls(units, tiles, column_tiles, unit_parts, tile_parts)

    @property
    def count(self) -> int:
        return self.unit_parts * self.tile_parts
