# SPDX-License-Identifier: Apache-2.0
"""Cases, bars and tables of sparse spectral training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from singlepass.bench import checks, counted, registry, tables
from singlepass.bench.results import Row, Run
from singlepass.bench.spectral import calls
from singlepass.bench.spectral.layers import DECOMPOSE, MODEL, MODEL_NAME, SCALE, SHAPES, TRAIN, UPDATE, LayerShape

CPU = torch.device("cpu")
MakeRow = Callable[..., Row]
MakeRun = Callable[..., Run]


def cases() -> list[registry.Case]:
    return [case for case in registry.cases(CPU) if case.family == "spectral"]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_provider_agrees_with_the_reference(case: registry.Case) -> None:
    ran = []
    for provider in case.providers:
        if provider.why_not(CPU) is None:
            assert provider.gate(CPU).agrees, provider.name
            ran.append(provider.name)
    assert {"native", "eager"} <= set(ran)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_provider_runs_more_than_once(case: registry.Case) -> None:
    data = calls.model_data if case.op in calls.OF_MODELS else calls.layer_data
    small = data(calls.GATE_MODEL if case.op in calls.OF_MODELS else calls.GATE_SHAPE, torch.float32, CPU)
    for provider in case.providers:
        if provider.why_not(CPU) is None:
            step = provider.prepare(small)
            for _ in range(3):
                results = step.run()
                assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("op", [SCALE, UPDATE, TRAIN])
def test_gates_stop_another_result(op: str) -> None:
    def wrong(data: calls.Data) -> calls.Call:
        right = calls.OWN[op]("native", data)

        def call() -> tuple[Tensor, ...]:
            first, *rest = right()
            return (first * 1.001, *rest)

        return call

    truth = calls.train_eager if op == TRAIN else partial(calls.OWN[op], "eager")
    assert not calls.gate(wrong, truth, op, torch.float32, CPU).agrees


def test_the_floor_of_an_update() -> None:
    """A float32 parameter takes 28 bytes, as AdamW's: four read, three written."""
    (case,) = [case for case in cases() if case.op == UPDATE]
    elements = sum(48 * (m + n) + 768 for m, n in MODEL)
    assert case.bytes == 28 * elements
    assert case.size == MODEL_NAME


@pytest.fixture
def row(make_row: MakeRow) -> MakeRow:
    def make(op: str, provider: str, ms: float | None, column: str = "native", **values: object) -> Row:
        facts: dict[str, object] = {"family": "spectral", "size": "1024x2048", "bytes": 1 << 20, "column": column}
        return make_row(op, provider, ms, **(facts | values))

    return make


@pytest.fixture
def rows(row: MakeRow) -> list[Row]:
    return [
        row(TRAIN, "native", 13.9),
        row(TRAIN, "full-rank", 10.0, "yardstick"),
        row(TRAIN, "products", 13.0, "peer"),
        row(TRAIN, "eager", 20.0, "eager"),
        row(UPDATE, "native", 1.0, size=MODEL_NAME),
        row(UPDATE, "eager", 5.1, "eager", size=MODEL_NAME),
        row(SCALE, "native", 1.0),
    ]


def verdicts(run: Run) -> list[bool | None]:
    return [check.holds for check in checks.check(run, "spectral")]


def test_bars(rows: list[Row], row: MakeRow, make_run: MakeRun) -> None:
    assert verdicts(make_run(rows)) == [True, True, True]
    assert verdicts(make_run([row(TRAIN, "native", 14.5), *rows[1:]])) == [False, True, True]
    assert verdicts(make_run([row(TRAIN, "native", 20.5), *rows[1:]])) == [False, False, True]
    assert verdicts(make_run([*rows[:5], row(UPDATE, "eager", 4.9, "eager", size=MODEL_NAME)])) == [True, True, False]
    assert verdicts(make_run(rows[:1])) == [None, None]


def test_bars_on_a_gpu(row: MakeRow, make_run: MakeRun) -> None:
    facts = {"dtype": "bfloat16", "size": "2048x8192"}
    rows = [row(TRAIN, "native", 12.3, **facts), row(TRAIN, "full-rank", 10.0, "yardstick", **facts)]
    rows += [row(DECOMPOSE, "native", 1.0), row(DECOMPOSE, "eager", 4.0, "eager"), row(UPDATE, "native", 1.0)]
    run = make_run(rows)
    run.machine["kind"] = "cuda"
    assert [check.bar for check in checks.check(run, "spectral")] == [
        "time over full-rank AdamW",
        "times faster than torch.linalg.svd",
        "share of copy bandwidth",
    ]
    assert verdicts(run)[:2] == [True, False]


def test_grid(rows: list[Row], make_run: MakeRun) -> None:
    (grid,) = tables.grids(make_run(rows), family="spectral")
    assert grid.title == "sparse spectral training, float32: ms (multiple of the floor)"
    assert grid.lines[0][0] == "1024x2048, training step"
    assert "matrix products" in grid.notes[-1]


def test_grid_of_bytes() -> None:
    shares = {line[0]: line[-1] for line in counted.training_grid().lines}
    assert shares["full rank, AdamW"] == "100 %"
    assert shares["SST, frozen vectors in float32"] == "59 %"
    assert float(shares["SST, frozen vectors in bfloat16"][:-2]) < float(shares["GaLore, float32"][:-2])


def test_shapes_are_those_that_have_bars() -> None:
    assert SHAPES["cpu"] == (LayerShape(1024, 2048), LayerShape(2048, 2048))
    assert [shape.rank for shape in SHAPES["cpu"]] == [64, 128]
