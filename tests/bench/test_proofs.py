# SPDX-License-Identifier: Apache-2.0
"""Tables of a proof on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from singlepass._ops import OPS
from singlepass.bench import proofs, results


@pytest.fixture
def proof() -> dict[str, Any]:
    counts = {
        "optim/native/numerics": {"passed": 10, "skipped": 1},
        "optim/native/graphs": {"passed": 2},
        "optim/triton/numerics": {"passed": 8, "failed": 2},
        "kv/native/numerics": {"skipped": 5},
    }
    tests = {"name": "tests", "status": "refuted", "seconds": 71.4, "said": "2 | failed", "facts": {"counts": counts}}
    machine = {"kind": "cuda", "device": "NVIDIA H100"}
    return {"date": "2030-01-02T03:04:05", "commit": "abc1234", "machine": machine, "stages": [tests]}


def test_every_op_is_in_the_support_table() -> None:
    assert {line[0] for line in proofs.support_grid(None).lines} == {f"`{name}`" for name in OPS}


def test_support_on_gpus_is_what_the_tests_of_a_family_said(proof: dict[str, Any]) -> None:
    cells = {name: [proofs.gpu_cell(op, b, proof) for b in ("native", "triton")] for name, op in OPS.items()}
    assert cells["lion_step_"] == ["yes", "2 of 10 tests fail"]
    assert cells["kv_decode"] == [proofs.UNSEEN] * 2, "skipped tests count as not run"
    assert cells["stream_"] == ["yes", "no"]
    assert proofs.support_grid(proof).title == "Run on a GPU: NVIDIA H100, 2030-01-02, commit abc1234"


def test_without_a_proof_nothing_is_said_of_gpus() -> None:
    assert {proofs.gpu_cell(op, "native", None) for op in OPS.values()} == {proofs.UNSEEN}
    assert proofs.support_grid(None).title == "Run on a GPU: no"
    assert proofs.proof_grid(None).lines == []


def test_stages_of_a_proof(proof: dict[str, Any]) -> None:
    assert proofs.proof_grid(proof).lines == [["tests", "refuted", "71", "2 / failed"]]


def test_predictions_of_a_proof(proof: dict[str, Any]) -> None:
    range_of = {"what": "a copy", "unit": "TB/s", "low": 4.2, "high": 4.4, "missing": ""}
    cases = ({"measured": 4.3, "holds": True}, {"measured": 3.9, "holds": False})
    found = [range_of | case for case in cases] + [range_of | {"measured": None, "holds": None, "missing": "no ncu"}]
    proof["stages"].append({"name": "predictions", "facts": {"predictions": found}})
    assert [line[2:] for line in proofs.predictions_grid(proof).lines] == [
        ["4.30", "holds"],
        ["3.90", "FAILS"],
        ["no ncu", "not measured"],
    ]
    assert proofs.predictions_grid(proof).lines[0][1] == "4.20 to 4.40 TB/s"
    assert proofs.predictions_grid(None).lines == []


def test_the_newest_proof_on_a_gpu_is_found(proof: dict[str, Any], tmp_path: Path) -> None:
    assert results.newest_proof(tmp_path) is None
    older, rehearsal = proof | {"date": "2029"}, proof | {"date": "2031", "machine": {"kind": "cpu"}}
    for i, one in enumerate((older, proof, rehearsal)):
        path = tmp_path / f"device-{i}" / "proof" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(one))
    assert results.newest_proof(tmp_path) == proof
    assert results.newest("cuda", tmp_path) is None, "a proof is no run of the benchmark"
