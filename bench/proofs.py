# SPDX-License-Identifier: Apache-2.0
"""Tables of the newest proof on a GPU, and of what runs where, whose columns for GPUs come from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .registry import FAMILIES
from .tables import NOT_MEASURED, Grid

_FLOATS = "float32, bfloat16, float16"


@dataclass(frozen=True)
class Op:
    """family: whose tests on a GPU speak for it. used_by: what people import. dtypes: of tensors and gradients."""

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
    "grad_norm": Op("optim", "clipping and the non-finite check"),
    "rational": Op("rational", "`nn.GroupRational`, `nn.GRKAN`, `nn.KATMLP`"),
    "rational_backward": Op("rational", "their gradients"),
    "kv_decode": Op(
        "kv", "`kv.ZipCache`, `kv.ZipCacheLayer`, `kv.decode_attention`", _FLOATS + "; codes of 8, 4, 2 bits"
    ),
    "kv_quantize_": Op("kv", "`kv.quantize` and the caches"),
    "kv_dequantize_": Op("kv", "`kv.dequantize` and the caches"),
    "kv_saliency": Op("kv", "`kv.probe_saliency` and the caches"),
    "spectral_scale_": Op("spectral", "`spectral.SSTLinear`'s backward pass"),
    "spectral_step_": Op("spectral", "`spectral.SST`"),
    "spectral_sample": Op("spectral", "drawing vectors, of `spectral.SST`"),
    "spectral_swap_": Op("spectral", "swapping vectors, of `spectral.SST`", _FLOATS + "; int8 for frozen vectors"),
    "lorentz": Op("spectral", "`spectral.LorentzLinear`, `spectral.lorentz`"),
    "lorentz_backward": Op("spectral", "their gradients"),
    "stream_": Op("optim", "the benchmarks' floor", "float32"),
}

UNSEEN = "compiled, not yet run on a GPU"


def gpu_cell(op: str, backend: str, proof: dict[str, Any] | None) -> str:
    """What the tests of an op's family said of a backend on a GPU."""
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
    grid = Grid(f"Proof on a GPU: {of_machine(proof)}", ["stage", "verdict", "seconds", "said"], numbers=False)
    for stage in (proof or {}).get("stages", []):
        grid.lines.append([stage["name"], stage["status"], f"{stage['seconds']:.0f}", stage["said"].replace("|", "/")])
    return grid


def support_grid(proof: dict[str, Any] | None) -> Grid:
    """A line for each op. A native kernel for CPUs and an eager reference are what every op has."""
    head = ["op", "class", "CPU", "CUDA C++", "Triton", "eager", "dtypes of tensors and gradients"]
    grid = Grid(f"On GPUs: {of_machine(proof)}", head, numbers=False)
    for family in FAMILIES:
        for name, op in OPS.items():
            if op.family == family:
                cells = (gpu_cell(name, backend, proof) for backend in ("native", "triton"))
                grid.lines.append([f"`{name}`", op.used_by, "yes", *cells, "yes", op.dtypes])
    return grid
