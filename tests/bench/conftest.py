# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the bench extra is not installed")
pytest.importorskip("rich", reason="the bench extra is not installed")

from singlepass.bench import floor, timing
from singlepass.bench.results import Row, Run

COLUMNS = {
    "torch-fused": "torch.optim",
    "compile": "torch.compile",
    "gelu": "yardstick",
    "kat_rational": "peer",
    "flashkat": "peer",
}


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and flushes of a megabyte: honest times need more, tests don't."""
    monkeypatch.setattr(floor, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 18)


def _quantiles(ms: float) -> dict[str, float]:
    return {"q20": 0.9 * ms, "q50": ms, "q80": 1.1 * ms, "n": 5}


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A measured row, of an optimizer unless told otherwise; `ms=None` makes one that could not be measured."""

    def make(op: str, provider: str, ms: float | None, floor: float = 80.0, **values: Any) -> Row:
        facts: dict[str, Any] = {
            "family": "optim",
            "op": op,
            "size": "gpt2-small",
            "dtype": "float32",
            "provider": provider,
            "column": COLUMNS.get(provider, provider),
            "status": "ok" if ms is not None else "unavailable",
            "elements": 124_000_000,
            "input_bytes": 496_000_000,
            "bytes": 28 * 124_000_000,
            "extra_bytes": 1000,
        }
        if ms is not None:
            facts |= {"ms": _quantiles(ms), "floor_ms": _quantiles(floor)}
        return Row(**(facts | values))

    return make


@pytest.fixture
def make_run() -> Callable[..., Run]:
    def make(rows: list[Row], kind: str = "cpu", date: str = "2030-01-02T03:04:05+00:00", **values: Any) -> Run:
        machine = {"kind": kind, "device": "Some Processor", "threads": 2}
        versions = {"torch": "2.99", "singlepass": "0.0"}
        return Run(date, "abc1234", False, machine, versions, 40.0, None, rows=rows, **values)

    return make
