# SPDX-License-Identifier: Apache-2.0
"""``singlepass info``: shows which backend runs each op here, and why the others do not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from typing import Any

import torch

from . import __version__, _native
from ._ops import BACKENDS, ENV, OPS, Op, requested


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _module_version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    module = __import__(name)
    return str(getattr(module, "__version__", "unknown"))


def _backends(op: Op, device: str) -> dict[str, Any]:
    """The chosen backend of an op, and for every other the reason against it, or that it is available."""
    rejections = {backend: op.rejection(backend, device) for backend in BACKENDS}
    wanted = requested(None)
    if wanted is not None:
        chosen = wanted if rejections.get(wanted, "unknown") is None else None
    else:
        chosen = next(backend for backend in BACKENDS if rejections[backend] is None)
    return {"chosen": chosen, "others": {b: r or "available" for b, r in rejections.items() if b != chosen}}


def collect() -> dict[str, Any]:
    """Everything that ``singlepass info`` prints, as plain data."""
    libraries = {}
    for device in ("cpu", "cuda"):
        status = _native.status(device)
        libraries[device] = {"loaded": status.loaded, "path": str(status.path)}
        libraries[device] |= {"reason": status.reason, "remedy": status.remedy}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "singlepass": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _module_version("triton"),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "libraries": libraries,
        "build": _native.build_info(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("SINGLEPASS_")},
        "ops": {name: {device: _backends(op, device) for device in _devices()} for name, op in OPS.items()},
    }


def check() -> list[dict[str, str]]:
    """Runs every class once on every device, on the backend that is chosen for it, against eager PyTorch in float64.

    Returns:
        For each class and device a dict: ``name``, ``device``, ``backend``, and as ``outcome`` "ok" or what is wrong. A
        native library that should be there but is not loaded comes last, under the name "native library".
    """
    from . import _check

    results = [_check.run(name, device) for name in _check.CASES for device in _devices()]
    for device in ("cpu", "cuda"):
        status = _native.status(device)
        if status.remedy:
            outcome = f"not loaded: {status.reason}. {status.remedy}"
            results.append({"name": "native library", "device": device, "backend": "none", "outcome": outcome})
    return results


def _print_text(data: dict[str, Any]) -> None:
    cuda = f"CUDA {data['torch_cuda']}" if data["torch_cuda"] else "no CUDA"
    print(
        f"singlepass {data['singlepass']}, torch {data['torch']} ({cuda}), triton {data['triton'] or 'not installed'}"
    )
    print(f"python {data['python']}, {data['platform']}, {data['cpu_capability']}, {data['threads']} threads")
    print("gpus: " + (", ".join(data["gpus"]) or "none"))
    for device, library in data["libraries"].items():
        missing = f"not loaded: {library['reason']}" + f". {library['remedy']}" * bool(library["remedy"])
        print(f"native {device}: " + (library["path"] if library["loaded"] else missing))
    for key, value in data["environment"].items():
        print(f"{key}={value}")
    reasons: dict[str, set[str]] = {}
    print(f"\n{'op':18} {'device':7} backend")
    for name, devices in data["ops"].items():
        for device, entry in devices.items():
            print(f"{name:18} {device:7} {entry['chosen'] or f'none: {ENV} asks for another'}")
            for backend, reason in entry["others"].items():
                if reason != "available":
                    reasons.setdefault(f"{backend} on {device}: {reason}", set()).add(name)
    if reasons:
        print("\nnot usable here")
    for reason, names in reasons.items():
        ops = "all ops" if len(names) == len(data["ops"]) else ", ".join(sorted(names))
        print(f"  {reason} ({ops})")


def _print_check(results: list[dict[str, str]]) -> None:
    print("\ncheck: each class on the backend in parentheses, against eager PyTorch in float64")
    for result in results:
        what = f"{result['name']} on {result['device']} ({result['backend']})"
        print(f"  {what:40} {result['outcome']}")
    eager = {r["device"] for r in results} - {r["device"] for r in results if r["backend"] not in ("eager", "none")}
    if eager and requested(None) is None:
        places = " and ".join(sorted(eager))
        print(f"  On {places} there are no kernels: everything ran in eager PyTorch, which is many times slower.")


def main(argv: list[str]) -> int:
    """Prints the report. Returns 1 if ``--check`` found a class that does not work, or kernels that do not run."""
    parser = argparse.ArgumentParser(prog="singlepass info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run each class once and compare with float64; exit status 1 if a result is wrong, or if kernels that this"
        " installation should have do not run. Without native libraries plain PyTorch is checked, and the status is 0",
    )
    options = parser.parse_args(argv)
    try:
        data = collect()
    except ValueError as error:  # SINGLEPASS_BACKEND names no backend
        print(error, file=sys.stderr)
        return 2
    if options.check:
        data["check"] = check()
    if options.json:
        json.dump(data, sys.stdout, indent=2)
        print()
    else:
        _print_text(data)
        if options.check:
            _print_check(data["check"])
    return int(any(result["outcome"] != "ok" for result in data.get("check", [])))
