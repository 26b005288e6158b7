# SPDX-License-Identifier: Apache-2.0
"""Every byte crosses memory once: what kernels read and write is counted, as CUDA's is in tests/counting."""

from __future__ import annotations

import pytest

from counting.triton import traffic
from singlepass._ops import OPS
from singlepass.triton_kernels import _table

from ...counting.exceptions import faults
from ...counting.traffic_row import BYTES, REPEATS, Row
from ...counting.traffic_table import TRITON_ROWS

CHUNK = 16384

pytestmark = pytest.mark.slow("a slow interpreter")


@pytest.fixture(autouse=True)
def _chunks(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size that they have on a GPU."""
    monkeypatch.setattr(_table, "CHUNK", CHUNK)


def counted(row: Row, calls: int = 1) -> tuple[traffic.Traffic, traffic.Tensors]:
    """Of one call, or of several as if they were one."""
    sample, function = row.make(), row.op.on("triton")

    def run(*arguments: object, **options: object) -> object:
        return [function(*arguments, **options) for _ in range(calls)][-1]

    if row.warm:
        run(*sample.arguments, **sample.options)
    return traffic.count(row.op, run, sample.arguments, sample.options)


@pytest.mark.parametrize("row", TRITON_ROWS, ids=str)
def test_traffic(row: Row) -> None:
    counts, tensors = counted(row)
    judged = row.judged(counts, tensors)
    assert faults(f"triton {row}", {measure: judged[measure] for measure in (BYTES, REPEATS)}) == [], str(counts)


def test_every_op_has_a_row() -> None:
    assert {row.op.name for row in TRITON_ROWS} == {name for name, op in OPS.items() if op.has_triton}


def test_what_reads_twice_is_a_fault() -> None:
    (row,) = (row for row in TRITON_ROWS if str(row) == "lorentz: float32")
    counts, tensors = counted(row, calls=2)
    (fault,) = faults("lorentz", {BYTES: row.judged(counts, tensors)[BYTES]})
    assert fault.startswith("lorentz: expected at most 1.014 bytes over the floor; got 1.5")
