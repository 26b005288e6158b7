# SPDX-License-Identifier: Apache-2.0
"""Builds the torch-free core with CMake, plain or under sanitizers, where `make core` builds it too."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Set in a process that runs under sanitizers: its modules are built already, and need their run time loaded first.
MODULE_FOLDER = "SINGLEPASS_TEST_CORE_FOLDER"
GCC = "12"  # of CI: its accesses are counted, and its warnings are errors
EVERY = "SINGLEPASS_TEST_EVERY"  # and runs one case in so many of each test


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(str(part) for part in command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@functools.cache
def build(sanitize: bool, target: str = "all") -> Path:
    """The build folder, up to date. Skips the test where there is nothing to build with; a failed build fails it."""
    cmake = tool("cmake")
    if cmake is None:
        pytest.skip("no CMake on PATH")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler on PATH")
    folder = ROOT / "build" / ("cmake-sanitize" if sanitize else "cmake")
    folder.mkdir(parents=True, exist_ok=True)
    options = ("-S", ROOT, "-B", folder, f"-DSINGLEPASS_SANITIZE={'ON' if sanitize else 'OFF'}")
    with (folder / "lock").open("w") as lock:  # of workers that share the tests one builds, and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        options += ("-DSINGLEPASS_BUILD_PYBIND=ON", f"-DPython3_EXECUTABLE={sys.executable}")
        _run(cmake, *options, f"-DSINGLEPASS_TORCH={Path(torch.__file__).parent}")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
        _run(cmake, "--build", folder, "--target", target, "--parallel", jobs)
    return folder


@functools.cache
def cubin_folder() -> Path:
    """The cubins of all kernels for all architectures, up to date. Skips the test where there is no CMake."""
    cmake = tool("cmake")
    if cmake is None:
        pytest.skip("no CMake on PATH")
    folder = ROOT / "build" / "cmake"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(cmake, "-S", ROOT, "-B", folder)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
        _run(cmake, "--build", folder, "--target", "cubin_check", "--parallel", jobs)
    return folder / "cubin"


def gcc_version() -> str | None:
    """The major version of the C++ compiler, if that is GCC."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or "Free Software" not in _run(compiler, "--version"):
        return None
    return _run(compiler, "-dumpversion").strip().partition(".")[0]


def build_counting() -> Path:
    """The build folder, with the ops that count what kernels do to memory. Skips the test with another compiler than
    the one of the counts: another may keep in a register what this one loads."""
    if (found := gcc_version()) != GCC:
        pytest.skip(f"accesses are counted as GCC {GCC} compiles them; got GCC {found}" if found else "no GCC on PATH")
    return build(sanitize=False, target="singlepass_traffic_ops")


def ctest(folder: Path) -> None:
    """Runs the C++ tests of a build folder."""
    command = tool("ctest")
    assert command is not None
    _run(command, "--test-dir", folder, "--output-on-failure", "--no-tests=error")


def sample(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test's cases one in so many, where the environment asks for that: the first is always among them."""
    every, seen, kept = int(os.environ.get(EVERY, "1")), Counter[tuple[Path, str]](), []
    for item in items:
        test = item.path, item.name.partition("[")[0]
        if seen[test] % every == 0:
            kept.append(item)
        seen[test] += 1
    return kept


def module_path(folder: Path) -> Path:
    return folder / f"singlepass_core{sysconfig.get_config_var('EXT_SUFFIX')}"
