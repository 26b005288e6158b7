# SPDX-License-Identifier: Apache-2.0
"""What the compiler gave each kernel, and what the profiler says of a call that misses its bar."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FUNCTION = re.compile(
    r"^ *Function (?P<name>\S+?):\s*$\n"
    r"^.*?REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)",
    re.M,
)
OF_CUBINS = "triton"
_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)$", re.M)
# What ncu is asked for, and what is kept of its numbers.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
WANTED = {
    "Duration": "time",
    "Registers Per Thread": "registers",
    "Theoretical Occupancy": "occupancy_limit",
    "Achieved Occupancy": "occupancy",
    "Memory Throughput": "memory",
    "DRAM Throughput": "dram",
    "Compute (SM) Throughput": "compute",
}


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, which Triton's package has some of."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        found = shutil.which(str(Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)))
    return found


def resources(paths: Iterable[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """Registers, bytes of stack, of shared memory and of spills by architecture and kernel, of libraries and cubins."""
    program = tool("cuobjdump")
    found: dict[str, dict[str, dict[str, int]]] = {}
    if program is None:
        return found
    for path in paths:
        done = subprocess.run([program, "--dump-resource-usage", str(path)], capture_output=True, text=True)
        for arch, kernels in parse_resources(done.stdout).items():
            found.setdefault(arch, {}).update(kernels)
    return found


def parse_resources(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """What cuobjdump --dump-resource-usage prints: for each architecture, the functions compiled for it.

    It names none for a cubin by itself, which is what Triton compiles for the machine it runs on.
    """
    pieces = [OF_CUBINS, *_ARCHITECTURE.split(text)]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for arch, piece in zip(pieces[::2], pieces[1::2], strict=True):
        for match in _FUNCTION.finditer(piece):
            numbers = {key: int(value) for key, value in match.groupdict().items() if key != "name"}
            found.setdefault(arch, {})[match["name"]] = numbers
    return found


def spilling(found: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Kernels with local memory: spilled registers, or arrays that are indexed at run time."""
    return sorted(
        f"{name} ({arch})" for arch, kernels in found.items() for name, n in kernels.items() if n["local"] or n["stack"]
    )


def profiler_command(python: str, case: str, provider: str) -> list[str] | str:
    """ncu over one call of a case, or why it cannot run."""
    program = tool("ncu")
    if program is None:
        return "no ncu here"
    sections = [word for name in SECTIONS for word in ("--section", name)]
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details"]
    return [program, *options, *sections, python, "-m", "proof.once", case, provider]


def parse_profile(text: str) -> list[dict[str, Any]]:
    """Kernels of ncu's CSV: the numbers that are wanted with their units, and the reasons that its rules give."""
    start = text.find('"ID",')
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(text[start:] if start >= 0 else "")):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"], "numbers": {}, "reasons": []})
        if name := WANTED.get(row["Metric Name"]):
            kernel["numbers"].setdefault(name, f"{row['Metric Value']} {row['Metric Unit']}".strip())
        if reason := row.get("Rule Description"):
            kernel["reasons"].append(" ".join(reason.split()))
    return list(kernels.values())
