# SPDX-License-Identifier: Apache-2.0
"""Lists that must agree with what is in the tree."""

from __future__ import annotations

import json
import re
from pathlib import Path


def modules(root: Path) -> list[Path]:
    return [path for folder in ("python", "triton_kernels", "bench") for path in (root / folder).rglob("*.py")]


def sources(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in (root / "csrc" / folder).rglob("*.*")]


def test_every_source_is_in_the_manifest_once(root: Path) -> None:
    manifest = json.loads((root / "csrc" / "sources.json").read_text())
    listed = [path for key in ("core_cpu", "core_cuda", "torch_cpu", "torch_cuda") for path in manifest[key]]
    found = [path for path in sources(root, "cpu", "cuda", "torch") if path.suffix in {".cpp", ".cu"}]
    assert sorted(listed) == sorted(path.relative_to(root / "csrc").as_posix() for path in found)


def test_core_includes_neither_torch_nor_python(root: Path) -> None:
    core = sources(root, "include", "cpu", "cuda")
    forbidden = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11)')
    assert core
    assert not [path for path in core if forbidden.search(path.read_text())]


def test_every_environment_variable_is_documented(root: Path) -> None:
    """C++ macros of the same prefix don't count: they are given to a compiler by -D, or stand in csrc/ only."""
    files = [root / "setup.py", root / "Makefile", *modules(root)]
    used = {name for path in files for name in re.findall(r"(?<!-D)\bSINGLEPASS_[A-Z_]+\b", path.read_text())}
    rows = [line.split("|")[1] for line in (root / "ENVS.md").read_text().splitlines() if line.startswith("| `")]
    assert used == set(re.findall(r"SINGLEPASS_[A-Z_]+", " ".join(rows)))


def test_version_stands_in_one_place(root: Path) -> None:
    init = root / "python" / "singlepass" / "__init__.py"
    (version,) = re.findall(r'^__version__ = "(.*)"$', init.read_text(), re.M)
    others = [root / "setup.py", root / "pyproject.toml", root / "CMakeLists.txt", *modules(root)]
    assert not [path for path in others if path != init and f'"{version}"' in path.read_text()]
