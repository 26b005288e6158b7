# SPDX-License-Identifier: Apache-2.0
"""Before a release: other torches, other Pythons, and clean environments, as users have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .tool import ROOT

FLOOR, NEWEST = "torch==2.10.0", "torch"
PAIRS = (("3.10", FLOOR), ("3.11", "torch==2.13.0"), ("3.12", NEWEST), ("3.13", "torch==2.14.1"))
QUICK = (
    "kv/test_layer_usage.py",
    "optim/test_usage.py",
    "rational/test_group_rational.py",
    "rational/test_kat_layers.py",
    "spectral/test_usage.py",
)
WITH_TORCHVISION = ("torch==2.14.1", "torchvision==0.29.1", "timm", "lightning")
PIP = "pip>=25.1"  # knows dependency groups
FOR_TESTS = ("--group", f"{ROOT / 'pyproject.toml'}:test")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

pytestmark = pytest.mark.release("each test sets up an environment of its own, with a torch of up to three gigabytes")


def run(*command: str | Path, folder: Path, **settings: str) -> str:
    cleared = ("CUDA_HOME", "PYTHON", "SINGLEPASS", "PYTEST", "MAKE", "JOBS", "VENV", "TORCH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(cleared)} | settings
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def interpreter(version: str) -> str:
    """The path of this Python. A name on PATH may be one that starts nothing."""
    code = f"python{version} -c 'import sys; print(sys.executable)'"
    found = subprocess.run(["sh", "-c", code], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no python{version} on PATH")
    return found.stdout.strip()


def fresh(folder: Path, *requirements: str | Path, of: str = sys.executable, **settings: str) -> Path:
    """The Python of a new environment with these packages."""
    run(of, "-m", "venv", "environment", folder=folder)
    python = folder / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", PIP, folder=folder)
    printed = run(python, "-m", "pip", "install", "-q", *requirements, folder=folder, **settings)
    assert "does not provide the extra" not in printed  # of which pip only warns
    return python


@pytest.mark.parametrize(("version", "torch"), PAIRS)
def test_one_wheel_serves_every_python_and_torch(wheel: Path, tmp_path: Path, version: str, torch: str) -> None:
    python = fresh(tmp_path, torch, wheel, *FOR_TESTS, of=interpreter(version))
    assert f"native cpu: {tmp_path}" in run(python, "-m", "singlepass", "info", "--check", folder=tmp_path)
    run(python, "-m", "pip", "check", folder=tmp_path)
    assert " passed" in run(python, "-m", "pytest", *(f"tests/{name}" for name in QUICK), folder=ROOT).splitlines()[-1]


def test_training_under_timm_and_lightning(root: Path, wheel: Path, tmp_path: Path) -> None:
    """timm needs torchvision, which does not import with the torch of `make test`. Blocks of the guides run too."""
    python = fresh(tmp_path, *WITH_TORCHVISION, wheel, *FOR_TESTS)
    chosen = ["python/singlepass/optim/_timm.py", "tests/examples/test_documents.py"]
    chosen += [f"tests/optim/test_{name}.py" for name in ("timm", "lightning")]
    printed = run(python, "-m", "pytest", "-m", "", "-k", "timm or lightning or training.md", *chosen, folder=root)
    assert " passed" in printed
    assert "skipped" not in printed


def test_the_same_commit_gives_the_same_cpu_wheel_in_every_folder(root: Path, tmp_path: Path) -> None:
    made = []
    for name in ("one", "another one"):
        run("git", "clone", "-q", root, tmp_path / name, folder=tmp_path)
        run(sys.executable, "tools/wheels.py", "cpu", folder=tmp_path / name)
        (wheel,) = (tmp_path / name / "dist").iterdir()
        made.append((wheel.name, wheel.read_bytes()))
    assert made[0] == made[1]


def test_the_sources_of_a_release_install_and_fetch_what_they_build_with(root: Path, tmp_path: Path) -> None:
    """In a build environment of pip's own. Without CUDA, which would be compiled for seven architectures."""
    run("git", "clone", "-q", root, tmp_path / "clone", folder=tmp_path)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "dist", folder=tmp_path / "clone")
    (archive,) = (tmp_path / "dist").iterdir()
    python = fresh(tmp_path, archive, SINGLEPASS_WITH_CUDA="0")
    assert "_C_cpu.so" in run(python, "-m", "singlepass", "info", "--check", folder=tmp_path)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_a_wheel_with_the_cuda_library(root: Path, tmp_path: Path) -> None:
    run("git", "clone", "-q", root, tmp_path / "clone", folder=tmp_path)
    python = fresh(tmp_path, NEWEST, "setuptools>=77", "ninja", "numpy")
    build = ("pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path / "dist", tmp_path / "clone")
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"SINGLEPASS_WITH_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "2", "PATH": path}
    run(python, "-m", *build, folder=tmp_path, **settings)
    run(python, "-m", "pip", "install", "-q", *(tmp_path / "dist").iterdir(), folder=tmp_path)
    code = "from singlepass import _native as n; print(n.status('cpu').loaded, n.status('cuda').loaded)"
    assert run(python, "-c", code, folder=tmp_path).split() == ["True", "True"]


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="CUDA 12's compiler comes from apt-get, which is not here")
def test_the_cuda_12_library_links_and_loads_with_the_oldest_torch(root: Path, tmp_path: Path) -> None:
    """From a wheel and from a variant for the Hub, for one architecture. It is not run, which takes a GPU."""
    clone = tmp_path / "clone"
    run("git", "clone", "-q", root, clone, folder=tmp_path)
    for script in ("wheels", "hub"):
        settings = {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "2"}
        run(sys.executable, f"tools/{script}.py", "cu12", folder=clone, **settings)
    (wheel,) = (clone / "dist").iterdir()
    python = clone / "build" / "wheels" / f"env-{FLOOR}" / "bin" / "python"  # that built it
    run(python, "-m", "pip", "install", "-q", wheel, "kernels==0.17.2", "kernel-abi-check==0.14.1", folder=tmp_path)
    code = """
from pathlib import Path
import singlepass
from kernel_abi_check import ObjectFile
from kernels import get_local_kernel

for package in (singlepass, get_local_kernel(Path("clone", "build", "hub"))):
    for status in map(package._native.status, ("cpu", "cuda")):
        assert status.loaded, status
        assert not ObjectFile(status.path).check_manylinux("manylinux_2_28")
    assert package._native.has_kernel("lion_step_", "cuda")
    print(status.path.name)
"""
    assert run(python, "-c", code, folder=tmp_path, HF_HUB_OFFLINE="1").split() == ["_C_cuda12.so"] * 2


@pytest.mark.parametrize("python", PYTHONS)
def test_a_fresh_clone_passes_its_tests(root: Path, tmp_path: Path, python: str) -> None:
    """In a path with a space. Without CUDA, which would be compiled for seven architectures."""
    path = interpreter(python)
    clone = tmp_path / "a clone"
    run("git", "clone", "-q", root, clone, folder=tmp_path)
    outside = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != Path(sys.executable).parent]
    settings = {
        "PATH": os.pathsep.join(outside),
        "PYTEST": "tests/optim tests/simt/test_common.py tests/packaging/test_wheel.py",
        "SINGLEPASS_WITH_CUDA": "0",
    }
    assert " passed" in run("make", "test", f"PYTHON={path}", folder=clone, **settings).splitlines()[-1]
