# SPDX-License-Identifier: Apache-2.0
"""Predicts the benchmark's cases on every GPU of `gpus`, and keeps what it counted beside what it predicted."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from singlepass.bench import results
from singlepass.bench.registry import Case, cases, dtype_name

from . import kv, optim, rational, roofline, spectral
from .gpus import GPUS, Gpu
from .plan import Compiled, Plan
from .roofline import predict, resident

SCHEMA = 1
PLANS = {"optim": optim.plans, "rational": rational.plans, "kv": kv.plans, "spectral": spectral.plans}
UNKNOWN = {"UTCHMMA": "products by tcgen05, whose time cannot be read from machine code"}
OnGpus = dict[str, list[Compiled]]


def planned(gpu: Gpu) -> Iterator[tuple[Case, list[Plan]]]:
    """The benchmark's cases whose launches on a GPU are known here."""
    for case in cases(torch.device("cuda")):
        found = PLANS[case.family](case, gpu) if case.family in PLANS else []
        if found:
            yield case, found


def on(gpu: Gpu, plans: list[Plan]) -> list[Compiled]:
    return [plan.compiled(gpu.arch) for plan in plans]


def counts(compiled: Compiled) -> dict[str, Any]:
    """What a kernel has, and what a pass of its hot loop does."""
    kernel, hot = compiled.kernel, compiled.hot.path
    return {
        "source": compiled.plan.source,
        "kernel": kernel.plain_name,
        "arch": kernel.arch,
        "registers": kernel.registers,
        "shared": compiled.shared,
        "local": kernel.local,
        "hot": {
            "elements": compiled.plan.elements * compiled.hot.unrolled,
            "instructions": len(hot.code),
            "stalls": hot.stalls,
            "kinds": dict(sorted(Counter(i.kind for i in hot.code).items())),
        },
    }


def row(case: Case, compiled: OnGpus, in_triton: OnGpus) -> dict[str, Any]:
    """A case on every GPU, in CUDA and in Triton."""
    of_case = {"family": case.family, "op": case.op, "size": case.size, "dtype": dtype_name(case.dtype)}
    found = {"gpus": compiled, "triton": in_triton}
    return of_case | {
        key: {gpu.name: cell(gpu, case.bytes, launches[gpu.name]) for gpu in GPUS} for key, launches in found.items()
    }


def cell(gpu: Gpu, floor_bytes: int, launches: list[Compiled]) -> dict[str, Any]:
    """The launches, one after the other; or why they are not counted."""
    for c in launches:
        unknown = next((UNKNOWN[i.op] for i in c.kernel.code if i.op in UNKNOWN), None)
        if unknown is not None:
            return {"not_counted": unknown}
    made = [c.launch(gpu) for c in launches]
    found = [predict(gpu, launch) for launch in made]
    us, floor = sum(p.us for p in found), gpu.microseconds(gpu.clocks(floor_bytes))
    parts = [
        {
            "kernel": launch.kernel,
            "us": round(p.us, 2),
            "binds": p.binds,
            "blocks": launch.blocks,
            "blocks_per_sm": resident(gpu, launch.warps, launch.registers, launch.shared),
            "instructions_per_warp": round(launch.warp.instructions, 1),
        }
        for launch, p in zip(made, found, strict=True)
    ]
    longest = max(found, key=lambda p: p.us)
    return {"us": round(us, 2), "share": round(floor / us, 4), "binds": longest.binds, "launches": parts}


def make(nvcc: str) -> dict[str, Any]:
    """A prediction from the cubins as they are, and from what Triton makes of its kernels.

    Raises:
        ValueError: there is no Triton, or a kernel is not as it is described here.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("counting: expected Triton, whose kernels are counted, too; got none. Install it")
    from . import triton

    commit, dirty = results.git_state()
    constants = {
        key: value for key, value in vars(roofline).items() if key.isupper() and isinstance(value, int | float | tuple)
    }
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": f"{commit}{'+' * dirty}",
        "nvcc": nvcc,
        "triton": version("triton"),
        "gpus": {gpu.name: asdict(gpu) for gpu in GPUS},
        "constants": constants,
        "kernels": [],
        "rows": [],
    }
    kernels: dict[tuple[str, str, str], dict[str, Any]] = {}
    for everywhere in zip(*(planned(gpu) for gpu in GPUS), strict=True):
        case = everywhere[0][0]
        compiled = {gpu.name: on(gpu, plans) for gpu, (_, plans) in zip(GPUS, everywhere, strict=True)}
        in_triton = {gpu.name: on(gpu, plans) for plans in (triton.plans(case),) for gpu in GPUS}
        out["rows"].append(row(case, compiled, in_triton))
        for launches in (*compiled.values(), *in_triton.values()):
            kernels |= {(c.plan.source, c.kernel.plain_name, c.kernel.arch): counts(c) for c in launches}
    out["kernels"] = list(kernels.values())
    return out


def save(model: dict[str, Any], folder: Path) -> Path:
    date, commit = model["date"][:16].replace(":", ""), model["commit"].replace("+", "-changed")
    path = folder / results.MODEL / f"{date}-{commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(model, indent=1) + "\n")
    return path


def changes(before: dict[str, Any], after: dict[str, Any], least: float = 0.005) -> list[str]:
    """Cases whose predicted time has changed by at least so much, and those that came or went."""

    def times(model: dict[str, Any]) -> dict[str, float]:
        return {
            "/".join((row["family"], row["op"], row["size"], row["dtype"], gpu, *backend)): cell["us"]
            for row in model["rows"]
            for key, backend in (("gpus", ()), ("triton", ("triton",)))
            for gpu, cell in row.get(key, {}).items()
            if "us" in cell
        }

    old, new = times(before), times(after)
    lines = [f"{key}: no longer predicted" for key in old if key not in new]
    for key, us in new.items():
        if key not in old:
            lines.append(f"{key}: {us:.1f} µs, not predicted before")
        elif abs(us / old[key] - 1.0) >= least:
            lines.append(f"{key}: {old[key]:.1f} -> {us:.1f} µs ({us / old[key] - 1.0:+.1%})")
    return lines
