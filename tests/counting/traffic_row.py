# SPDX-License-Identifier: Apache-2.0
"""A call of an op whose traffic is counted, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from counting import traffic
from singlepass._ops import Op

from ..samples import Sample

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = {FP32: "float32", BF16: "bfloat16"}

BYTES, REPEATS, SECTORS, WAVEFRONTS, WORKSPACE = MEASURES = (
    "bytes over the floor",  # of sectors, each once per launch
    "requests for a byte",  # by warps, in a launch
    "sectors over the fewest",  # that hold what requests ask for
    "wavefronts over the fewest",
    "bytes of workspace",  # of sectors, read and written
)
SLACK = 4096  # bytes: scalars, small tables, and the ends of tensors
SMALL = 0.01  # share of all bytes up to which a tensor stays in a cache, however often it is asked for


@dataclass(frozen=True)
class Row:
    """A call, and what it may cost: ``launches``, ``workspace`` in bytes, and ``sectors`` over the fewest, more than 1
    where tensors are not aligned. ``read`` and ``written`` are the shares of tensors that it needs, where these are not
    what the schema says: all of arguments is read, all of results and of what changes in place is written."""

    op: Op
    layout: str
    make: Callable[[], Sample]
    launches: int = 1
    workspace: int = 0
    sectors: float = 1.0
    read: Mapping[str, float] = field(default_factory=dict)
    written: Mapping[str, float] = field(default_factory=dict)
    warm: bool = False  # counts the second call, which finds the table of its tensors made
    deep: bool = False

    def __str__(self) -> str:
        return f"{self.op.name}: {self.layout}"

    def judged(self, counted: traffic.Traffic, tensors: traffic.Tensors) -> dict[str, tuple[float, float]]:
        """Counts with their budgets, by MEASURES."""
        both = [*counted.loads.items(), *counted.stores.items()]
        named = [c for name, c in both if name != traffic.WORKSPACE]
        unique, floor = sum(c.unique for c in named), traffic.floor(self.op, tensors, self.read, self.written)
        large = [c for c in named if c.unique > SMALL * unique]
        fewest, distinct = sum(c.ideal for c in large), sum(c.unique for c in large)
        workspace = sum(c.unique for name, c in both if name == traffic.WORKSPACE)
        return {
            BYTES: (unique / floor, 1.01 + SLACK / floor),
            REPEATS: (fewest * traffic.SECTOR / distinct, 1.01),
            SECTORS: (sum(c.sectors for c in large) / fewest, 1.01 * self.sectors),
            WAVEFRONTS: (counted.wavefronts / max(counted.ideal_wavefronts, 1), 1.2),
            WORKSPACE: (workspace, self.workspace + SLACK),
        }


Place = Callable[[Tensor], Tensor]


def misaligned(t: Tensor) -> Tensor:
    """The same values, one element past an aligned address."""
    memory = t.new_empty(t.numel() + 1)
    return memory[1:].view(t.shape).copy_(t)


def beside(dtype: torch.dtype, place: Place) -> float:
    """Sectors over the fewest where lanes take an element each: a misaligned request needs one more."""
    fewest = 32 * dtype.itemsize // traffic.SECTOR
    return (fewest + 1) / fewest if place is misaligned else 1.0
