# SPDX-License-Identifier: Apache-2.0
"""Counts of the compiled kernels against their budgets."""

from __future__ import annotations

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
from .budgets import ARCHS, BUDGETS, Budget
from .exceptions import faults

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


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    cubin_folder()


@cache
def planned(arch: str) -> dict[str, tuple[Case, list[Plan]]]:
    return {case.name: (case, plans) for case, plans in model.planned(GPU_OF[arch])}


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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.subject)
def test_a_kernel_keeps_its_budget(budget: Budget, arch: str) -> None:
    case, plans = planned(arch)[budget.case]
    compiled = plans[budget.launch].compiled(arch)
    assert faults(f"{budget.subject} {arch}", counted(budget, case, compiled, arch)) == []
    launch = compiled.launch(GPU_OF[arch])
    assert resident(GPU_OF[arch], launch.warps, launch.registers, launch.shared) >= budget.blocks


def test_every_planned_kernel_has_a_budget() -> None:
    """By its name: sizes of one kernel share a budget."""
    cases = planned(ARCHS[0])
    names = {plan.kernel for _, plans in cases.values() for plan in plans}
    budgeted = {cases[budget.case][1][budget.launch].kernel for budget in BUDGETS}
    assert names == budgeted


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "most"), budgets.WINDOW_CHUNK.items())
def test_the_window_of_decode_keeps_its_budget(dtype: str, most: int, arch: str) -> None:
    _, (plan,) = planned(arch)[f"kv/kv_decode/8x32768/{dtype}"]
    (work,) = [work for work in plan.work if work.times.get("window")]
    chunk = plan.compiled(arch).way(work).loop("window").path
    assert sum(times * len(path.code) for _, times, path in chunk.passes(work.times)) <= most


def test_decode_has_few_variants() -> None:
    """Each is compiled for every architecture."""
    paths = list(cubin_folder().glob("kv_decode.*.cubin"))
    assert {len(cubins.resources([path])[cubins.OF_CUBINS]) for path in paths} == {6}
    assert sum(path.stat().st_size for path in paths) <= budgets.DECODE_BYTES


def test_no_kernel_has_local_memory() -> None:
    """Neither spilled registers nor arrays that are indexed at run time, on any architecture."""
    every = {path: cubins.resources([path])[cubins.OF_CUBINS] for path in cubin_folder().glob("*.cubin")}
    assert sum(map(len, every.values())) > 400
    assert {path.name: found for path, kernels in every.items() if (found := cubins.spilling({"": kernels}))} == {}
