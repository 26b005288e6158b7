# SPDX-License-Identifier: Apache-2.0
"""Runs the tests in ``interpreted/``: Triton's kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(map(str, Path(__file__).with_name("interpreted").glob("test_*.py")))


# Two processes share the files, as two workers share the tests: each takes seconds to start.
@pytest.mark.slow("a process of its own, in which a slow interpreter runs all tests of some files")
@pytest.mark.parametrize("files", [FILES[::2], FILES[1::2]], ids=["half", "other half"])
def test_kernels_in_the_interpreter(files: list[str]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
