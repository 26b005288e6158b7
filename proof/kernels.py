# SPDX-License-Identifier: Apache-2.0
"""What the profiler says of a call that misses its bar."""

from __future__ import annotations

import csv
import io
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
