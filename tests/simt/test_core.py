# SPDX-License-Identifier: Apache-2.0
"""The C++ tests, and all tests of this folder again, a third of their cases, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .build import EVERY, MODULE_FOLDER, ROOT, build, ctest

HERE = Path(__file__).resolve().parent
FILES = sorted(path for path in HERE.glob("test_*.py") if path != Path(__file__))
sanitized = pytest.mark.deep("what is built under sanitizers takes minutes to build, and is several times slower")


@pytest.mark.slow("builds the core and its C++ tests where no test has yet")
@pytest.mark.parametrize("sanitize", [False, pytest.param(True, marks=sanitized)], ids=["plain", "sanitized"])
def test_cpp_tests(sanitize: bool) -> None:
    ctest(build(sanitize))


def _run(*command: str | Path, **variables: str) -> str:
    arguments, environment = [str(part) for part in command], os.environ | variables
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    return done.stdout


@sanitized
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_python_tests_under_sanitizers(file: Path) -> None:
    folder = build(sanitize=True)
    # ASan must come before everything else, and needs libstdc++ beside it to see exceptions.
    compiler = os.environ.get("CXX", "c++")
    preload = [_run(compiler, f"-print-file-name={library}").strip() for library in ("libasan.so", "libstdc++.so")]
    # Without the project's settings and fixtures: PyTorch stays out of this process. Without capture: what a sanitizer
    # reports must outlive the process that it ends.
    settings = ("-c", os.devnull, "--rootdir", ROOT, "--confcutdir", HERE, "--import-mode=importlib")
    environment = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1",
        MODULE_FOLDER: str(folder),
        EVERY: "3",  # cases differ in numbers more than in accesses, and take several times as long here
    }
    _run(sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *settings, file, **environment)
