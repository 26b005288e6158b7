# SPDX-License-Identifier: Apache-2.0
"""Bars for the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..bars import Check, ours, ratio, share_of_copy, time_over, times_faster
from ..results import Row, Run
from .caches import DECODE, FIRST_TOKEN, LOW_RANK, LOW_RANK_CODES, NEXT_TOKEN, PROJECT, QUANTIZE, TITLES

# CPU. Short caches are those that a processor holds.
TIMES_DENSE = {True: 3.33, False: 1.0}
TIMES_DENSE_LOW_RANK = {LOW_RANK: 1.7, LOW_RANK_CODES: 5.0}  # of long caches
TIMES_DENSE_INTEL = TIMES_DENSE_LOW_RANK | {LOW_RANK_CODES: 4.0}  # whose bfloat16 is fast
SHARE_OF_PROJECTION = 0.1  # projecting and appending a token, over attention to that many
PROJECTION_LENGTH = 4096
LONG = 32768
TIMES_QUANTIZED_CACHE = 10.0
# A whole model, over the same with an uncompressed cache, by the tokens of the prompt.
TIME_OVER_DENSE = {(FIRST_TOKEN, 7000): 1.1, (NEXT_TOKEN, 1024): 1.0, (NEXT_TOKEN, 7000): 0.85}
TIMES_COPY = 3.0
# GPU
SHARE_OF_COPY = 0.75
TIMES_DENSE_GPU = 3.0


def case_of(row: Row) -> str:
    return f"{TITLES[row.op]}, {row.size} {row.dtype}"


def length_of(row: Row) -> int:
    return int(row.size.split("x")[1])


def faster_than(column: str, bar: str, rows: list[Row], limit: float) -> Check:
    rivals = [row for row in rows if row.column == column]
    return times_faster(bar, case_of(rows[0]), ours(rows), rivals, limit)


faster_than_dense = partial(faster_than, "yardstick", "times faster than the best dense decode")


def cpu(run: Run, rows: list[Row]) -> Iterator[Check]:
    if rows[0].op == DECODE:
        limit = TIMES_DENSE[length_of(rows[0]) >= LONG]
        yield faster_than_dense(rows, limit)
        yield faster_than("peer", "times faster than QuantizedCache", rows, TIMES_QUANTIZED_CACHE)
    elif rows[0].op in TIMES_DENSE_LOW_RANK and length_of(rows[0]) >= LONG:
        limits = TIMES_DENSE_INTEL if "Intel" in run.device_line else TIMES_DENSE_LOW_RANK
        limit = limits[rows[0].op]
        yield faster_than_dense(rows, limit)
    elif rows[0].op == PROJECT and length_of(rows[0]) == PROJECTION_LENGTH:
        attention = ours(run.find(family="kv", op=LOW_RANK, size=rows[0].size, dtype=rows[0].dtype))
        native = ours(rows)
        share = ratio(native.median if native else None, attention.median if attention else None)
        yield Check("share of the attention", case_of(rows[0]), share, SHARE_OF_PROJECTION)
    elif (rows[0].op, length_of(rows[0])) in TIME_OVER_DENSE:
        limit = TIME_OVER_DENSE[rows[0].op, length_of(rows[0])]
        dense = [row for row in rows if row.column == "yardstick"]
        yield time_over("time over an uncompressed cache", case_of(rows[0]), ours(rows), dense, limit)
    elif rows[0].op == QUANTIZE:
        copies = [row for row in rows if row.column == "yardstick"]
        yield time_over("time over a copy of the tokens", case_of(rows[0]), ours(rows), copies, TIMES_COPY)


def cuda(run: Run, rows: list[Row]) -> Iterator[Check]:
    if rows[0].op != DECODE:
        return
    native = ours(rows)
    yield share_of_copy(case_of(rows[0]), native.gbps if native else None, run, SHARE_OF_COPY)
    if rows[0].size == f"8x{LONG}":
        yield faster_than_dense(rows, TIMES_DENSE_GPU)
