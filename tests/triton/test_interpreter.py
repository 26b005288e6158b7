# SPDX-License-Identifier: Apache-2.0
"""Runs the tests in ``interpreted/``: Triton's kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.mark.slow("a process of its own, in which a slow interpreter runs all tests of a file")
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_kernels_in_the_interpreter(file: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
