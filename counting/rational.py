# SPDX-License-Identifier: Apache-2.0
"""The launches of rational activations, form A with degrees (5, 4) and channels last."""

from __future__ import annotations

import torch

from singlepass.bench.rational.activations import ACTIVATIONS, BACKWARD, GROUPS
from singlepass.bench.registry import Case, Pass

from .gpus import Gpu
from .paths import Step
from .plan import Plan, Work

VECTOR, SUMS = 8, 11  # SUMS: of coefficients' gradients, by group
THREADS, FORWARD_ITEMS, BACKWARD_ITEMS, BLOCKS, PARTIAL_BYTES = 256, 4, 16, 2112, 1 << 20  # LaunchShape
ACTIVATION = {activation.name: activation for activation in ACTIVATIONS["cuda"]}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def plans(case: Case, _: Gpu) -> list[Plan]:
    """What csrc/rational/grid.h makes of x: tiles of whole groups of channels, and splits of the rows."""
    channels = ACTIVATION[case.size].shape[-1]
    items, group_vectors = case.elements // channels, channels // GROUPS // VECTOR
    least_tiles = -(-GROUPS * group_vectors // THREADS)
    tile_groups = min(-(-GROUPS // least_tiles), THREADS // group_vectors)
    tiles, columns = -(-GROUPS // tile_groups), tile_groups * group_vectors
    rows = THREADS // columns
    threads = -(-columns * rows // 32) * 32
    width = 1 if case.dtype.itemsize == 2 else 2  # accesses of a vector

    def main(kernel: str, loads: int, splits: int, moved: Pass) -> Plan:
        name = f"{kernel}_kernel<Variant<(Form)0, 5, 4, 8, {DTYPES[case.dtype]}, false> >"
        step = Step("items", (("LDG.128", loads * width), ("STG.128", width)))
        work = (Work((step,), {"items": items / (splits * rows)}),)
        return Plan("rational/rational", name, work, moved.bytes, tiles * splits, threads, "items", 32 * VECTOR)

    def useful(least: int) -> int:
        return min(-(-items // (rows * least)), -(-BLOCKS // tiles))

    found = [main("forward", 1, useful(FORWARD_ITEMS), case.passes[0])]
    if case.op == BACKWARD:
        splits = min(useful(BACKWARD_ITEMS), PARTIAL_BYTES // (8 * GROUPS * SUMS))
        found += [main("backward", 2, splits, case.passes[1]), reduction(splits)]
    return found


def reduction(splits: int) -> Plan:
    """A block for each coefficient: one numerator for all groups, whose six blocks have the most to add, and a
    denominator for each."""
    shared, own = SUMS - 5, 4 * GROUPS
    step = Step("partials", (("LDG.128", 1),))
    work = tuple(
        Work((step,), {"partials": splits * groups / (2 * THREADS)}, count / (shared + own), cached={"partials": 1.0})
        for count, groups in ((shared, GROUPS), (own, 1))
    )
    read = 8 * splits * GROUPS * SUMS
    return Plan("rational/rational", "reduce_kernel", work, read, shared + own, THREADS, "partials", 2 * 32)
