# SPDX-License-Identifier: Apache-2.0
"""Where training stands: rounds of iterations of steps."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from numbers import Integral

from .._errors import require

PROGRESS = "sst_progress"  # the key of groups that tells where training stands
SAMPLINGS = {"mixed": 0.5, "singular_values": 0.0, "uniform": 1.0}
WARMUPS = ("linear", "cosine")


@dataclass
class Progress:
    """Counts what is finished. ``draws`` counts all iterations begun, and numbers their random draws."""

    round: int = 0
    iteration: int = 0  # of the round
    step: int = 0  # of the iteration
    draws: int = 0

    def as_tuple(self) -> tuple[int, ...]:
        return astuple(self)


def warmup_factor(step: int, steps: int, shape: str) -> float:
    """What multiplies the learning rate of step ``step``, counted from 0, of an iteration; 1 from ``steps`` - 1 on."""
    if step + 1 >= steps:
        return 1.0
    part = (step + 1) / steps
    return part if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * part)


def check_schedule(
    steps_per_iteration: int, iterations_per_round: int | None, warmup_steps: int, warmup_shape: str, sampling: str
) -> None:
    """Raises ValueError for lengths that are no counts, and for names that are not known."""
    counts = {"steps_per_iteration": steps_per_iteration, "iterations_per_round": iterations_per_round}
    for name, count in (*counts.items(), ("warmup_steps", warmup_steps)):
        least = 0 if name == "warmup_steps" else 1
        optional = count is None and name == "iterations_per_round"
        fits = optional or (isinstance(count, Integral) and count >= least)
        require(fits, "SST", f"{name} of at least {least}", repr(count), "Pass an int.")
    for name, value, known in (("sampling", sampling, SAMPLINGS), ("warmup_shape", warmup_shape, WARMUPS)):
        require(value in known, "SST", f"{name} among {', '.join(known)}", repr(value), "Choose one of them.")
