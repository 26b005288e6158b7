# SPDX-License-Identifier: Apache-2.0
"""Into how many splits the launcher of decode attention cuts the slots of a head, as csrc/kv/decode_cut.h does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

UNIT, START, MERGE = 128, 500, 6  # DecodeCut
RESTORED = 60  # costs of a slot whose codes are first decompressed to shared memory
TAIL, MOST = 0.25, 512  # kTail, kMostSplits


@dataclass(frozen=True)
class Stretch:
    """Slots that are cut by themselves. cost: of a slot."""

    slots: int
    cost: int

    @property
    def units(self) -> int:
        return -(-self.slots // UNIT)

    def longest(self, splits: int) -> int:
        """What the longest of so many splits costs."""
        return -(-self.units // splits) * UNIT * self.cost if splits else 0


def window(slots: int, itemsize: int) -> Stretch:
    """Of tokens that are not compressed."""
    return Stretch(slots, 8 * itemsize)


def splits(stretches: Sequence[Stretch], columns: int, places: int) -> tuple[int, ...]:
    """Of each stretch, where a GPU with so many places for thread blocks takes `columns` blocks for each split."""
    own = [int(s.slots > 0) for s in stretches]
    lengths = [s.longest(n) for s, n in zip(stretches, own, strict=True)]
    work, least, taken = sum(lengths), inf, tuple(own)
    for every in range(sum(own), MOST + 1):
        shorter = [i for i, s in enumerate(stretches) if own[i] < s.units]
        waves = ceil(every * columns / places)
        added = waves * START + every * MERGE
        cost = added + waves * work / every + TAIL * max(lengths)
        if cost < least:
            least, taken = cost, tuple(own)
        if added + work * columns / places >= least or not shorter:
            break
        i = max(shorter, key=lambda i: lengths[i])
        own[i] += 1
        lengths[i] = stretches[i].longest(own[i])
    return taken
