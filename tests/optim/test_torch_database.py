# SPDX-License-Identifier: Apache-2.0
"""An oracle that is not ours: the inputs, schedulers and error inputs with which torch tests its own optimizers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from singlepass import optim

ROOT = Path(__file__).parents[2]
# The fewest inputs of each check, for any of our classes: a filter that leaves nothing would test nothing.
FEWEST = {"direction": 4, "schedulers": 30, "resuming": 4, "errors": 8}

pytestmark = [
    pytest.mark.xdist_group("torch's database"),
    pytest.mark.slow("imports torch's test utilities, in a process of its own"),
]


@pytest.fixture(scope="module")
def results() -> dict[str, list[tuple[str, str | None]]]:
    """What tests/optim/torch_database.py prints."""
    pinned = re.search(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if torch.__version__.partition("+")[0] != pinned[1]:
        pytest.skip(f"the database is private to torch: it is read from torch {pinned[1]} alone")
    pytest.importorskip("expecttest", reason="torch's test utilities import expecttest")
    script = Path(__file__).with_name("torch_database.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    found: dict[str, list[tuple[str, str | None]]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("check", FEWEST)
@pytest.mark.parametrize("name", optim._OPTIMIZERS)
def test_torchs_inputs(name: str, check: str, results: dict[str, list[tuple[str, str | None]]]) -> None:
    tried = results[f"{name} {check}"]
    assert len(tried) >= FEWEST[check], [desc for desc, _ in tried]
    assert {desc: error for desc, error in tried if error is not None} == {}


def test_adamw_is_torchs(results: dict[str, list[tuple[str, str | None]]]) -> None:
    tried = results["AdamW as_torch"]
    assert len(tried) >= 5
    assert {desc: error for desc, error in tried if error is not None} == {}
