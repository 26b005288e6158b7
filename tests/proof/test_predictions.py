# SPDX-License-Identifier: Apache-2.0
"""What was predicted of a GPU, beside what is measured."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from proof import kernels, place, predictions, stages
from proof.predictions import STREAMS, TIMES_OFF, Prediction
from proof.stage import NOT_MEASURED, PROVED, REFUTED
from singlepass.bench import results

MODEL = results.newest_model()
CPU = torch.device("cpu")
SMALL = "rational/rational/16x197x768/float32"


def run(us: dict[str, float], copy_gbps: float = 4300.0) -> results.Run:
    """Of some cases, in so many microseconds."""
    rows = [
        results.Row(*name.split("/"), "native", "native", "ok", bytes=10**9, ms={"q50": time / 1e3})
        for name, time in us.items()
    ]
    return results.Run(
        "2026-02-03", "def", False, {"kind": "cuda", "device": "NVIDIA H200"}, {}, copy_gbps, None, rows=rows
    )


def judged(run: results.Run, gpu: str = "H200") -> dict[str, Prediction]:
    assert MODEL is not None
    return {p.what: p for p in predictions.of_kernels(MODEL, gpu, run)}


def predicted(case: str, gpu: str = "H200") -> dict[str, Any]:
    assert MODEL is not None
    return next(
        r["gpus"][gpu] for r in MODEL["rows"] if "/".join((r["family"], r["op"], r["size"], r["dtype"])) == case
    )


def test_the_published_model_predicts_every_case_on_every_gpu() -> None:
    assert MODEL is not None
    for gpu in MODEL["gpus"]:
        found = judged(run({}), gpu)
        assert list(found) == ["a copy", *STREAMS, *TIMES_OFF]
        assert all(0 < p.low < p.high for p in found.values())


@pytest.mark.parametrize(("off", "holds"), [(0.79, False), (0.81, True), (1.19, True), (1.21, False)])
def test_a_time_is_to_be_near_what_was_predicted(off: float, holds: bool) -> None:
    name = "kv/kv_decode/8x32768/bfloat16"
    assert judged(run({name: off * predicted(name)["us"]}))[name].holds is holds


@pytest.mark.parametrize(("off", "holds"), [(-0.03, False), (-0.01, True), (0.03, True)])
def test_what_streams_is_judged_by_the_copy_that_was_measured(off: float, holds: bool) -> None:
    name, copy = STREAMS[0], 2000.0
    us = 1e9 / (copy * (predicted(name)["share"] + off)) / 1e3
    found = judged(run({name: us}, copy))
    assert found[name].holds is holds
    assert found["a copy"].holds is False
    assert found[STREAMS[1]].holds is None
    assert found[STREAMS[1]].missing == "not measured"


def test_what_could_not_run_says_why() -> None:
    rows = [results.Row(*STREAMS[0].split("/"), "native", "native", "unavailable", reason="no library")]
    found = judged(results.Run("", "", False, {}, {}, 4300.0, None, rows=rows))[STREAMS[0]]
    assert (found.holds, found.missing) == (None, "no library")


@pytest.mark.slow("measures the bandwidth and a case")
def test_cases_are_measured_by_name() -> None:
    found = predictions.measure(CPU, [SMALL])
    assert ["/".join(row.key) for row in found.rows] == [f"{SMALL}/native"]
    assert found.rows[0].median is not None
    assert found.copy_gbps > 0


def test_both_steps_of_the_host_do_the_same() -> None:
    steps = [make(CPU) for make in (predictions.compressed_step, predictions.dense_step)]
    assert {step().shape for step in steps} == {(1, 8, 1, 128)}


LINE = (
    f'"ID","Kernel Name","Metric Name","Metric Unit","Metric Value","Rule Description"\n"0","step","{kernels.SECTORS}"'
)


@pytest.mark.parametrize(("sectors", "holds"), [("16.00", True), ("15.9", True), ("32.00", False), ("13.4", False)])
def test_sectors_of_a_store(sectors: str, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f'==PROF== Connected\n{LINE},"sector/request","{sectors}",""\n'
    monkeypatch.setattr(kernels, "profiler_command", lambda *_: [sys.executable, "-c", f"print({said!r})"])
    assert predictions.of_sectors().holds is holds


def test_without_a_profiler_sectors_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "profiler_command", lambda *_: "no ncu here")
    assert predictions.of_sectors().missing == "no ncu here"
    monkeypatch.setattr(
        kernels, "profiler_command", lambda *_: [sys.executable, "-c", "print('==ERROR== no permission')"]
    )
    assert predictions.of_sectors().missing == "==ERROR== no permission"


def printed(*measured: float | None, gpu: str | None = "H200") -> str:
    found = [Prediction("x", "µs", 1.0, 2.0, m) for m in measured]
    return json.dumps({"gpu": gpu, "predictions": [asdict(p) | {"holds": p.holds} for p in found]}, indent=1)


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (printed(1.5, 1.0), PROVED, "predictions: 2 hold"),
        (printed(1.5, 2.1, None), REFUTED, "predictions: 1 hold, 1 fail, 1 not measured"),
        (printed(1.5, None), NOT_MEASURED, "predictions: 1 hold, 1 not measured"),
        (printed(1.5, gpu=None), NOT_MEASURED, "predictions: 1 hold; no times are predicted of this GPU"),
        ("RuntimeError: CUDA error", REFUTED, "RuntimeError: CUDA error"),
    ],
    ids=["all hold", "one fails", "one is missing", "another GPU", "broken"],
)
def test_the_stage(text: str, status: str, said: str, tmp_path: Path) -> None:
    outcome = stages.predictions_read(place.Place("cuda", tmp_path, tmp_path), 0, f"a warning\n{text}\n")
    assert (outcome.status, outcome.said) == (status, said)


def test_a_rehearsal_predicts_nothing(tmp_path: Path) -> None:
    assert stages.predictions_command(place.Place("cpu", tmp_path, tmp_path)) == "what is predicted is of GPUs"


def test_the_program_needs_no_model_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(predictions, "of_host", lambda device: Prediction("host", "times", 0.0, 3.0, 2.0))
    monkeypatch.setattr(predictions, "of_sectors", lambda: Prediction("sectors", "sectors", 15.8, 16.2, None, "no ncu"))
    monkeypatch.setattr(predictions, "measure", lambda *_: pytest.fail("nothing to compare with"))
    predictions.main(torch.device("cuda"))
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"] is None
    assert [p["holds"] for p in found["predictions"]] == [True, None]
