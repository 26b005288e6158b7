# SPDX-License-Identifier: Apache-2.0
"""Predictions of times on GPUs: their table, what measuring says of them, and how they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from counting import model
from singlepass.bench import documents, predictions, results


def prediction(us: float = 100.0, date: str = "2026-01-02") -> dict[str, Any]:
    cell = {"us": us, "share": 0.5, "binds": "memory", "launches": []}
    row = {"family": "optim", "op": "Lion", "size": "gpt2-small", "dtype": "float32", "gpus": {"H100": cell}}
    rows = [row, row | {"size": "other"}]
    return {
        "schema": 1,
        "date": date,
        "commit": "abc",
        "nvcc": "13.0",
        "gpus": {"H100": {}},
        "kernels": [],
        "rows": rows,
    }


def measured(ms: float, device: str = "NVIDIA H100 80GB HBM3", provider: str = "native") -> results.Run:
    key = ("optim", "Lion", "gpt2-small", "float32", provider)
    row = results.Row(*key, column=provider, status="ok", ms={"q50": ms})
    return results.Run("2026-02-03", "def", False, {"kind": "cuda", "device": device}, {}, 3000.0, None, rows=[row])


def test_a_table_of_one_size() -> None:
    grid = predictions.model_grid(prediction(), [], "optim", "gpt2-small")
    assert grid.head == ["case", "H100"]
    assert grid.lines == [["Lion, gpt2-small, float32", "100 (0.50, memory)"]]
    assert "predicted from counts, not measured" in grid.title
    assert grid.notes == ["Counted at commit abc with nvcc 13.0.", "No GPU has calibrated it yet."]
    assert len(predictions.model_grid(prediction(), [], "optim").lines) == 2
    assert predictions.model_grid(None, [], "optim").lines == []


def in_triton(us: float | None) -> dict[str, Any]:
    """The same, with a kernel of Triton that takes so long, or that cannot be counted."""

    def cell() -> dict[str, Any]:
        known = {"us": us, "share": 0.25, "binds": "issue", "launches": []}
        return known if us else {"not_counted": "no such products"}

    model = prediction()
    rows = [row | {"triton": {"H100": cell()}} for row in model["rows"]]
    return model | {"triton": "3.7.1", "rows": rows}


def test_triton_stands_below() -> None:
    grid = predictions.model_grid(in_triton(200.0), [], "optim", "gpt2-small")
    assert grid.lines[1:] == [["– in Triton", "200 (0.25, issue)"]]
    assert grid.notes[0] == "Counted at commit abc with nvcc 13.0 and Triton 3.7.1."
    grid = predictions.model_grid(in_triton(None), [], "optim", "gpt2-small")
    assert grid.lines[1:] == [["– in Triton", "not counted"]]
    assert grid.notes[1] == "Not counted: no such products."


def test_what_the_fallback_costs() -> None:
    slower = in_triton(200.0)
    slower["rows"][1]["triton"]["H100"]["us"] = 250.0
    grid = predictions.fallback_grid(slower)
    assert grid.lines == [["optim: Lion", "2.00x to 2.50x"]]
    assert grid.notes == ["Counted at commit abc with nvcc 13.0 and Triton 3.7.1."]
    assert predictions.fallback_grid(in_triton(100.0)).lines == [["optim: Lion", "1.00x"]]
    assert predictions.fallback_grid(in_triton(None)).lines == []
    assert predictions.fallback_grid(prediction()).lines == []
    assert predictions.fallback_grid(None).lines == []


def test_measuring_calibrates_the_gpu_that_it_is_of() -> None:
    assert predictions.errors(prediction(), measured(0.08)) == {"H100": [0.25]}
    assert predictions.errors(prediction(), measured(0.08, "NVIDIA H200")) == {}
    assert predictions.errors(in_triton(200.0), measured(0.08, provider="triton")) == {"H100 in Triton": [1.5]}
    assert predictions.errors(in_triton(None), measured(0.08, provider="triton")) == {}
    assert predictions.errors(prediction(), measured(0.08, provider="triton")) == {}
    (note,) = predictions.calibration(prediction(), [measured(0.08)])
    assert note.startswith("H100, measured on 2026-02-03: the predicted times of 1 cases are off by +25% in the median")


def test_predictions_are_no_runs(tmp_path: Path) -> None:
    """The newest is found, and what looks for measured runs passes them by."""
    for date, us in (("2026-01-02", 1.0), ("2026-01-03", 2.0)):
        assert model.save(prediction(us, date), tmp_path).parent.name == results.MODEL
    assert results.files(tmp_path) == []
    assert results.newest("cuda", tmp_path) is None
    newest = results.newest_model(tmp_path)
    assert newest is not None
    assert newest["rows"][0]["gpus"]["H100"]["us"] == 2.0
    assert results.newest_model(tmp_path / "none") is None


def test_changes_are_told() -> None:
    before, after = prediction(100.0), prediction(110.0)
    assert model.changes(before, before) == []
    del before["rows"][1], after["rows"][1]
    assert model.changes(before, after) == ["optim/Lion/gpt2-small/float32/H100: 100.0 -> 110.0 µs (+10.0%)"]
    assert model.changes(before, prediction(100.2)) == ["optim/Lion/other/float32/H100: 100.2 µs, not predicted before"]
    assert model.changes(in_triton(100.0), in_triton(110.0))[0] == (
        "optim/Lion/gpt2-small/float32/H100/triton: 100.0 -> 110.0 µs (+10.0%)"
    )
    assert model.changes(prediction(), before) == ["optim/Lion/other/float32/H100: no longer predicted"]


def test_the_published_prediction_is_in_the_documents() -> None:
    """As a marker of one family writes it, from a file that has its constants and counts."""
    newest = results.newest_model()
    assert newest is not None
    assert newest["schema"] == model.SCHEMA
    assert {"SHORT_LATENCY", "LAUNCH_US", "COPY_SHARE"} <= set(newest["constants"])
    assert {kernel["arch"] for kernel in newest["kernels"]} == {gpu["arch"] for gpu in newest["gpus"].values()}
    text = documents.block("model", {"family": "kv"}, lambda family: None, lambda run, options: "")
    assert text in Path("docs/performance.md").read_text()
