# SPDX-License-Identifier: Apache-2.0
"""Bars for the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

from ..bars import Check, fastest, ours, ratio, time_over
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


def times_faster(bar: str, rows: list[Row], column: str, limit: float) -> Check:
    """The time of the fastest of a column over ours."""
    native, rivals = ours(rows), [row for row in rows if row.column == column]
    value = ratio(fastest(rivals), native.times_floor if native else None)
    skipped = any(row.status == "skipped" for row in rivals)
    return Check(bar, case_of(rows[0]), value, limit, at_least=True, partial=skipped)


def cpu(run: Run, rows: list[Row]) -> Iterator[Check]:
    if rows[0].op == DECODE:
        limit = TIMES_DENSE[length_of(rows[0]) >= LONG]
        yield times_faster("times faster than the best dense decode", rows, "yardstick", limit)
        yield times_faster("times faster than QuantizedCache", rows, "peer", TIMES_QUANTIZED_CACHE)
    elif rows[0].op in TIMES_DENSE_LOW_RANK and length_of(rows[0]) >= LONG:
        limits = TIMES_DENSE_INTEL if "Intel" in run.device_line else TIMES_DENSE_LOW_RANK
        limit = limits[rows[0].op]
        yield times_faster("times faster than the best dense decode", rows, "yardstick", limit)
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
    share = native.gbps / run.copy_gbps if native and native.gbps else None
    yield Check("share of copy bandwidth", case_of(rows[0]), share, SHARE_OF_COPY, at_least=True)
    if rows[0].size == f"8x{LONG}":
        yield times_faster("times faster than the best dense decode", rows, "yardstick", TIMES_DENSE_GPU)
