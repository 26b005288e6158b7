# SPDX-License-Identifier: Apache-2.0
"""Native libraries that do not load: who is warned, of what, and who is not."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import singlepass
from singlepass import _native

PACKAGE = Path(singlepass.__file__).parent
BUILT = PACKAGE / "_C_cpu.so"
CPU_BUILD = {"torch": "2.13.0", "cuda": {}, "cuda_reason": "no nvcc"}
CUDA_13 = {"torch": "2.13.0+cu130", "cuda": {"13": {"version": "13.0"}}}
BOTH = {"torch": "2.13.0+cu130", "cuda": {"12": {"version": "12.4"}, "13": {"version": "13.0"}}}

Damage = Callable[[Path], object]


def renamed(path: Path, name: bytes, old: bytes, new: bytes) -> None:
    """The built library, which needs the first symbol that matches under another name of the same length."""
    data = BUILT.read_bytes()
    (symbol, *_) = re.findall(name, data)
    path.write_bytes(data.replace(symbol, symbol.replace(old, new)))


def truncated(path: Path) -> None:
    data = BUILT.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def of_another_machine(path: Path) -> None:
    data = bytearray(BUILT.read_bytes())
    data[18:20] = b"\x08\x00"  # e_machine of ELF: MIPS
    path.write_bytes(data)


def of_another_libc(path: Path) -> None:
    renamed(path, rb"GLIBC_2\.\d+\0", b"_2.", b"_9.")


def of_another_torch(path: Path) -> None:
    renamed(path, rb"aoti_torch_\w+\0", b"aoti", b"none")


def missing(path: Path) -> None:
    assert not path.exists()


def garbage(path: Path) -> None:
    path.write_text("not a library " * 100)


AGAIN, HERE = "Install or build singlepass again.", "Build singlepass on this machine."
# damage, what the reason says, remedy
BROKEN: dict[str, tuple[Damage, str, str]] = {
    "missing": (missing, "_C_cpu.so is missing from ", AGAIN),
    "truncated": (truncated, "_C_cpu.so is truncated", AGAIN),
    "empty": (Path.touch, "file too short", HERE),
    "garbage": (garbage, "invalid ELF header", HERE),
    "other machine": (of_another_machine, "cannot open shared object file", HERE),
    "other glibc": (of_another_libc, "version `GLIBC_9.", HERE),
    "other torch": (of_another_torch, "undefined symbol: none_torch_", HERE),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder as the loader sees it: empty, nothing loaded from it yet."""
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_native, "_statuses", {})
    monkeypatch.setattr(_native, "build_info", functools.cache(_native.build_info.__wrapped__))
    return tmp_path


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: str | None = None, gpu: bool = False) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


