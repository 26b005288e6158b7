# SPDX-License-Identifier: Apache-2.0
"""The CPU library compiles and links for aarch64, with a cross compiler and that platform's torch. It is not run."""

from __future__ import annotations

import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from .test_release import FLOOR
from .test_wheel import ALLOWED, FLOORS, needed, newest_versions, symbols

pytestmark = [
    pytest.mark.release("fetches a compiler and a torch of 200 MB, and compiles for minutes"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="the compiler comes from apt-get, which is not here"),
]


def run(*command: str | Path, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The distribution's own, unpacked into a folder of the test. Nothing is installed."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (tmp_path / "apt" / name).mkdir(parents=True)
    own = [f"-oDir::State={tmp_path}/apt/state", f"-oDir::Cache={tmp_path}/apt/cache", "-oAPT::Sandbox::User=root"]
    apt = ("apt-get", "-qq", "-y", "-oDir::State::status=/var/lib/dpkg/status", *own)
    run(*apt, "update", folder=tmp_path)
    run(*apt, "install", "--download-only", "--no-install-recommends", "g++-aarch64-linux-gnu", folder=tmp_path)
    for package in (tmp_path / "apt" / "cache" / "archives").glob("*.deb"):
        run("dpkg-deb", "-x", package, tmp_path / "compiler", folder=tmp_path)
    libraries = tmp_path / "compiler" / "usr" / "lib" / f"{platform.machine()}-linux-gnu"  # of the compiler itself
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    return next((tmp_path / "compiler" / "usr" / "bin").glob("aarch64-linux-gnu-g++-[0-9]*"))


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    """What the oldest supported torch has for compilers."""
    target = ("--only-binary=:all:", "--platform=manylinux_2_28_aarch64", "--python-version=3.12")
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *target, FLOOR, folder=tmp_path)
    (wheel,) = tmp_path.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = re.compile(r"torch/include/|torch/lib/lib(torch_cpu|c10)\.so$")
        archive.extractall(tmp_path, [name for name in archive.namelist() if wanted.match(name)])
    return tmp_path / "torch"


def test_the_cpu_library_for_aarch64(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Path, torch: Path
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("SINGLEPASS_WITH_CUDA", "0")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    (extension,), _ = runpy.run_path("setup.py")["libraries"]()

    includes = [f"-isystem{torch}/include", f"-isystem{torch}/include/torch/csrc/api/include"]
    flags = [*extension.extra_compile_args["cxx"], f"-I{root / 'csrc'}", *includes]
    flags += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]
    objects = [tmp_path / f"{index}.o" for index, _ in enumerate(extension.sources)]
    for source, made in zip(extension.sources, objects, strict=True):
        run(compiler, *flags, "-c", source, "-o", made, folder=root)
    library = tmp_path / "_C_cpu.so"
    links = [*extension.extra_link_args, f"-L{torch}/lib", *(f"-l{name}" for name in extension.libraries)]
    system = compiler.parents[2]  # where its linker scripts find the C library
    run(compiler, f"--sysroot={system}", "-shared", *objects, *links, "-o", library, folder=root)

    with library.open("rb") as file:
        assert ELFFile(file)["e_machine"] == "EM_AARCH64"
    assert needed(library) <= ALLOWED["_C_cpu.so"]
    assert not [name for name, defined in symbols(library).items() if defined]
    newest = newest_versions(library)
    assert "GLIBC" in newest
    assert all(newest[name] <= FLOORS[name] for name in newest.keys() & FLOORS)
