# SPDX-License-Identifier: Apache-2.0
"""Counts of the compiled kernels against their budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache

import pytest

pytest.importorskip("rich")

from counting import cubins, model
from counting.__main__ import nvcc_version
from counting.gpus import GPUS
from counting.paths import Path
from counting.plan import Compiled, Plan
from counting.roofline import resident
from singlepass.bench.registry import Case

from ..simt.build import cubin_folder
from . import budgets
from .budgets import ARCHS, BUDGETS, EXCEPTIONS, Budget

pytestmark = [
    pytest.mark.deep("reads cubins of all kernels, which that tier compiles"),
    pytest.mark.xdist_group("cubins"),
    pytest.mark.skipif(cubins.tool("cuobjdump") is None, reason="no cuobjdump, which Triton and the CUDA toolkit have"),
    pytest.mark.skipif(
        cubins.tool("nvcc") is None or nvcc_version() != budgets.NVCC,
        reason=f"budgets are of nvcc {budgets.NVCC}",
    ),
]
GPU_OF = {"sm_90": GPUS[0], "sm_80": GPUS[2]}
TOLERANCE = 0.01


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    cubin_folder()


@cache
def planned() -> dict[str, tuple[Case, list[Plan]]]:
    return {case.name: (case, plans) for case, plans in model.planned()}


def narrow(path: Path) -> int:
    return sum(i.op in ("LDG", "STG") and i.bits < 128 for i in path.code)


def divisions(path: Path) -> int:
    return sum(i.op == "I2F" and i.name.endswith(".RP") for i in path.code)


def counted(budget: Budget, case: Case, c: Compiled, gpu: str) -> dict[str, tuple[float, float]]:
    """Each measure with its budget."""
    launch = c.launch(GPU_OF[gpu])
    counts: dict[str, tuple[float, float]] = {
        budgets.REGISTERS: (c.kernel.registers, budget.registers),
        budgets.SPILLED: (c.kernel.local, 0),
        budgets.INSTRUCTIONS: (c.hot_count(lambda path: len(path.code)), budget.instructions),
        budgets.DOUBLES: (c.hot_count(lambda path: path.count("DADD", "DMUL", "DFMA")), budget.doubles),
        budgets.CONVERSIONS: (c.hot_count(lambda path: path.count("F2F.64")), budget.conversions),
        budgets.TENSOR: (32 * c.hot_count(lambda path: path.count("HMMA", "IMMA")), budget.tensor),
        budgets.NARROW: (narrow(c.hot.path), 0),
        budgets.DIVISIONS: (divisions(c.hot.path), 0),
        budgets.CALLS: (c.hot.path.calls, 0),
    }
    if budget.executed is not None:
        lanes = 32 * launch.warps * launch.blocks
        counts[budgets.EXECUTED] = (launch.warp.instructions * lanes / case.elements, budget.executed)
    return counts


def faults(subject: str, counts: Mapping[str, tuple[float, float]]) -> list[str]:
    """What is wrong with counts, which are given with their budgets, by measure: a sentence for each."""
    found = []
    for measure, (count, allowed) in counts.items():
        listed = [e for e in EXCEPTIONS if e.measure == measure and fnmatchcase(subject, e.subject)]
        if not listed and count > allowed:
            found.append(f"{subject}: expected at most {allowed:.4g} {measure}; got {count:.4g}. Mend the kernel.")
        elif listed and count <= allowed:
            found.append(f"{subject}: {measure} are down to {count:.4g}. Remove the exception.")
        elif listed and not math.isclose(count, listed[0].count, rel_tol=TOLERANCE):
            found.append(f"{subject}: expected {listed[0].count} {measure}, as excepted; got {count:.4g}.")
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.subject)
def test_a_kernel_keeps_its_budget(budget: Budget, arch: str) -> None:
    case, plans = planned()[budget.case]
    compiled = plans[budget.launch].compiled(arch)
    assert faults(f"{budget.subject} {arch}", counted(budget, case, compiled, arch)) == []
    launch = compiled.launch(GPU_OF[arch])
    assert resident(GPU_OF[arch], launch.warps, launch.registers, launch.shared) >= budget.blocks


def test_every_planned_kernel_has_a_budget() -> None:
    """By its name: sizes of one kernel share a budget."""
    names = {plans[n].kernel for case, plans in planned().values() for n in range(len(plans))}
    budgeted = {planned()[budget.case][1][budget.launch].kernel for budget in BUDGETS}
    assert names == budgeted


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_kernel_touches_local_memory(arch: str) -> None:
    touching = [
        kernel.plain_name
        for path in sorted(cubin_folder().glob(f"*.{arch}.cubin"))
        for kernel in cubins.read(path).values()
        if kernel.local or any(i.op in ("LDL", "STL") for i in kernel.code)
    ]
    assert touching == []


def test_exceptions_are_of_budgets() -> None:
    subjects = {f"{budget.subject} {arch}" for budget in BUDGETS for arch in ARCHS}
    assert [e for e in EXCEPTIONS if not any(fnmatchcase(subject, e.subject) for subject in subjects)] == []
