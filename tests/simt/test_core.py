# SPDX-License-Identifier: Apache-2.0
"""The C++ tests, and all tests of this folder again, a third of their cases, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .build import EVERY, MODULE_FOLDER, ROOT, build, ctest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_cpp_tests(sanitize: bool) -> None:
    ctest(build(sanitize))


def _run(*command: str | Path, **variables: str) -> str:
    arguments, environment = [str(part) for part in command], os.environ | variables
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    return done.stdout


def test_python_tests_under_sanitizers() -> None:
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

    def check(file: Path) -> None:
        _run(sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *settings, file, **environment)

    files = [path for path in HERE.glob("test_*.py") if path != Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process for each file: what runs is one thread in each
        list(pool.map(check, sorted(files, key=lambda path: path.stat().st_size, reverse=True)))
