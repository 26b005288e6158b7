# SPDX-License-Identifier: Apache-2.0
"""What `make hub` exports is what the package `kernels` loads, several versions in one process."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .tool import tool

IDENTIFIER = "singlepass_cpu_0123456789"
# A step of two loaded packages and of plain PyTorch.
STEP = """
def step(package):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    parameter.grad = torch.linspace(1, -2, 1000)
    package.optim.Lion([parameter], lr=0.1, weight_decay=0.5).step()
    return parameter.detach()

expected = 0.95 * torch.linspace(-1, 1, 1000) - 0.1 * torch.linspace(1, -2, 1000).sign()
"""


@pytest.fixture
def variant(wheel: Path, tmp_path: Path) -> Path:
    """Of the wheel, whose libraries are in the namespace singlepass: here its kernels are not found, and plain PyTorch
    runs."""
    made = tool("hub").export(wheel, IDENTIFIER, tmp_path)
    assert isinstance(made, Path)
    return made


@pytest.mark.slow("builds the wheel")
def test_where_it_stands_and_what_it_says_of_itself(variant: Path, unpacked: Path, tmp_path: Path) -> None:
    info = json.loads((unpacked / "singlepass" / "build_info.json").read_text())
    cuda = next(iter(info["cuda"].values()), None)
    backend = f"cu{cuda['version'].replace('.', '')}" if cuda else "cpu"
    assert variant == tmp_path / "build" / f"torch-stable-abi210-{backend}-{platform.machine()}-linux"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"]["type"] == ("cuda" if cuda else "cpu")
    hashes = metadata.pop("digest")["files"]
    assert metadata["name"] == "singlepass"
    assert metadata["id"] == IDENTIFIER
    assert metadata["version"] == int(info["version"].split(".")[0])
    found = {p.relative_to(variant).as_posix(): p.read_bytes() for p in variant.rglob("*") if p.is_file()}
    del found["metadata.json"]
    assert hashes == {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in found.items()}
    assert {"__init__.py", "_C_cpu.so", "build_info.json", "rational/tables.json"} <= found.keys()
    assert not [name for name in found if name.startswith("bench/") or name == "_cli.py"]
    assert "license: apache-2.0" in (tmp_path / "README.md").read_text()


def test_no_module_imports_the_package_by_its_name(variant: Path) -> None:
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.partition(".")[0] == "singlepass"], path


def test_it_is_imported_under_its_own_name(variant: Path) -> None:
    """As `kernels` does it."""
    code = f"""
import importlib.util, sys, torch
{STEP}
spec = importlib.util.spec_from_file_location({IDENTIFIER!r}, {str(variant / "__init__.py")!r})
package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
torch.testing.assert_close(step(package), expected)
assert torch.ops.{IDENTIFIER}.lion_step_
assert not [name for name in sys.modules if name.partition(".")[0] == "singlepass"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_a_commit_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tool("hub")
    monkeypatch.setattr(hub.wheels, "run", lambda *command: " M setup.py\n")
    with pytest.raises(SystemExit, match=r"^hub: expected a clean tree, .*; got changes\. Commit them\.$"):
        hub.main("cpu")


@pytest.mark.parametrize("arguments", [[], ["release"], ["cpu", "cu12"]])
def test_other_kinds_are_refused(root: Path, arguments: list[str]) -> None:
    command = [sys.executable, root / "tools" / "hub.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"make hub: expected CUDA=cpu, cu12 or cu13; got {' '.join(arguments) or 'none'}.\n"


@pytest.mark.release("builds two versions, and installs the package kernels")
def test_kernels_loads_two_versions_in_one_process(root: Path, tmp_path: Path) -> None:
    def run(*command: str | Path, folder: Path) -> str:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    clone = tmp_path / "clone"
    run("git", "clone", "-q", root, clone, folder=tmp_path)
    for name in ("one", "two"):
        run("git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", name, folder=clone)
        run(sys.executable, "tools/hub.py", "cpu", folder=clone)
        shutil.move(clone / "build" / "hub", tmp_path / name)

    venv.create(tmp_path / "environment", with_pip=True, symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "kernels==0.17.2", "kernel-abi-check==0.14.1", folder=tmp_path)
    site_packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "environment")})
    Path(site_packages, "torch.pth").write_text(sysconfig.get_path("purelib"))  # without what path files there add
    code = f"""
import os, sys, torch
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
from kernels import get_local_kernel, get_loaded_kernels
from kernels._rust import Digest, Metadata
from kernel_abi_check import ObjectFile
{STEP}
packages = [get_local_kernel(Path({str(tmp_path)!r}, name)) for name in ("one", "two")]
for package in packages:
    assert package._native.status("cpu").loaded, package._native.status("cpu")
    assert package._native.has_kernel("lion_step_", "cpu")
    torch.testing.assert_close(step(package), expected)
assert torch.equal(step(packages[0]), step(packages[1]))
assert len({{loaded.metadata.id for loaded in get_loaded_kernels()}}) == 2
assert not [name for name in sys.modules if name.partition(".")[0] == "singlepass"]
for name in ("one", "two"):
    (variant,) = Path({str(tmp_path)!r}, name, "build").iterdir()
    expected = Metadata.read_from_file(variant / "metadata.json").digest
    expected.validate(Digest.hash_variant(expected.algorithm, variant))
    assert not ObjectFile(variant / "_C_cpu.so").check_manylinux("manylinux_2_28")
"""
    run(python, "-c", code, folder=tmp_path)
