# SPDX-License-Identifier: Apache-2.0
"""Loads the native libraries and remembers, for each one that could not be loaded, why.

`_C_cpu.so` registers C++ implementations of ops whose schemas are written in Python, and `_C_cuda12.so` or
`_C_cuda13.so` the CUDA ones, whichever is of torch's CUDA major version. They are plain shared libraries on the
libtorch stable ABI: without them every op still exists, and runs on another backend, on CPUs many times slower. An
installation that should have a library and cannot load it warns; one without is silent.
"""

from __future__ import annotations

import functools
import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._errors import message

_FLOOR = "2.10"  # of torch, as in pyproject.toml
_PACKAGE = Path(__file__).parent
_BUILD_INFO = "build_info.json"
_statuses: dict[str, LibraryStatus] = {}


@dataclass(frozen=True)
class LibraryStatus:
    """One native library: whether it is loaded, where it is or should be, and if not loaded why, in one line.

    ``remedy`` says what to do where the installation should have the library and the machine could use it; else it is
    empty.
    """

    loaded: bool
    path: Path
    reason: str = ""
    remedy: str = ""


def load() -> None:
    """Loads what can be loaded, once. A library that is missing, broken or built for another torch raises nothing.

    Warns:
        RuntimeWarning: once for each library that should be there but does not load.
    """
    new = [device for device in ("cpu", "cuda") if device not in _statuses]
    _statuses.update({device: _load(device) for device in new})
    for device in new:
        status = _statuses[device]
        if status.remedy:
            contract = f"the native library for {device}, without which its ops run on slower backends"
            text = message("singlepass", contract, status.reason, status.remedy)
            warnings.warn(text, RuntimeWarning, stacklevel=3)  # at the import of singlepass


def status(device: str) -> LibraryStatus:
    """How loading the library for `device`, "cpu" or "cuda", went."""
    load()
    return _statuses[device]


def has_kernel(name: str, device: str) -> bool:
    """Whether a library that is loaded has registered the op for its device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{__package__}::{name}", device.upper())


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build wrote down: versions, flags, CUDA architectures, why there is no CUDA library. Empty before it."""
    try:
        info = json.loads((_PACKAGE / _BUILD_INFO).read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _cuda_builds() -> dict[str, dict[str, Any]]:
    """What the build wrote down of each CUDA library, by its major version."""
    builds = build_info().get("cuda")
    return builds if isinstance(builds, dict) else {}


def _load(device: str) -> LibraryStatus:
    cuda = torch.version.cuda
    if device == "cuda" and cuda is None:
        return LibraryStatus(False, _PACKAGE, f"torch {torch.__version__} is built without CUDA")
    major = str(cuda).split(".")[0] if device == "cuda" else ""
    path = _PACKAGE / f"_C_{device}{major}.so"
    try:
        reason, remedy = _obstacle(path, major)
        if not reason:
            torch.ops.load_library(path)
            return LibraryStatus(True, path)
    except (OSError, RuntimeError) as error:
        built_with = (_cuda_builds().get(major) or build_info()).get("torch", "unknown")
        cause = error.__cause__ or error  # torch wraps the loader's own message
        reason = f"{path.name} (built with torch {built_with}) does not load under torch {torch.__version__}: {cause}"
        old = torch.__version__ < _FLOOR
        remedy = f"Install torch {_FLOOR} or newer." if old else "Build singlepass on this machine."
    if device == "cuda" and remedy and not torch.cuda.is_available():  # asked last, since it starts the driver
        remedy = ""
    return LibraryStatus(False, path, " ".join(reason.split()), remedy)


def _obstacle(path: Path, cuda_major: str) -> tuple[str, str]:
    """The reason not even to try, and a remedy if the installation should have the library. Both may be empty."""
    info, again = build_info(), "Install or build singlepass again."
    if path.is_file():
        return (f"{path} is truncated", again) if _is_truncated(path) else ("", "")
    built = _cuda_builds()
    if cuda_major in built or (not cuda_major and (_PACKAGE / _BUILD_INFO).is_file()):
        return f"{path.name} is missing from {path.parent}", again
    if cuda_major and built:
        versions = " and ".join(library["version"] for library in built.values())
        wanted = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
        reason = f"the CUDA libraries are built for CUDA {versions}, {wanted}"
        return reason, f"Install or build singlepass for CUDA {cuda_major}."
    return info.get("cuda_reason") or f"{path.name} is not in {path.parent}: not built", ""


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
