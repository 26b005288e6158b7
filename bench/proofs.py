# SPDX-License-Identifier: Apache-2.0
"""Tables of the newest proof on a GPU, and of supported ops, whose GPU columns come from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .documents import NOT_MEASURED
from .grid import Grid
from .registry import FAMILIES

_FLOATS = "fp32, bf16, fp16"


@dataclass(frozen=True)
class Op:
    """family: whose tests on a GPU cover it. used_by: what people import. dtypes: of tensors and gradients."""

    family: str
    used_by: str
    dtypes: str = _FLOATS


OPS = {
    "adamw_step_": Op("optim", "`optim.AdamW`"),
    "lion_step_": Op("optim", "`optim.Lion`"),
    "adabelief_step_": Op("optim", "`optim.AdaBelief`"),
    "adan_step_": Op("optim", "`optim.Adan`"),
    "diffgrad_step_": Op("optim", "`optim.DiffGrad`"),
    "lamb_step_": Op("optim", "`optim.LAMB`"),
    "lars_step_": Op("optim", "`optim.LARS`"),
    "sgdsai_step_": Op("optim", "`optim.SGDSaI`"),
    "grad_norm": Op("optim", "gradient clipping, non-finite check"),
    "rational": Op("rational", "`nn.GroupRational`, `nn.GRKAN`, `nn.KATMLP`"),
    "rational_backward": Op("rational", "their gradients"),
    "kv_decode": Op("kv", "`kv.ZipCache`, `kv.ZipCacheLayer`, `kv.decode_attention`", _FLOATS + "; 8, 4, 2 bits"),
    "kv_quantize_": Op("kv", "`kv.quantize` and the caches"),
    "kv_dequantize_": Op("kv", "`kv.dequantize` and the caches"),
    "kv_saliency": Op("kv", "`kv.probe_saliency` and the caches"),
    "spectral_scale_": Op("spectral", "`spectral.SSTLinear`, backward"),
    "spectral_step_": Op("spectral", "`spectral.SST`"),
    "spectral_sample": Op("spectral", "`spectral.SST`: draws vectors"),
    "spectral_swap_": Op("spectral", "`spectral.SST`: swaps vectors", _FLOATS + "; int8 frozen vectors"),
    "lorentz": Op("spectral", "`spectral.LorentzLinear`, `spectral.lorentz`"),
    "lorentz_backward": Op("spectral", "their gradients"),
    "stream_": Op("optim", "benchmarks only", "fp32"),
}

UNSEEN = "compiled"  # and never run on a GPU: the README says so above the table


def gpu_cell(op: str, backend: str, proof: dict[str, Any] | None) -> str:
    """Whether the tests of an op's family passed on a GPU with this backend."""
    from singlepass import _dispatch

    if _dispatch.rejection(op, backend, "cuda") == "there is no Triton kernel for this op":
        return "no"
    stage = next((s for s in (proof or {}).get("stages", []) if s["name"] == "tests"), None)
    counts = {} if stage is None else stage["facts"].get("counts", {})
    mine = [n for key, n in counts.items() if key.startswith(f"{OPS[op].family}/{backend}/")]
    passed, failed = (sum(n.get(outcome, 0) for n in mine) for outcome in ("passed", "failed"))
    return f"{failed:,} of {passed + failed:,} tests fail" if failed else "yes" if passed else UNSEEN


def of_machine(proof: dict[str, Any] | None) -> str:
    return f"{proof['machine']['device']}, {proof['date'][:10]}, commit {proof['commit']}" if proof else NOT_MEASURED


def proof_grid(proof: dict[str, Any] | None) -> Grid:
    """A line for each stage."""
    grid = Grid(f"Proof on a GPU: {of_machine(proof)}", ["stage", "verdict", "seconds", "result"], numbers=False)
    for stage in (proof or {}).get("stages", []):
        grid.lines.append([stage["name"], stage["status"], f"{stage['seconds']:.0f}", stage["said"].replace("|", "/")])
    return grid


def support_grid(proof: dict[str, Any] | None) -> Grid:
    """A line for each op. A native kernel for CPUs and an eager reference are what every op has."""
    head = ["op", "class", "CPU", "CUDA C++", "Triton", "eager", "dtypes"]
    grid = Grid(f"Run on a GPU: {of_machine(proof) if proof else 'no'}", head, numbers=False)
    for family in FAMILIES:
        for name, op in OPS.items():
            if op.family == family:
                cells = (gpu_cell(name, backend, proof) for backend in ("native", "triton"))
                grid.lines.append([f"`{name}`", op.used_by, "yes", *cells, "yes", op.dtypes])
    return grid
