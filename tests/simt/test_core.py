# SPDX-License-Identifier: Apache-2.0
"""The C++ tests, and tests of kernels on the CPU again, some of their cases, under AddressSanitizer and UBSan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from .build import EVERY, GCC, MODULE_FOLDER, ROOT, build, ctest, gcc_version, tool

HERE = Path(__file__).resolve().parent
FAMILIES = ("kv", "optim", "rational", "spectral")
FILES = sorted(path for path in HERE.glob("test_*.py") if path != Path(__file__))
sanitized = pytest.mark.deep("what is built under sanitizers takes minutes to build, and is several times slower")


@pytest.mark.slow("builds the core and its C++ tests where no test has yet")
@pytest.mark.parametrize("sanitize", [False, pytest.param(True, marks=sanitized)], ids=["plain", "sanitized"])
def test_cpp_tests(sanitize: bool) -> None:
    ctest(build(sanitize))


@pytest.mark.slow("configures a build")
def test_a_warning_fails_with_the_compiler_of_ci_alone(tmp_path: Path) -> None:
    """Others warn of other things. The package itself is built by whatever compiler a user has."""
    if (found := gcc_version()) is None or (cmake := tool("cmake")) is None:
        pytest.skip("no GCC or no CMake on PATH")
    _run(cmake, "-S", ROOT, "-B", tmp_path)
    commands = [entry["command"].split() for entry in json.loads((tmp_path / "compile_commands.json").read_text())]
    assert {"-Werror" in command for command in commands} == {found == GCC}
    flags = json.loads((ROOT / "csrc" / "sources.json").read_text())
    assert not [flag for name in ("cxx_flags", "nvcc_flags") for flag in flags[name] if "error" in flag]


@pytest.mark.slow("configures a build twice")
def test_another_python_than_that_of_the_last_build(tmp_path: Path) -> None:
    """CMake looks for its headers anew, though it stands at the same path."""
    cmake = tool("cmake")
    code = "import sys; print(sys.executable)"
    commands = [["sh", "-c", f"python3.{minor} -c '{code}'"] for minor in range(10, 14) if minor != sys.version_info[1]]
    answers = [subprocess.run(command, capture_output=True, text=True) for command in commands]
    others = [answer.stdout.strip() for answer in answers if not answer.returncode]
    if cmake is None or not others:
        pytest.skip("no CMake, or no other Python on PATH")
    folder, here = tmp_path / "build", tmp_path / "environment"
    options = ("-S", ROOT, "-B", folder, "-DSINGLEPASS_BUILD_PYBIND=ON", f"-DPython3_EXECUTABLE={here}/bin/python")
    for python in (sys.executable, others[0], sys.executable):
        subprocess.run([python, "-m", "venv", "--clear", "--without-pip", here], check=True)
        (packages,) = here.glob("lib/python3.*/site-packages")
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # pybind11
        subprocess.run([cmake, *options], capture_output=True, check=True)
        suffix = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
        found = subprocess.run([here / "bin" / "python", "-c", suffix], capture_output=True, text=True, check=True)
        assert f"PYTHON_MODULE_EXTENSION:INTERNAL={found.stdout}" in (folder / "CMakeCache.txt").read_text()


def _run(*command: str | Path, **variables: str) -> str:
    arguments, environment = [str(part) for part in command], os.environ | variables
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
    return done.stdout


def _run_under_sanitizers(*arguments: str | Path, every: int) -> None:
    """One in so many of the cases that pytest finds by these arguments."""
    folder = build(sanitize=True)
    # ASan must come before everything else, and needs libstdc++ beside it to see exceptions.
    compiler = os.environ.get("CXX", "c++")
    preload = [_run(compiler, f"-print-file-name={library}").strip() for library in ("libasan.so", "libstdc++.so")]
    environment = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1",
        MODULE_FOLDER: str(folder),
        EVERY: str(every),  # cases differ in numbers more than in accesses, and take several times as long here
    }
    # Without capture: what a sanitizer reports must outlive the process that it ends.
    _run(sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments, **environment)


@sanitized
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_python_tests_under_sanitizers(file: Path) -> None:
    """Without the project's settings and fixtures: PyTorch stays out of this process."""
    settings = ("-c", os.devnull, "--rootdir", ROOT, "--confcutdir", HERE, "--import-mode=importlib")
    _run_under_sanitizers(*settings, file, every=3)


@sanitized
@pytest.mark.parametrize("family", FAMILIES)
def test_registration_under_sanitizers(family: str) -> None:
    """The ops of GPUs with kernels on the CPU: their tensors are PyTorch's, of which none is larger than it says."""
    _run_under_sanitizers("-k", "simt", HERE.parent / family, every=20)
