# SPDX-License-Identifier: Apache-2.0
"""The launches of sparse spectral training, but for draws and swaps, which come once in hundreds of steps."""

from __future__ import annotations

from math import ceil

from singlepass.bench.registry import Case
from singlepass.bench.spectral.layers import LORENTZ, LORENTZ_BACKWARD, SCALE, UPDATE
from singlepass.triton_kernels._table import NUMEL

from ..paths import Step
from ..plan import Plan, Work, accesses, summed
from .plan import ITEMSIZE, plan
from .recorder import Launch


def update(case: Case, launches: list[Launch]) -> list[Plan]:
    """A program for each row, which is in registers from its first byte to its last, or for a stretch of singular
    values: no kernel has a loop. Lanes beyond the end of a row are masked, and take as long."""
    found: list[Plan] = []
    for launch in launches:
        a = launch.arguments
        assert not a["LONG"], "a row of the benchmark fits a tile"
        elements = sum(a["p_records"].view(a["p_tickets"].numel(), -1)[:, NUMEL.value].tolist())
        sizes, each = [ITEMSIZE[storage] for storage in a["STORAGES"]], a["BLOCK"] // launch.threads
        loads = [accesses("LDG", size, each) for size in sizes]
        stores = [accesses("STG", size, each) for i, size in enumerate(sizes) if i != 1]  # not the gradient
        work = Work((), {}, streamed="LDG.128", does=summed(*loads, *stores))
        moved = elements * (2 * sum(sizes) - sizes[1])
        found.append(plan(launch, "spectral", (work,), moved, "", 32 * each))
    return found


def scale(case: Case, launches: list[Launch]) -> list[Plan]:
    """Tiles of columns over stretches of rows, and the sums of those."""
    product, added = launches
    a, of_sums = product.arguments, added.arguments
    each = a["BLOCK_R"] * a["BLOCK_C"] // product.threads
    size, partials = case.dtype.itemsize, 4 * a["p_partials"].numel()
    does = summed(accesses("LDG", size, each, 2), accesses("STG", size, each))
    work = Work((Step("rows", does),), {"rows": ceil(a["rows"] / a["BLOCK_R"]) / of_sums["parts"]})
    loads = of_sums["BLOCK_P"] * of_sums["BLOCK_C"] // added.threads
    parts = {"parts": ceil(of_sums["parts"] / of_sums["BLOCK_P"])}
    sums = Work((Step("parts", (("LDG.32", loads),)),), parts, cached={"parts": 1.0})
    return [
        plan(product, "spectral", (work,), case.bytes + partials, "rows", 32 * each),
        plan(added, "spectral", (sums,), partials, "parts", 32 * loads),
    ]


def lorentz(case: Case, launches: list[Launch]) -> list[Plan]:
    """Rows in two sweeps, of which the second finds in a cache what registers do not hold: all but the first tile."""
    launch, size = launches[0], case.dtype.itemsize
    a = launch.arguments
    assert a["LONG"], "a row of the benchmark takes several tiles"
    backward = case.op == LORENTZ_BACKWARD
    each = a["BLOCK_R"] * a["BLOCK_C"] // launch.threads
    loads, store = accesses("LDG", size, each, 1 + backward), accesses("STG", size, each)
    sweeps = Step("sums", loads, avoids=(store[0][0],)), Step("result", summed(loads, store))
    left = ceil(a["columns"] / a["BLOCK_C"]) - 1
    times = {"rows": ceil(a["rows"] / a["BLOCK_R"]) / launch.grid[0], "sums": left, "result": left}
    steps = (Step("rows", inside=sweeps),) if backward else sweeps
    work = Work(steps, times, cached={"result": 1.0}, streamed="LDG.128")
    found: list[Plan] = [plan(launch, "spectral", (work,), case.bytes, "sums", 32 * each)]
    for added in launches[1:]:
        of_sums = added.arguments
        numbers = of_sums["BLOCK"] // added.threads
        passes = {"partials": ceil(of_sums["count"] / of_sums["BLOCK"])}
        add = Work((Step("partials", (("LDG.64", numbers),)),), passes, cached={"partials": 1.0})
        found.append(plan(added, "spectral", (add,), 8 * of_sums["count"], "partials", 32 * numbers))
    return found


PLANS = {UPDATE: update, SCALE: scale, LORENTZ: lorentz, LORENTZ_BACKWARD: lorentz}