def loaded_with() -> list[str]:
    """What loading warns of, the first and the second time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _native.load()
        _native.load()
        _native.status("cpu")
    assert all(warning.category is RuntimeWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("known", [True, False], ids=["built", "no build_info"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_cpu_library_that_does_not_load_warns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, known: bool
) -> None:
    pretend(monkeypatch)
    damage, reason, remedy = BROKEN[name]
    if known:
        (folder / "build_info.json").write_text(json.dumps(CPU_BUILD))
    damage(folder / "_C_cpu.so")
    lines = loaded_with()
    status = _native.status("cpu")
    assert not status.loaded
    if name == "missing" and not known:  # a source tree that was never built, or a wheel without native code
        assert not lines
        assert status.reason == f"_C_cpu.so is not in {folder}: not built"
        assert status.remedy == ""
        return
    assert reason in status.reason
    assert lines == [
        "singlepass: expected the native library for cpu, without which its ops run on slower backends; "
        f"got {status.reason}. {remedy}"
    ]
    assert "\n" not in lines[0]


def test_a_torch_below_the_floor_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cpu"))
    of_another_torch(folder / "_C_cpu.so")
    (line,) = loaded_with()
    assert "does not load under torch 2.9.1+cpu: " in line
    assert line.endswith(". Install torch 2.10 or newer.")


@pytest.mark.parametrize("written", ["", "[]", "{", "null"])
def test_an_unreadable_build_info_breaks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    pretend(monkeypatch)
    (folder / "build_info.json").write_text(written)
    (line,) = loaded_with()
    assert "_C_cpu.so is missing" in line


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no gpu"])
@pytest.mark.parametrize(
    ("torch_cuda", "build", "damage", "reason", "remedy"),
    [
        ("13.0", CPU_BUILD, missing, "no nvcc", None),
        ("13.0", {}, missing, "_C_cuda13.so is not in ", None),
        ("13.0", {"cuda": "13.0"}, missing, "_C_cuda13.so is not in ", None),  # as versions before 0.1 wrote it
        (None, CUDA_13, garbage, f"torch {torch.__version__} is built without CUDA", None),
        (None, CUDA_13, missing, f"torch {torch.__version__} is built without CUDA", None),
        ("13.0", CUDA_13, missing, "_C_cuda13.so is missing from ", AGAIN),
        ("13.2", CUDA_13, truncated, "_C_cuda13.so is truncated", AGAIN),
        ("13.2", CUDA_13, garbage, "invalid ELF header", HERE),
        ("13.0", CUDA_13, of_another_libc, "version `GLIBC_9.", HERE),
        ("12.6", BOTH, garbage, "_C_cuda12.so", HERE),
        ("12.6", BOTH, missing, "_C_cuda12.so is missing from ", AGAIN),
        ("12.6", CUDA_13, missing, "are built for CUDA 13.0, torch ", "Install or build singlepass for CUDA 12."),
        ("14.1", BOTH, missing, "are built for CUDA 12.4 and 13.0, torch ", "Install or build singlepass for CUDA 14."),
    ],
)
def test_a_cuda_library_warns_where_a_gpu_would_use_it(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_cuda: str | None,
    build: dict[str, object],
    damage: Damage,
    reason: str,
    remedy: str | None,
    gpu: bool,
) -> None:
    pretend(monkeypatch, torch_cuda, gpu)
    monkeypatch.setattr(_native, "_statuses", {"cpu": _native.LibraryStatus(True, BUILT)})
    if build:
        (folder / "build_info.json").write_text(json.dumps(build))
    damage(folder / f"_C_cuda{str(torch_cuda).partition('.')[0]}.so")
    lines = loaded_with()
    status = _native.status("cuda")
    assert reason in status.reason
    assert (status.loaded, status.remedy) == (False, remedy if remedy and gpu else "")
    assert len(lines) == (remedy is not None and gpu)
    assert all("the native library for cuda" in line and status.reason in line for line in lines)


IMPORTS = """
import json, os, sys, warnings
import torch  # once, for all
for folder in sys.argv[1:]:
    if os.fork() == 0:
        sys.path.insert(0, folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import singlepass
        assert singlepass.__file__.startswith(folder), singlepass.__file__
        print(json.dumps([[w.category.__name__, w.filename, str(w.message)] for w in caught]))
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_imports_warn_once_where_the_package_is_imported(tmp_path: Path) -> None:
    root = PACKAGE.parents[1]
    healthy, broken, pure = (tmp_path / name for name in ("healthy", "broken", "pure"))
    native = {"_C_cpu.so", "_C_cuda12.so", "_C_cuda13.so", "build_info.json", "__pycache__"}
    for folder in (healthy, broken, pure):
        package = folder / "singlepass"
        package.mkdir(parents=True)
        for path in [*PACKAGE.iterdir(), root / "triton_kernels", root / "bench"]:
            if path.name not in native and not (package / path.name).exists():
                (package / path.name).symlink_to(path)
    for name in native & {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}:
        (healthy / "singlepass" / name).symlink_to(PACKAGE / name)
    (broken / "singlepass" / "build_info.json").symlink_to(PACKAGE / "build_info.json")
    command = [sys.executable, "-W", "error", "-c", IMPORTS, *map(str, (healthy, broken, pure))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    of_healthy, of_broken, of_pure = map(json.loads, done.stdout.splitlines())
    assert of_healthy == of_pure == []
    ((category, filename, text),) = of_broken
    assert (category, filename) == ("RuntimeWarning", "<string>")
    assert text.startswith("singlepass: expected the native library for cpu, ")
