# SPDX-License-Identifier: Apache-2.0
"""The launches of sparse spectral training, but for draws and swaps, which come once in hundreds of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch

from singlepass.bench.registry import Case
from singlepass.bench.spectral.layers import (
    LORENTZ,
    LORENTZ_BACKWARD,
    MODEL,
    RANK,
    SCALE,
    SHAPES,
    UPDATE,
    LayerShape,
)

from .gpus import Gpu
from .optim import OTHERS, spread
from .paths import Step
from .plan import IN_FLIGHT, PARTIALS, Plan, Work

THREADS, VECTOR = 256, 8
STEP_THREADS, STEP_CHUNK, STATES = 128, 4096, 2  # csrc/spectral/step.h
COLUMNS, LEAST_ROWS, SCALE_BLOCKS = 32, 32, 1024  # csrc/spectral/scale.cu, problem.h
LORENTZ_ROWS, HELD = 16, 16  # csrc/spectral/lorentz.h, lorentz.cu
SHAPE = {shape.name: shape for shape in SHAPES["cuda"]}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def plans(case: Case, _: Gpu) -> list[Plan]:
    of_layer: dict[str, Callable[[Case, LayerShape], list[Plan]]]
    of_layer = {SCALE: scale, LORENTZ: lorentz, LORENTZ_BACKWARD: lorentz}
    if case.op == UPDATE:
        return update(case)
    return of_layer[case.op](case, SHAPE[case.size]) if case.op in of_layer else []


def update(case: Case) -> list[Plan]:
    """Vectors of all layers, then singular values."""
    values = [min(m, n) for m, n in MODEL]
    vectors = [(round(RANK * k), columns) for k, layer in zip(values, MODEL, strict=True) for columns in layer]
    count = sum(rows * columns for rows, columns in vectors) + sum(values)
    of_element = case.bytes / count
    return [unit_vectors(vectors, case.dtype, of_element), not_negative(values, case.dtype, of_element)]


def step_kernel(dtype: torch.dtype) -> str:
    return f"unit_step_kernel<{str(dtype == torch.float32).lower()}, false>"  # which rounds to the nearest


def updating(name: str, dtype: torch.dtype, stores: int, holds: int) -> Step:
    """A loop over vectors that computes new elements and writes states; so many vectors of parameters, too, and so many
    accesses to shared memory."""
    does = *spread("LDG", 2, STATES, dtype), *spread("STG", stores, STATES, dtype), ("STS.128", holds)
    return converting(Step(name, does), dtype, decoded=2, encoded=stores)


def converting(step: Step, dtype: torch.dtype, decoded: int, encoded: int) -> Step:
    """The same with so many vectors that are decoded and encoded, if the dtype is bfloat16."""
    if dtype == torch.float32:
        return step
    masks = VECTOR // 2 * (decoded + encoded) if decoded else 0
    return replace(step, does=(*step.does, ("0x7fff", VECTOR * encoded), ("0xffff0000+", masks)), avoids=OTHERS)


def unit_vectors(tensors: list[tuple[int, int]], dtype: torch.dtype, of_element: float) -> Plan:
    """A block takes a few whole rows. Threads that a row has no vector for do nothing."""
    update = updating("update", dtype, stores=0, holds=2)
    unit = Step("unit", (("LDS.128", 2), *spread("STG", 1, 0, dtype)))
    unit = converting(unit, dtype, decoded=0, encoded=1)
    steps = (Step("rows", inside=(update, unit)),)
    longest = max(columns for _, columns in tensors)
    work: list[Work] = []
    blocks = sum(ceil(rows / max(1, STEP_CHUNK // columns)) for rows, columns in tensors)
    for columns in sorted({columns for _, columns in tensors}, reverse=True):
        rows = [rows for rows, c in tensors if c == columns]
        own_blocks = sum(ceil(r / max(1, STEP_CHUNK // columns)) for r in rows)
        busy = min(1.0, columns / VECTOR / STEP_THREADS)
        passes = columns / VECTOR / STEP_THREADS / busy
        times = {"rows": sum(rows) / own_blocks, "update": passes, "unit": passes}
        share = own_blocks / blocks
        work.append(Work(steps, times, share * busy))
        if busy < 1.0:
            work.append(Work(steps, times | {"update": 0.0, "unit": 0.0}, share * (1.0 - busy)))
    moved = of_element * sum(rows * columns for rows, columns in tensors)
    kernel, shared = step_kernel(dtype), 4 * longest
    return Plan("spectral/step", kernel, tuple(work), moved, blocks, STEP_THREADS, "update", 32 * VECTOR, shared)


def not_negative(values: list[int], dtype: torch.dtype, of_element: float) -> Plan:
    step = updating("values", dtype, stores=1, holds=0)
    work = Work((step,), {"values": values[0] / VECTOR / STEP_THREADS})
    moved = of_element * sum(values)
    return Plan("spectral/step", step_kernel(dtype), (work,), moved, len(values), STEP_THREADS, "values", 32 * VECTOR)


def scale(case: Case, shape: LayerShape) -> list[Plan]:
    """Tiles of columns over stretches of rows, and the sums of those."""
    batch, rows_of_threads = 8 // case.dtype.itemsize, THREADS // COLUMNS
    tiles = ceil(shape.width / (COLUMNS * VECTOR))
    rows = max(LEAST_ROWS, ceil(shape.tokens / (SCALE_BLOCKS // tiles)))
    parts = ceil(shape.tokens / rows)
    step = Step("rows", (("LDG.128", 8), ("STG.128", 4)))
    work = Work((step,), {"rows": rows / rows_of_threads / batch})
    kernel = f"scale_kernel<Variant<{DTYPES[case.dtype]}> >"
    sums = Work((Step("parts", (("LDG.64", 1),)),), {"parts": parts / rows_of_threads}, cached={"parts": 1.0})
    return [
        Plan(
            "spectral/scale", kernel, (work,), case.bytes, tiles * parts, THREADS, "rows", 32 * VECTOR * batch
        ),
        Plan(
            "spectral/scale", "reduce_kernel", (sums,), 8 * parts * shape.width, ceil(shape.width / COLUMNS), THREADS,
            "parts", 32,
        ),
    ]  # fmt: skip


def lorentz(case: Case, shape: LayerShape) -> list[Plan]:
    """A warp for each row, in two sweeps, of which the second finds in a cache what registers do not hold."""
    backward = case.op == LORENTZ_BACKWARD
    access = VECTOR * case.dtype.itemsize // 16
    loads = access * (1 + backward)
    sums = Step("sums", (("LDG.128", loads), ("STG.128", 0)))
    result = Step("result", (("LDG.128", loads), ("STG.128", access)))
    left = (shape.width / 32 - HELD) / VECTOR
    times = {"rows": LORENTZ_ROWS / (THREADS / 32), "sums": left, "result": left}
    work = Work((Step("rows", inside=(sums, result)),), times, cached={"result": 1.0})
    blocks = ceil(shape.tokens / LORENTZ_ROWS)
    kernel = f"lorentz_kernel<Variant<{DTYPES[case.dtype]}>, {str(backward).lower()}>"
    found = [Plan("spectral/lorentz", kernel, (work,), case.bytes, blocks, THREADS, "sums", 32 * VECTOR)]
    if backward:
        add = Work((PARTIALS,), {"partials": ceil(blocks / IN_FLIGHT / THREADS)}, cached={"partials": 1.0})
        found.append(
            Plan("spectral/lorentz", "add_partials_kernel", (add,), 8 * blocks, 1, THREADS, "partials", 32 * IN_FLIGHT)
        )
    return found
