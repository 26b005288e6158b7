# SPDX-License-Identifier: Apache-2.0
"""Result files: one JSON for each run, with everything needed to judge its numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .probe import Probe
from .timing import last_level_cache_bytes

SCHEMA = 1
CPUINFO = Path("/proc/cpuinfo")
VECTOR_FLAGS = ("avx", "fma", "f16c", "amx", "asimd", "sve")
RESULTS = Path("bench/results")  # published: what documents quote
MODEL = "model"  # of these, the folder of predictions, which `make gpu-model` writes
LOCAL = Path("bench-results")  # what a run leaves here
PACKAGES = (
    "singlepass",
    "torch",
    "triton",
    "numpy",
    "pytorch_optimizer",
    "lion-pytorch",
    "adabelief-pytorch",
    "kat_rational",
    "rational_kat",
    "transformers",
    "optimum-quanto",
)


@dataclass
class Row:
    """One provider of one case. Times in milliseconds; `ms` and `floor_ms` have the keys q20, q50, q80 and n.

    status: "ok", "unavailable" (see `reason`) or "wrong" (failed the gate, hence not timed); in older files also
        "skipped" (out of time).
    gate_error: largest error against the float64 reference, in units of the allowed one.
    differs: for a peer whose formula is another one, how it differs.
    startup_s: seconds in the gate and in the first calls, which make states and compile.
    extra_bytes: peak memory of a call above its inputs (an optimizer's: parameters, gradients and states).
    host_us, launches: GPU only.
    """

    family: str
    op: str
    size: str
    dtype: str
    provider: str
    column: str
    status: str
    reason: str | None = None
    differs: str | None = None
    gate_error: float | None = None
    elements: int = 0
    tensors: int = 0
    input_bytes: int = 0
    bytes: int = 0
    flops: int = 0
    ms: dict[str, float] | None = None
    floor_ms: dict[str, float] | None = None
    startup_s: float | None = None
    extra_bytes: int | None = None
    host_us: float | None = None
    launches: int | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.family, self.op, self.size, self.dtype, self.provider

    @property
    def median(self) -> float | None:
        return self.ms["q50"] if self.ms else None

    @property
    def times_floor(self) -> float | None:
        return self.ms["q50"] / self.floor_ms["q50"] if self.ms and self.floor_ms else None

    @property
    def gbps(self) -> float | None:
        """Floor bytes over time: what the step would move if it moved nothing twice."""
        return self.bytes / self.ms["q50"] / 1e6 if self.ms else None


@dataclass
class Run:
    """All rows of a run and the machine that they were measured on."""

    date: str
    commit: str | None
    dirty: bool
    machine: dict[str, Any]
    versions: dict[str, str | None]
    copy_gbps: float
    budget_s: float | None
    matrix_tflops: float | None = None
    compile_s: float | None = None
    seconds: float = 0.0
    left_out: int = 0
    interrupted: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def device_line(self) -> str:
        """What a plot says under its title."""
        m = self.machine
        threads = f", {m['threads']} threads" if m["kind"] == "cpu" else ""
        return f"{m['device']}{threads}, torch {self.versions['torch']}, {self.date[:10]}"

    def find(self, **want: str) -> list[Row]:
        return [row for row in self.rows if all(getattr(row, key) == value for key, value in want.items())]

    def save(self, folder: Path = RESULTS) -> Path:
        name = f"{self.date[:16].replace(':', '')}-{self.commit or self.versions['singlepass'] or 'unknown'}.json"
        path = folder / slug(self.machine) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA} | asdict(self), indent=1) + "\n")
        return path


def load(path: Path) -> Run:
    if not path.is_file():
        raise ValueError(f"bench: expected a result file; got no file {path}. See singlepass bench run --help")
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise ValueError(
            f"bench: expected a result file of schema {SCHEMA}; got {path}. Measure again with singlepass bench run"
        )
    rows = [Row(**row) for row in data.pop("rows")]
    return Run(**data, rows=rows)


def first_measured(out: Run, family: str, **want: str) -> Row | None:
    return next((row for row in out.find(family=family, **want) if row.median is not None), None)


def files(folder: Path) -> list[Path]:
    """The result files in a folder. Proofs and predictions have schemas of their own."""
    return [path for path in folder.glob("*/*.json") if path.parent.name != MODEL]


def newest(kind: str, folder: Path = RESULTS, family: str | None = None) -> Run | None:
    """The latest run on a kind of device ("cpu" or "cuda") that has rows of a family, or None."""
    runs = [run for run in map(load, files(folder)) if run.machine["kind"] == kind]
    if family is not None:
        runs = [run for run in runs if run.find(family=family)]
    return max(runs, key=lambda run: run.date, default=None)


def newest_path(folder: Path) -> Path | None:
    """The latest result file in a folder, or None."""
    return max(files(folder), key=lambda path: load(path).date, default=None)


def newest_proof(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The latest proof on a GPU, as `python -m proof run` has written it, or None."""
    proofs = [json.loads(path.read_text()) for path in folder.glob("*/proof/*.json")]
    return max((p for p in proofs if p["machine"]["kind"] == "cuda"), key=lambda p: p["date"], default=None)


def newest_model(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The latest prediction of times on GPUs, as `python -m counting` has written it, or None."""
    models = (json.loads(path.read_text()) for path in folder.glob(f"{MODEL}/*.json"))
    return max(models, key=lambda model: model["date"], default=None)


def start(device: torch.device, probe: Probe, budget_s: float | None) -> Run:
    """An empty run, with the facts of this machine."""
    commit, dirty = git_state()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = machine(device), versions()
    return Run(now, commit, dirty, *facts, probe.copy_gbps, budget_s, probe.matrix_tflops, probe.compile_s)


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": device.type,
        "device": cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "vector_extensions": vector_extensions(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": last_level_cache_bytes(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": nvidia_driver(),
        }
    return facts


def cpu_model() -> str:
    """The processor's name, and what tells apart those whose name a virtual machine has shortened."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        text = ""
    said = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (found and found[1].strip() for found in said.values())
    if name is None:
        return platform.processor() or platform.machine()
    return f"{name} (family {family}, model {model})" if family and model else name


def vector_extensions() -> list[str]:
    """Those that matter to the kernels here and to torch's, as the kernel of Linux calls them."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", CPUINFO.read_text(), re.M)
    except OSError:
        found = None
    return [flag for flag in (found[1].split() if found else []) if flag.startswith(VECTOR_FLAGS)]


def nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}


def git_state() -> tuple[str | None, bool]:
    """Short commit of the source tree and whether tracked files differ from it; (None, False) outside of one.

    A tree without history may say in a file what it was taken from, a plus for what differs.
    """
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "COMMIT").exists():
            said = (root / "COMMIT").read_text().strip()
            return said.removesuffix("+"), said.endswith("+")
        if (root / "csrc" / "sources.json").exists() and (root / ".git").exists():
            try:
                commit = _git(root, "rev-parse", "--short", "HEAD")
                return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
            except (OSError, subprocess.CalledProcessError):
                break
    return None, False


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def slug(machine: dict[str, Any]) -> str:
    """Folder name of a device."""
    threads = f"-{machine['threads']}-threads" if machine["kind"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + threads
