# SPDX-License-Identifier: Apache-2.0
"""The launches of optimizer steps: a program for each chunk of a tensor, tile by tile."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import ceil

import torch

import singlepass.optim
from singlepass.bench.registry import Case
from singlepass.triton_kernels._table import CHUNK

from ..optim import MODELS, RULE
from ..paths import Step
from ..plan import Plan, Tail, Work, accesses, summed
from .plan import ITEMSIZE, alone, plan
from .recorder import TABLE, Launch, recording


@cache
def launches(name: str, dtype: torch.dtype) -> list[Launch]:
    """Those of a step of the class, as the benchmark has it, but for the table of its tensors, which is kept. The code
    does not depend on shapes."""
    p = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    p.grad = torch.ones_like(p)
    with recording() as recorded:
        getattr(singlepass.optim, name)([p], **RULE[name].arguments, backend="triton").step()
    return [launch for launch in recorded if launch.kernel.__name__ != TABLE]


def plans(case: Case) -> list[Plan]:
    """One for each pass over memory; a program takes full tiles of its chunk, and what is left of the last."""
    model, recorded = MODELS[case.size], launches(case.op, case.dtype)
    sizes = [torch.Size(shape).numel() for shape in model.shapes]
    blocks = sum(ceil(size / CHUNK) for size in sizes)
    found: list[Plan] = []
    for launch, moved in zip(recorded, case.passes, strict=True):
        block = launch.arguments["BLOCK"]
        times = {
            "tiles": sum(size // block for size in sizes) / blocks,
            "rest": sum(size % block > 0 for size in sizes) / blocks,
        }
        each = block // launch.threads
        work = Work(loops(launch, each), times)
        tail = None
        if launch.kernel.__name__ == "grad_norm_kernel":
            # The last program adds up what the others have left. The norms of a tensor are left out.
            partials = Step("partials", (("LDG.64", each), ("DADD", each), ("F2F.64", 0)))
            last = replace(work, steps=(*work.steps, partials), times=times | {"partials": ceil(blocks / block)})
            tail = Tail(last, work, 1 / blocks)
        found.append(plan(launch, "optim", (work,), moved.bytes, "tiles", 32 * each, blocks, tail=tail))
    return found


def loops(launch: Launch, each: int) -> tuple[Step, Step]:
    """Over full tiles, whose accesses are vectors, and over what is left, element by element; so many of a tile are
    each thread's. A pass that takes norms adds up squares in float64: two for each element, or of gradients one."""
    arguments = launch.arguments
    if "STORAGE" in arguments:
        reads, writes, squares = [ITEMSIZE[arguments["STORAGE"]]], [], each
    else:
        storages = [ITEMSIZE[storage] for storage in arguments["STORAGES"]]
        reads, writes = (
            [size for size, touched in zip(storages, arguments[name], strict=True) if touched]
            for name in ("READS", "WRITES")
        )
        squares = 2 * each if arguments["IS_NORM_PASS"] else 0
    steps = []
    for name, way in (("tiles", accesses), ("rest", alone)):
        loaded, stored = ([way(kind, size, each) for size in of] for kind, of in (("LDG", reads), ("STG", writes)))
        steps.append(Step(name, (*summed(*loaded, *stored), ("F2F.64", squares))))
    return steps[0], steps[1]
