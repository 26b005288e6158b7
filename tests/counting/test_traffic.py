# SPDX-License-Identifier: Apache-2.0
"""Every byte crosses memory once: what kernels read and write is counted, and compared with what they must."""

from __future__ import annotations

from dataclasses import replace

import pytest

from counting import traffic
from singlepass._ops import optim as optim_ops

from ..simt.ops import COUNTING, library, overload
from .exceptions import faults
from .traffic_row import BYTES, Row
from .traffic_table import ROWS

pytestmark = pytest.mark.slow("the first one waits until the kernels are compiled to be counted")


def counted(row: Row, calls: int = 1) -> tuple[traffic.Traffic, traffic.Tensors]:
    """Of one call, or of several as if they were one."""
    sample, function = row.make(), overload(row.op, COUNTING)

    def run(*arguments: object, **options: object) -> object:
        return [function(*arguments, **options) for _ in range(calls)][-1]

    if row.warm:
        run(*sample.arguments, **sample.options)
    return traffic.count(library(COUNTING), row.op, run, sample.arguments, sample.options)


def marked(row: Row) -> object:
    deep = pytest.mark.deep("takes longer, and counts kernels that other rows count, too")
    return pytest.param(row, id=str(row), marks=[deep] if row.deep else [])


@pytest.mark.parametrize("row", [marked(row) for row in ROWS])
def test_traffic(row: Row) -> None:
    counts, tensors = counted(row)
    assert faults(str(row), row.judged(counts, tensors)) == [], str(counts)
    assert counts.launches == row.launches


def stream() -> Row:
    (row,) = (row for row in ROWS if row.op is optim_ops.stream_)
    return row


def test_what_reads_twice_is_a_fault() -> None:
    counts, tensors = counted(stream(), calls=2)
    (fault,) = faults("stream_", stream().judged(counts, tensors))
    assert fault == f"stream_: expected at most 1.012 {BYTES}; got 2. Mend the kernel."
    assert counts.launches == 2


def test_what_reads_more_than_it_must_is_a_fault() -> None:
    row = replace(stream(), read={"reads": 0.0})
    (fault,) = faults("stream_", row.judged(*counted(row)))
    assert fault == f"stream_: expected at most 1.013 {BYTES}; got 1.25. Mend the kernel."
