# SPDX-License-Identifier: Apache-2.0
"""What the profiler says of a call that misses its bar."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from typing import Any

from counting.cubins import tool

# What ncu is asked for, and what is kept of its numbers.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
SECTORS = "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio"
WANTED = {
    SECTORS: "sectors of a store",
    "Duration": "time",
    "Registers Per Thread": "registers",
    "Theoretical Occupancy": "occupancy_limit",
    "Achieved Occupancy": "occupancy",
    "Memory Throughput": "memory",
    "DRAM Throughput": "dram",
    "Compute (SM) Throughput": "compute",
}
SECONDS = 60  # that the profiler may take


def profile(case: str, provider: str) -> list[dict[str, Any]] | str:
    """The kernels of one call, or why they could not be had."""
    command = profiler_command(sys.executable, case, provider)
    if isinstance(command, str):
        return command
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "the profiler ran out of time"
    said = " ".join((done.stdout + done.stderr).split())[-300:]
    return parse_profile(done.stdout) or said or "the profiler said nothing"


def profiler_command(python: str, case: str, provider: str) -> list[str] | str:
    """ncu over one call of a case, or why it cannot run."""
    program = tool("ncu")
    if program is None:
        return "no ncu here"
    sections = [word for name in SECTIONS for word in ("--section", name)]
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details"]
    return [program, *options, *sections, "--metrics", SECTORS, python, "-m", "proof.once", case, provider]


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
