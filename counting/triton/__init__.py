# SPDX-License-Identifier: Apache-2.0
"""The launches of Triton's kernels, which run where no CUDA library is built."""

from __future__ import annotations

from collections.abc import Callable

from singlepass.bench.registry import Case

from ..calls import calls
from ..plan import Plan
from . import kv, optim, rational, spectral
from .recorder import TABLE, Launch, recording

PLANS: dict[str, Callable[[Case, list[Launch]], list[Plan]]] = {**rational.PLANS, **kv.PLANS, **spectral.PLANS}


def predicts(case: Case) -> bool:
    """Whether its launches are known here."""
    return case.family == "optim" or case.op in PLANS


def plans(case: Case) -> list[Plan]:
    """The launches of a case, one after the other: the same on every GPU, as no launcher looks at the GPU."""
    if case.family == "optim":
        return optim.plans(case)
    with recording() as launches:
        for call in calls(case):
            call.on(call.op.on("triton"))
    return PLANS[case.op](case, [launch for launch in launches if launch.kernel.__name__ != TABLE])
