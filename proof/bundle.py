# SPDX-License-Identifier: Apache-2.0
"""One archive with everything that a proof takes on a machine without network, compiler or this tree's history."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .place import LIBRARIES, ROOT, TOOLS, copy_tree

MOST_BYTES = 60_000_000
NAME = "singlepass-gpu-proof"


def make(output: Path, peers: Path | None = None) -> list[str]:
    """Writes the archive and returns what is to be said of it.

    Raises:
        ValueError: no CUDA library in the tree, a folder of peers that is none, or an archive that is too large.
    """
    libraries = sorted(ROOT.glob(LIBRARIES))
    if not any(path.name.startswith("_C_cuda") for path in libraries):
        raise ValueError("proof bundle: expected python/singlepass/_C_cuda*.so; got none. Build it with a CUDA torch.")
    if peers is not None and not peers.is_dir():
        raise ValueError(f"proof bundle: expected a folder of peers; got {peers}. Leave it out to take none.")
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch, NAME)
        copy_tree(ROOT, top)
        download(top / "wheels")
        if peers is not None:
            shutil.copytree(peers, top / "peers", ignore=shutil.ignore_patterns(".git", "__pycache__"))
        output.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(output, "w:gz") as archive:
            archive.add(top, NAME)
    size = output.stat().st_size
    if size > MOST_BYTES:
        output.unlink()
        raise ValueError(
            f"proof bundle: expected at most {MOST_BYTES:,} bytes; got {size:,}. Build for fewer architectures: "
            "TORCH_CUDA_ARCH_LIST."
        )
    lines = [f"{output}: {size:,} bytes"]
    lines += [f"{path.name} asks for {', '.join(asked(path)) or 'no versions'}" for path in libraries]
    return [*lines, f"there: tar xf {output.name} && cd {NAME} && make gpu-proof"]


def download(folder: Path) -> None:
    """Wheels without compiled code, which serve any Python that the tests run on."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--platform=any"]
    subprocess.run([*command, "-d", str(folder), *TOOLS], check=True)


def asked(library: Path) -> list[str]:
    """The newest versions that a library needs of glibc and of the C++ runtime, read from its symbols' names."""
    found = re.findall(rb"\b(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)\0", library.read_bytes())
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in found:
        numbers = tuple(map(int, version.decode().split(".")))
        newest[name.decode()] = max(newest.get(name.decode(), ()), numbers)
    return [f"{name} {'.'.join(map(str, numbers))}" for name, numbers in sorted(newest.items())]
