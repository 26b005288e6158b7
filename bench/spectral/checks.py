# SPDX-License-Identifier: Apache-2.0
"""Bars for sparse spectral training."""

from __future__ import annotations

from collections.abc import Iterator

from ..bars import Check, fastest, ours, ratio, select, time_over
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
        value = ratio(fastest(select(rows, "eager".__eq__)), native.times_floor if native else None)
        yield Check("times faster than eager", case_of(rows[0]), value, TIMES_EAGER[op], at_least=True)


def cuda(run: Run, rows: list[Row]) -> Iterator[Check]:
    op, native = rows[0].op, ours(rows)
    if op == TRAIN and rows[0].dtype == "bfloat16":
        dense = select(rows, "full-rank".__eq__)
        limit = TIMES_FULL_RANK_GPU[int(rows[0].size.split("x")[0])]
        yield time_over("time over full-rank AdamW", case_of(rows[0]), native, dense, limit)
    if op == DECOMPOSE:
        value = ratio(fastest(select(rows, "eager".__eq__)), native.times_floor if native else None)
        yield Check("times faster than torch.linalg.svd", case_of(rows[0]), value, TIMES_SVD_GPU, at_least=True)
    if op == UPDATE:
        share = native.gbps / run.copy_gbps if native and native.gbps else None
        yield Check("share of copy bandwidth", case_of(rows[0]), share, SHARE_OF_COPY, at_least=True)
