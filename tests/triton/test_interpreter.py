# SPDX-License-Identifier: Apache-2.0
"""Runs the tests in ``interpreted/``: Triton's kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # NumPy warns of what masked lanes divide by.
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")

    def check(file: Path) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        result = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    files = (Path(__file__).parent / "interpreted").glob("test_*.py")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process for each file: the interpreter is one thread in each
        list(pool.map(check, sorted(files, key=lambda path: path.stat().st_size, reverse=True)))
