# SPDX-License-Identifier: Apache-2.0
"""The launches of rational activations: a program for a part of a group's tiles."""

from __future__ import annotations

from math import ceil

from singlepass.bench.rational.activations import BACKWARD, FORWARD, GROUPS
from singlepass.bench.registry import Case

from ..paths import Step
from ..plan import Plan, Work, accesses, summed
from .plan import ITEMSIZE, plan
from .recorder import Launch


def plans(case: Case, launches: list[Launch]) -> list[Plan]:
    """Those over tiles, one for each pass over memory; backward leaves partial sums, which a third one adds up."""
    passes = launches[: len(case.passes)]
    found = [tiles(launch, moved.bytes) for launch, moved in zip(passes, case.passes, strict=True)]
    return found + [sum_up(launch) for launch in launches[len(passes) :]]


def partials(launch: Launch) -> int:
    """Bytes of partial sums."""
    return int(launch.arguments["p_partials"].nbytes) if "p_partials" in launch.arguments else 0


def tiles(launch: Launch, moved: float) -> Plan:
    """Forward reads x, backward the gradient, too."""
    a = launch.arguments
    backward = "a_grad" in a
    each, size = a["BLOCK_R"] * a["BLOCK_C"] // launch.threads, ITEMSIZE[a["STORAGE"]]
    does = summed(accesses("LDG", size, each, 1 + backward), accesses("STG", size, each))
    times = {"units": a["units"] / a["unit_parts"], "tiles": a["tiles"] / a["tile_parts"]}
    work = Work((Step("units", inside=(Step("tiles", does),)),), times)
    return plan(launch, "rational", (work,), moved + partials(launch), "tiles", 32 * each)


def sum_up(launch: Launch) -> Plan:
    """A program for each coefficient: that of a numerator, which all groups share, has the most to add."""
    a = launch.arguments
    each = a["BLOCK"] // launch.threads
    shared, own = a["COUNT_A"], a["COUNT_B"] * GROUPS
    step = Step("partials", (("LDG.32", each), ("DADD", each)))
    work = tuple(
        Work((step,), {"partials": ceil(groups * a["parts"] / a["BLOCK"])}, n / (shared + own), {"partials": 1.0})
        for n, groups in ((shared, GROUPS), (own, 1))
    )
    return plan(launch, "rational", work, partials(launch), "partials", 32 * each)


PLANS = {FORWARD: plans, BACKWARD: plans}
