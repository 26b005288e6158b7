# SPDX-License-Identifier: Apache-2.0
"""Bars for sparse spectral training."""

from __future__ import annotations

from collections.abc import Iterator

from ..bars import Check, ours, select, share_of_copy, time_over, times_faster
from ..results import Row, Run
from .layers import DECOMPOSE, TITLES, TRAIN, UPDATE

# CPU
TIMES_PRODUCTS = 1.1
TIMES_EAGER = {TRAIN: 1.0, UPDATE: 5.0}
# GPU: what the floating-point operations allow, and 5%.
TIMES_FULL_RANK_GPU = {2048: 1.24, 4096: 1.42}
SHARE_OF_COPY = 0.8
TIMES_SVD_GPU = 5.0


def case_of(row: Row) -> str:
    return f"{TITLES[row.op]}, {row.size} {row.dtype}"


def cpu(run: Run, rows: list[Row]) -> Iterator[Check]:
    op, native = rows[0].op, ours(rows)
    if op == TRAIN:
        products = select(rows, "products".__eq__)
        yield time_over("time over its products alone", case_of(rows[0]), native, products, TIMES_PRODUCTS)
    if op in TIMES_EAGER:
        eager = select(rows, "eager".__eq__)
        yield times_faster("times faster than eager", case_of(rows[0]), native, eager, TIMES_EAGER[op])


def cuda(run: Run, rows: list[Row]) -> Iterator[Check]:
    op, native = rows[0].op, ours(rows)
    if op == TRAIN and rows[0].dtype == "bfloat16":
        dense = select(rows, "full-rank".__eq__)
        limit = TIMES_FULL_RANK_GPU[int(rows[0].size.split("x")[0])]
        yield time_over("time over full-rank AdamW", case_of(rows[0]), native, dense, limit)
    if op == DECOMPOSE:
        eager = select(rows, "eager".__eq__)
        yield times_faster("times faster than torch.linalg.svd", case_of(rows[0]), native, eager, TIMES_SVD_GPU)
    if op == UPDATE:
        yield share_of_copy(case_of(rows[0]), native.gbps if native else None, run, SHARE_OF_COPY)
