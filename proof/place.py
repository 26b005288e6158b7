# SPDX-License-Identifier: Apache-2.0
"""Where a proof runs: a copy of the tree in a scratch folder, so that only the results are written to."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What building, testing and measuring take; folders and files of the tree.
TREE = ("bench", "counting", "csrc", "proof", "python", "tests", "triton_kernels")
FILES = ("CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")
# Packages without compiled code that a bare machine may lack: they travel as wheels.
TOOLS = (
    *("attrs", "exceptiongroup", "hypothesis", "iniconfig", "markdown-it-py", "mdurl", "packaging"),
    *("pluggy", "pygments", "pytest", "rich", "sortedcontainers", "tomli"),
)
MODELS = "bench/results/model"  # folder of predictions, of which the newest is taken
COMMIT = "COMMIT"  # file that says what a tree without history was taken from
LIBRARIES = "python/singlepass/_C_*.so"


@dataclass(frozen=True)
class Place:
    """device: "cuda", or "cpu" for a rehearsal. results: the only folder that is written to. scratch: inside of it."""

    device: str
    results: Path
    scratch: Path

    @property
    def tree(self) -> Path:
        return self.scratch / "tree"

    @property
    def environment(self) -> dict[str, str]:
        """Of every stage: the copied package, the packages that travel, and caches in the scratch folder."""
        folders = self.scratch / "site", self.tree, ROOT / "peers", self.scratch / "tools"
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else the machine has for pytest
            "MPLCONFIGDIR": str(self.scratch / "matplotlib"),
            "TMPDIR": str(self.scratch / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "TRITON_CACHE_DIR": str(self.triton_cache),
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SINGLEPASS_")}
        return kept | own

    @property
    def triton_cache(self) -> Path:
        return self.scratch / "triton"


def make(device: str, results: Path) -> Place:
    """Copies the tree, lays the package out as it is installed, and unpacks the tools that are missing here."""
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    place = Place(device, results, Path(tempfile.mkdtemp(prefix=".proof-", dir=results)))
    for folder in ("site/singlepass", "tmp", "tools"):
        (place.scratch / folder).mkdir(parents=True)
    copy_tree(ROOT, place.tree)
    package = place.scratch / "site" / "singlepass"
    for path in (
        *(place.tree / "python" / "singlepass").iterdir(),
        place.tree / "triton_kernels",
        place.tree / "bench",
    ):
        (package / path.name).symlink_to(path)
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        unpack(wheel, place.scratch / "tools")
    return place


def copy_tree(source: Path, target: Path) -> None:
    """What a proof takes of a tree, with the libraries that are built in it and the name of its commit."""
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in TREE:
        shutil.copytree(source / name, target / name, ignore=junk, dirs_exist_ok=True)
    for name in FILES:
        shutil.copy2(source / name, target / name)
    if models := sorted((source / MODELS).glob("*.json")):
        (target / MODELS).mkdir(parents=True, exist_ok=True)
        shutil.copy2(models[-1], target / MODELS)
    (target / COMMIT).write_text(commit_of(source) + "\n")


def commit_of(tree: Path) -> str:
    """Short hash, with a plus if tracked files differ from it; "unknown" without history."""
    if (tree / COMMIT).exists():
        return (tree / COMMIT).read_text().strip()
    try:
        command = ["git", "-C", str(tree), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def unpack(wheel: Path, folder: Path) -> None:
    """What a wheel installs at the top, unless this Python has it already."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0].removesuffix(".py") for name in archive.namelist()}
        modules = {top for top in tops if top.isidentifier()}
        if any(importlib.util.find_spec(module) is None for module in modules):
            archive.extractall(folder)
