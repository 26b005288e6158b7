# SPDX-License-Identifier: Apache-2.0
"""The installed package: it imports whatever state its libraries are in, and says what is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPORT = """
import dataclasses, json, pathlib, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import singlepass
from singlepass import _native
folder = pathlib.Path(singlepass.__file__).parent
print(json.dumps({"folder": str(folder), "cpu": dataclasses.asdict(_native.status("cpu")),
                  "cuda": dataclasses.asdict(_native.status("cuda")),
                  "warned": [str(warning.message) for warning in caught]}, default=str))
"""
Run = Callable[[str], str]


@pytest.fixture
def installed(clean_python: Run, tmp_path: Path) -> Iterator[Path]:
    """The folder of the installed package. What a test does to it is undone."""
    find = "import importlib.util; print(importlib.util.find_spec('singlepass').origin)"
    folder = Path(clean_python(find)).parent
    shutil.copytree(folder, tmp_path / "kept")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)


@pytest.mark.slow("builds the wheel")
def test_imports_away_from_the_repository(clean_python: Run, root: Path) -> None:
    report = json.loads(clean_python(REPORT))  # which also shows that importing prints nothing
    assert not Path(report["folder"]).is_relative_to(root)
    path = f"{report['folder']}/_C_cpu.so"
    assert report["cpu"] == {"loaded": True, "path": path, "reason": "", "remedy": ""}
    assert report["warned"] == []
    assert report["cuda"]["loaded"] or report["cuda"]["reason"]


@pytest.mark.slow("builds the wheel")
def test_console_script_is_installed(clean_python: Run) -> None:
    code = "from importlib.metadata import distribution as d; print(*(e.load() for e in d('singlepass').entry_points))"
    assert "function main" in clean_python(code)


@pytest.mark.slow("imports torch in a process of its own")
def test_a_broken_library_does_not_break_the_import(clean_python: Run, installed: Path) -> None:
    """One that is truncated. What is said of others does not depend on how the package is installed:
    tests/test_native.py damages them in many ways, in its own process."""
    library = installed / "_C_cpu.so"
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    report = json.loads(clean_python(REPORT))
    status = report["cpu"]
    assert not status["loaded"]
    assert "is truncated" in status["reason"]
    assert "\n" not in status["reason"]
    (warned,) = report["warned"]
    assert status["reason"] in warned
    assert status["remedy"] in warned


def test_a_library_of_another_cuda_major_is_not_loaded(clean_python: Run, installed: Path) -> None:
    for library in installed.glob("_C_cuda*.so"):  # which fits where torch is for CUDA
        library.unlink()
    (installed / "_C_cuda11.so").write_text("never opened")
    (installed / "build_info.json").write_text(
        json.dumps({"torch": "2.10.0+cu110", "cuda": {"11": {"version": "11.0"}}})
    )
    as_cuda_torch = "import torch; torch.version.cuda = '13.0'\n"
    status = json.loads(clean_python(as_cuda_torch + REPORT))["cuda"]
    assert not status["loaded"]
    assert "are built for CUDA 11.0" in status["reason"]
    assert "for CUDA 13.0" in status["reason"]
