# SPDX-License-Identifier: Apache-2.0
"""What is published: wheels for a CUDA version, for two of them, or for none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from .tool import tool

INFO = "singlepass/build_info.json"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/wheels.py, which writes to a folder of the test."""
    module = tool("wheels")
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(module, "DIST", tmp_path / "dist")
    return module


def with_cuda(wheel: Path, version: str, folder: Path) -> Path:
    """The wheel with a stand-in for the library of a CUDA version."""
    major = version.split(".")[0]
    tree = folder / "tree"
    run = (sys.executable, "-m", "wheel")
    subprocess.run([*run, "unpack", "-d", tree, wheel], check=True, capture_output=True)
    (package,) = tree.iterdir()
    shutil.copy(package / "singlepass" / "_C_cpu.so", package / "singlepass" / f"_C_cuda{major}.so")
    info = json.loads((package / INFO).read_text()) | {"cuda": {major: {"version": version}}, "cuda_reason": ""}
    (package / INFO).write_text(json.dumps(info))
    subprocess.run([*run, "pack", "-d", folder, package], check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow("builds the wheel")
def test_one_wheel_holds_the_libraries_of_both_cuda_versions(
    wheels: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("12", "13", "again"):
        (tmp_path / name).mkdir()
    parts = [with_cuda(wheel, "13.0", tmp_path / "13"), with_cuda(wheel, "12.4", tmp_path / "12")]
    before = [part.read_bytes() for part in parts]
    monkeypatch.setattr(wheels, "commit_time", lambda: "1700000000")
    merged = wheels.merge(*parts)
    assert merged.name == wheel.name
    with zipfile.ZipFile(merged) as archive, zipfile.ZipFile(parts[0]) as first:
        assert archive.testzip() is None
        assert set(archive.namelist()) == {*first.namelist(), "singlepass/_C_cuda12.so"}
        info = json.loads(archive.read(INFO))
    assert info["cuda"] == {"13": {"version": "13.0"}, "12": {"version": "12.4"}}
    assert info["cuda_reason"] == ""
    assert [part.read_bytes() for part in parts] == before

    tree = tmp_path / "unpacked"  # which compares each file with its hash in RECORD
    subprocess.run([sys.executable, "-m", "wheel", "unpack", "-d", tree, merged], check=True, capture_output=True)
    data = merged.read_bytes()
    assert wheels.merge(*parts).read_bytes() == data


def test_what_is_published_is_tagged_for_the_systems_of_torch(
    wheels: ModuleType, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "commit_time", lambda: "1700000000")
    made = wheels.publishable(wheel)
    data = made.read_bytes()
    assert made.parent == wheels.DIST
    version = wheel.name.split("-")[1]
    assert made.name == f"singlepass-{version}-py3-none-{wheels.PLATFORM}.whl"
    with zipfile.ZipFile(made) as repaired, zipfile.ZipFile(wheel) as original:
        files = {name for name in repaired.namelist() if not name.endswith("/")}
        assert files == set(original.namelist())
        same = files - {f"singlepass-{version}.dist-info/{name}" for name in ("WHEEL", "RECORD")}
        assert all(repaired.read(name) == original.read(name) for name in same)
    assert wheels.publishable(wheel).read_bytes() == data


def test_the_size_of_each_kernel_is_printed_and_that_of_files_is_bounded(
    wheels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    torches = {"13": "2.14.1+cu130", "12": "2.10.0+cu128"}
    for number, source in enumerate(("csrc/kv/decode.cu", "csrc/optim/step.cu")):
        for major, torch in torches.items():
            compiled = Path(f"build/native-torch-{torch}/cuda{major}", source).with_suffix(".o")
            for path, data in ((source, b""), (compiled, bytes(1000 * int(major) + number))):
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(data)
    made = [tmp_path / "both.whl", tmp_path / "cpu.whl", tmp_path / "sources.tar.gz"]
    for path, cuda in zip(made, (torches, {}, {}), strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(INFO, json.dumps({"cuda": {major: {"torch": torch} for major, torch in cuda.items()}}))
    sizes = [f"{path.stat().st_size:,} bytes" for path in made]

    wheels.report(made)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["both.whl:", *sizes[0].split()],
        ["_C_cuda12.so", "12,001", "csrc/optim/step.cu"],
        ["_C_cuda12.so", "12,000", "csrc/kv/decode.cu"],
        ["_C_cuda13.so", "13,001", "csrc/optim/step.cu"],
        ["_C_cuda13.so", "13,000", "csrc/kv/decode.cu"],
        ["cpu.whl:", *sizes[1].split()],
        ["sources.tar.gz:", *sizes[2].split()],
    ]
    monkeypatch.setattr(wheels, "MOST_BYTES", made[0].stat().st_size - 1)
    with pytest.raises(SystemExit, match=r"^wheels: expected at most \d+ bytes a file; got more in both\.whl\. "):
        wheels.report(made)


def test_sources_of_a_release_have_all_that_is_built_and_no_test(wheels: ModuleType, root: Path) -> None:
    with tarfile.open(wheels.sdist()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    built = {path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*.*") if path.is_file()}
    assert built | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".so", "build_info.json"))]


def test_a_toolkit_of_another_version_is_refused(
    wheels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert wheels.toolkit_for("13") == (tmp_path, "cu130")
    with pytest.raises(SystemExit, match=rf"expected a CUDA 12 toolkit; got CUDA_HOME={tmp_path}\. Unset it"):
        wheels.toolkit_for("12")


@pytest.mark.parametrize("arguments", [[], ["cu11"], ["cpu", "cu12"]])
def test_other_kinds_are_refused(root: Path, arguments: list[str]) -> None:
    command = [sys.executable, root / "tools" / "wheels.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    got = " ".join(arguments) or "none"
    assert done.stderr == f"make wheel: expected CUDA=cpu, cu12 or cu13; got {got}.\n"
