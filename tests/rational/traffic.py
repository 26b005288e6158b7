# SPDX-License-Identifier: Apache-2.0
"""Calls of this family's ops whose traffic is counted (tests/counting)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from singlepass._ops import rational as ops

from ..counting.traffic_row import BF16, FP32, NAMES, Place, Row, beside, misaligned
from ..samples import Sample


def activation(backward: bool, dtype: torch.dtype, fused: bool, planes: bool, place: Place) -> Sample:
    shape = (4, 64, 28, 28) if planes else (256, 768)
    x, gate, grad = (place(torch.randn(shape).to(dtype)) for _ in range(3))
    tables = torch.randn(1, 6), torch.randn(8, 4), torch.randn(shape[1]) if fused else None
    options = {"form": 0, "channel_dim": 1, "dropout": 0.1 if fused else 0.0, "seed": torch.tensor([5])}
    arguments = (x, *tables, gate if fused else None)
    if backward:
        return Sample(ops.rational_backward, (grad, *arguments), options)
    return Sample(ops.rational, arguments, options)


def rows() -> Iterator[Row]:
    forms = [*product((FP32, BF16), (False, True), (False, True), (torch.clone,)), (BF16, False, False, misaligned)]
    for backward, (dtype, fused, planes, place) in product((False, True), forms):
        more = {"fused": fused, "planes": planes, "misaligned": place is misaligned}
        layout = ", ".join([NAMES[dtype], *(name for name, is_so in more.items() if is_so)])
        # Of the first launch for the second, in float64: 10 sums of 8 groups from each of 64 channels, or from 8
        # stretches of rows, 24 where lanes take an element each; and a sum for each channel.
        stretches = 24 if place is misaligned else 8
        sums = 64 * (10 + fused) if planes else stretches * (8 * 10 + 768 * fused)
        yield Row(
            ops.rational_backward if backward else ops.rational,
            layout,
            partial(activation, backward, dtype, fused, planes, place),
            launches=1 + backward,
            workspace=2 * 8 * sums * backward,
            sectors=beside(dtype, place),
        )
