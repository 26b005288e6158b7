# SPDX-License-Identifier: Apache-2.0
"""The launches of optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch

from singlepass.bench.optim import models
from singlepass.bench.optim.cases import RULES, Rule
from singlepass.bench.registry import Case

from .gpus import Gpu
from .paths import Step
from .plan import IN_FLIGHT, PARTIALS, Marks, Plan, Tail, Work, accesses, summed

GRAD_NORM = "grad_norm_kernel"
THREADS, CHUNK, VECTOR = 256, 16384, 8  # csrc/optim/device_table.h, csrc/common/raw.h
MODELS = {model.name: model for model in (models.GPT2_SMALL, models.MANY_SMALL, models.VIT_B16, models.TENSORS_300)}
RULE = {rule.name: rule for rule in RULES}
NAMES = {"AdamW": "AdamW<false>", "AdaBelief": "AdaBelief<false>", "SGDSaI": "SgdSaI", "LAMB": "Lamb", "LARS": "Lars"}
# Branches of the vectors' loop that bfloat16 rounded to the nearest does not take: float16, and Philox.
OTHERS = ("HADD2.F32", "0x37fff001", "-0x2daee0ad")


def spread(kind: str, own: int, states: int, dtype: torch.dtype) -> Marks:
    """Of so many spread vectors of that dtype and of float32: two accesses each, of four elements."""
    return summed(accesses(kind, dtype.itemsize, 4, 2 * own), accesses(kind, 4, 4, 2 * states))


def vectors(reads: str, updates: str, dtype: torch.dtype) -> Step:
    """The loop over vectors of eight elements: two accesses each, or one of 16-bit elements without states. bfloat16 is
    decoded by masks, four to a vector, and encoded by adding 0x7fff."""
    small = "pgh" if dtype == torch.bfloat16 else ""
    does: list[tuple[str, int]] = []
    for kind, part in (("LDG", reads + updates), ("STG", updates)):
        own = sum(letter in small for letter in part)
        if set(reads + updates) <= set(small):
            does.append((f"{kind}.128", own))
        else:
            does += spread(kind, own, len(part) - own, dtype)
    if small:
        encoded = sum(letter in small for letter in updates)
        decoded = sum(letter in small for letter in reads + updates)
        does += [("0x7fff", VECTOR * encoded), ("0xffff0000+", VECTOR // 2 * (encoded + decoded))]
    return Step("vectors", tuple(does), OTHERS if small else ())


def kernels(rule: Rule, dtype: torch.dtype) -> list[tuple[str, str]]:
    """The source and the kernel of each pass of a rule."""
    name, only_float32 = NAMES.get(rule.name, rule.name), str(dtype == torch.float32).lower()
    update, norm = (("optim/optim", f"step_kernel<{name}, (Pass){n}, {only_float32}>") for n in (1, 0))
    return [[update], [norm, update], [("optim/grad_norm", GRAD_NORM), norm, update]][len(rule.passes) - 1]


def plans(case: Case, _: Gpu) -> list[Plan]:
    """One launch for each pass over memory, on a block for each chunk of a tensor."""
    rule, model = RULE[case.op], MODELS[case.size]
    blocks = sum(-(-torch.Size(shape).numel() // CHUNK) for shape in model.shapes)
    times = {"vectors": model.elements / (blocks * THREADS * VECTOR)}
    found = []
    for (source, kernel), (reads, updates), moved in zip(
        kernels(rule, case.dtype), rule.passes, case.passes, strict=True
    ):
        work = Work((vectors(reads, updates, case.dtype),), times)
        # The norm of all gradients: the last block adds up what the others have left. A tensor's own is left out.
        passes = {"partials": ceil(blocks / (IN_FLIGHT * THREADS))}
        last = Tail(replace(work, steps=(*work.steps, PARTIALS), times=times | passes), work, 1 / blocks)
        tail = last if kernel == GRAD_NORM else None
        found.append(Plan(source, kernel, (work,), moved.bytes, blocks, THREADS, "vectors", 32 * VECTOR, tail=tail))
    return found
