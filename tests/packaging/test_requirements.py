# SPDX-License-Identifier: Apache-2.0
"""Whatever building needs and does not find is told in one line, never in a traceback."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Setup = Callable[..., str]

TORCH = "__version__ = '2.13.0+cpu'\nclass version: cuda = None"
GCC = "g++ (GCC) {0}.2.0\n#define __cplusplus {1}L\n#define __GNUC__ {0}"
CLANG = "clang version 15.0.0\n#define __cplusplus {0}L\n#define __GNUC__ 4\n#define __clang__ 1"
COMPILER = "Install g++ 11 or newer, or set CXX to one."


@pytest.fixture
def refused(root: Path, tmp_path: Path) -> Setup:
    """Runs setup.py, with modules in the place of others, under settings; returns the only line that it prints."""

    def run(argument: str = "build_ext", modules: dict[str, str] | None = None, **settings: str) -> str:
        for name, code in (modules or {}).items():
            (tmp_path / f"{name}.py").write_text(code)
        cleared = ("SINGLEPASS", "CUDA_", "CXX", "PYTHON", "TORCH")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(cleared)}
        environment |= {"PYTHONPATH": str(tmp_path)} | settings
        command = [sys.executable, "setup.py", argument, "--help"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        return line

    return run


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Path]:
    """A program that prints something and exits."""

    def make(prints: str, status: int = 0, name: str = "c++") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(prints)}\nexit {status}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize(
    ("prints", "status", "contract", "got"),
    [
        ("", 1, "a C++20 compiler", "{path}: no answer"),
        (
            "c++: error: unrecognized command line option '-std=c++20'",
            1,
            "a C++20 compiler",
            "{path}: c++: error: unrec",
        ),
        ("fatal error: version: No such file or directory", 1, "a C++20 compiler", "{path}: fatal error: version: No"),
        (GCC.format(10, 201709), 0, "a C++20 compiler (g++ 11 or newer)", "g++ (GCC) 10.2.0"),
        (CLANG.format(201709), 0, "a C++20 compiler (g++ 11 or newer)", "clang version 15.0.0"),
    ],
    ids=["silent", "old", "no library", "gcc 10", "clang 15"],
)
def test_compilers_that_cannot_build(
    refused: Setup, program: Callable[..., Path], prints: str, status: int, contract: str, got: str
) -> None:
    path = program(prints, status)
    line = refused(CXX=str(path))
    assert line.startswith(f"singlepass: expected {contract}; got {got.format(path=path)}")
    assert line.endswith(f". {COMPILER}")


@pytest.mark.parametrize("command", ["/nonexistent/g++", "/nonexistent/ccache g++ -O2"])
def test_a_compiler_that_is_not_there(refused: Setup, command: str) -> None:
    expected = f"singlepass: expected a C++20 compiler; got {command}: No such file or directory. {COMPILER}"
    assert refused(CXX=command) == expected


@pytest.mark.parametrize("accepted", [GCC.format(11, 202002), CLANG.format(202002)], ids=["gcc 11", "clang 17"])
def test_compilers_that_can_build_come_to_the_next_question(
    refused: Setup, program: Callable[..., Path], accepted: str
) -> None:
    assert "expected torch" in refused(CXX=str(program(accepted)), modules={"torch": "raise ImportError('none')"})


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
        (
            "raise OSError('libcudart.so.13: cannot open shared object file\\nmore')",
            "libcudart.so.13: cannot open shared",
        ),
        ("__version__ = '2.9.1+cpu'", "2.9.1+cpu"),
        ("__version__ = '1.13.1'", "1.13.1"),
    ],
)
def test_torches_that_cannot_build(refused: Setup, code: str, got: str) -> None:
    line = refused(modules={"torch": code})
    assert line.startswith(f"singlepass: expected torch 2.10 or newer; got {got}")
    assert line.endswith('. Run: pip install "torch>=2.10", or leave out --no-build-isolation.')


@pytest.mark.parametrize(
    ("code", "got"), [("__version__ = '65.5.0'", "65.5.0"), ("raise ImportError", "0 (none)")], ids=["stale", "none"]
)
@pytest.mark.parametrize("argument", ["--version", "build_ext"])
def test_a_stale_setuptools(refused: Setup, argument: str, code: str, got: str) -> None:
    remedy = 'Run: pip install -U "setuptools>=77"'
    expected = f"singlepass: expected setuptools 77 or newer; got {got}. {remedy}"
    assert refused(argument, modules={"setuptools": code}) == expected


def test_other_systems(refused: Setup) -> None:
    imports_first = "import setuptools.command.bdist_wheel, setuptools.command.build, sys"
    line = refused(modules={"sitecustomize": f"{imports_first}; sys.platform = 'darwin'"})
    assert line == "singlepass: expected Linux; got darwin. Build in a Linux machine or container."


def test_older_pythons(refused: Setup, root: Path) -> None:
    line = refused("--version", modules={"sitecustomize": "import sys; sys.version_info = (3, 9, 18)"})
    assert line.startswith("singlepass: expected Python 3.10 or newer; got ")
    ast.parse((root / "setup.py").read_text(), feature_version=(3, 7))  # they come as far as that line


@pytest.mark.parametrize(
    ("cuda", "answers", "reason", "remedy"),
    [
        ("", "release 13.0,", "no nvcc (CUDA_HOME=", "Install the CUDA toolkit, or set CUDA_HOME to it"),
        ("nvcc", "no", "/nvcc does not run", "Install the CUDA toolkit again"),
        ("nvcc", "release 13.0,", " has no include/cuda_runtime.h", "Install the toolkit's headers and runtime, too"),
        ("all", "release 13.0,", "torch 2.13.0+cpu is built without CUDA", "Install a CUDA build of torch"),
        (
            "all",
            "release 12.6,",
            "nvcc is of CUDA 12.6, torch 2.13.0+cpu of CUDA 13.0",
            "Make the major versions agree",
        ),
    ],
)
def test_cuda_that_was_asked_for(
    refused: Setup, program: Callable[..., Path], tmp_path: Path, cuda: str, answers: str, reason: str, remedy: str
) -> None:
    if cuda:
        program(f"#$ TOP={tmp_path}\n{answers}", name="nvcc")
    for name in ("include/cuda_runtime.h", "lib64/libcudart.so") if cuda == "all" else ():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    torch = TORCH.replace("None", "'13.0'") if "12.6" in answers else TORCH
    line = refused(modules={"torch": torch}, SINGLEPASS_WITH_CUDA="1", CUDA_HOME=str(tmp_path))
    assert line.startswith("SINGLEPASS_WITH_CUDA: expected 1 to be possible; got: ")
    assert reason in line
    assert line.endswith(f". {remedy}, or unset it.")


def test_an_nvcc_that_may_not_be_executed(refused: Setup, program: Callable[..., Path], tmp_path: Path) -> None:
    program("", name="nvcc").chmod(0o644)
    line = refused(modules={"torch": TORCH}, SINGLEPASS_WITH_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "/nvcc does not run. " in line
