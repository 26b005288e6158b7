# SPDX-License-Identifier: Apache-2.0
"""Where training stands: rounds of iterations of steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

WARMUPS = ("linear", "cosine")


@dataclass
class Progress:
    """Counts what is finished. ``draws`` counts all iterations begun, and numbers their random draws."""

    round: int = 0
    iteration: int = 0  # of the round
    step: int = 0  # of the iteration
    draws: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def warmup_factor(step: int, steps: int, shape: str) -> float:
    """What multiplies the learning rate of step ``step``, counted from 0, of an iteration; 1 from ``steps`` - 1 on."""
    if step + 1 >= steps:
        return 1.0
    part = (step + 1) / steps
    return part if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * part)
