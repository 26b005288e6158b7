# SPDX-License-Identifier: Apache-2.0
"""Lists that must agree with what is in the tree."""

from __future__ import annotations

import json
import re
from pathlib import Path


def modules(root: Path) -> list[Path]:
    return [path for folder in ("python", "triton_kernels", "bench") for path in (root / folder).rglob("*.py")]


def test_every_folder_of_sources_is_built_or_for_tests(root: Path) -> None:
    built = json.loads((root / "csrc" / "sources.json").read_text())["folders"]
    found = {path.parent.name for pattern in ("*/*.cpp", "*/*.cu") for path in (root / "csrc").glob(pattern)}
    assert sorted(built) == sorted(found - {"pybind", "simt", "tests", "torch"})


def test_only_registration_includes_torch(root: Path) -> None:
    """Kernels and mathematics see neither torch nor Python, so that they are built and run without."""
    forbidden = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11)')
    paths = {path for path in (root / "csrc").rglob("*.*") if forbidden.search(path.read_text())}
    registrations = set((root / "csrc").glob("*/torch.h"))
    assert len(registrations) == 4
    assert {path for path in paths if path.parent.name not in ("torch", "pybind")} <= registrations


def test_families_include_themselves_and_what_they_share(root: Path) -> None:
    """The optimizer of sparse spectral training builds on optim."""
    folders = json.loads((root / "csrc" / "sources.json").read_text())["folders"]
    for path in (path for folder in folders for path in (root / "csrc" / folder).iterdir()):
        included = set(re.findall(r'#include "(\w+)/', path.read_text()))
        allowed = {path.parent.name, "common", "torch" if path.stem == "torch" else "simt"}
        assert included <= allowed | ({"optim"} if path.parent.name == "spectral" else set()), path


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
