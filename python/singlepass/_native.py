# SPDX-License-Identifier: Apache-2.0
"""Loads the native libraries and remembers, for each one that could not be loaded, why.

`_C_cpu.so` and `_C_cuda.so` register C++ and CUDA implementations of ops whose schemas are written in Python. They are
plain shared libraries on the libtorch stable ABI: without them every op still exists, and runs on another backend.
"""

from __future__ import annotations

import functools
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._ops import NAMESPACE

_PACKAGE = Path(__file__).parent
_statuses: dict[str, LibraryStatus] = {}


@dataclass(frozen=True)
class LibraryStatus:
    """One native library: whether it is loaded, where it is or should be, and if not loaded why, in one line."""

    loaded: bool
    path: Path
    reason: str = ""


def load() -> None:
    """Loads what can be loaded, once. A library that is missing, broken or built for another torch raises nothing."""
    for device in ("cpu", "cuda"):
        if device not in _statuses:
            _statuses[device] = _load(device)


def status(device: str) -> LibraryStatus:
    """How loading the library for `device`, "cpu" or "cuda", went."""
    load()
    return _statuses[device]


def has_kernel(name: str, device: str) -> bool:
    """Whether a library that is loaded has registered the op for its device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device.upper())


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build wrote down: versions, flags, CUDA architectures, why there is no CUDA library. Empty before it."""
    try:
        info: dict[str, Any] = json.loads((_PACKAGE / "build_info.json").read_text())
        return info
    except (OSError, ValueError):
        return {}


def _load(device: str) -> LibraryStatus:
    path = _PACKAGE / f"_C_{device}.so"
    try:
        reason = _obstacle(device, path)
        if not reason:
            torch.ops.load_library(path)
            return LibraryStatus(True, path)
    except (OSError, RuntimeError) as error:
        built_with = build_info().get("torch", "unknown")
        cause = error.__cause__ or error  # torch wraps the loader's own message
        reason = f"{path.name} (built with torch {built_with}) does not load under torch {torch.__version__}: {cause}"
    return LibraryStatus(False, path, " ".join(reason.split()))


def _obstacle(device: str, path: Path) -> str:
    """The reason not even to try, or an empty string."""
    info = build_info()
    if device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not path.is_file():
        return info.get(f"{device}_reason") or f"{path.name} is not in {path.parent}: not built"
    built_cuda = info.get("cuda")
    if device == "cuda" and built_cuda and built_cuda.split(".")[0] != str(torch.version.cuda).split(".")[0]:
        return f"{path.name} is built for CUDA {built_cuda}, torch {torch.__version__} for CUDA {torch.version.cuda}"
    if _is_truncated(path):
        return f"{path} is truncated: install or build it again"
    return ""


def _is_truncated(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section table does. The loader would map it and die of a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False  # the loader refuses these by itself
    byte_order = "<" if header[5] == 1 else ">"
    (table,) = struct.unpack_from(byte_order + "Q", header, 40)
    entry_size, entries = struct.unpack_from(byte_order + "HH", header, 58)
    return path.stat().st_size < table + entry_size * entries
