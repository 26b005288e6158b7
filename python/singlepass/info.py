# SPDX-License-Identifier: Apache-2.0
"""``singlepass info``: which backend runs each op here, and why the others don't."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from functools import partial
from typing import Any

import torch

from . import __version__, _dispatch, _native


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _module_version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    module = __import__(name)
    return str(getattr(module, "__version__", "unknown"))


def _backends(name: str, device: str) -> dict[str, Any]:
    """The chosen backend of an op, and for every other the reason against it, or that it is available."""
    rejections = {backend: _dispatch.rejection(name, backend, device) for backend in _dispatch.BACKENDS}
    requested = _dispatch.requested(None)
    if requested is not None:
        chosen = requested if rejections.get(requested, "unknown") is None else None
    else:
        chosen = next(backend for backend in _dispatch.BACKENDS if rejections[backend] is None)
    return {"chosen": chosen, "others": {b: r or "available" for b, r in rejections.items() if b != chosen}}


def collect() -> dict[str, Any]:
    """Everything that ``singlepass info`` prints, as plain data."""
    libraries = {}
    for device in ("cpu", "cuda"):
        status = _native.status(device)
        libraries[device] = {"loaded": status.loaded, "path": str(status.path), "reason": status.reason}
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
        "ops": {name: {device: _backends(name, device) for device in _devices()} for name in _dispatch.ops()},
    }


def check() -> dict[str, str]:
    """Runs every optimizer, a rational activation and a layer for sparse spectral training, both forward and backward,
    and a compressed KV cache on every device, on the backend of the automatic choice, against float64.

    Returns:
        For each of them and each device, "ok" or what went wrong.
    """
    from . import kv, nn, optim, spectral

    def cache(dtype: torch.dtype, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 100, 32, generator=generator).to(device, dtype)
        layer = kv.ZipCacheLayer(salient_ratio=0.5)
        layer.prefill(q[:, :, :99], k[:, :, :99], v[:, :, :99])
        layer.append(k[:, :, 99:], v[:, :, 99:])
        return layer.attend(q[:, :, 99:]).double().cpu()

    def activation(dtype: torch.dtype, device: str) -> torch.Tensor:
        x = torch.linspace(-2.0, 2.0, 1600).view(100, 16).to(device, dtype).requires_grad_()
        act = nn.GroupRational(16, groups=2).to(device, dtype)
        y = act(x)
        y.square().mean().backward()
        parts = (y.detach(), x.grad, act.numerator.grad, act.denominator.grad)
        return torch.cat([part.double().cpu().flatten() for part in parts if part is not None])

    def layer(dtype: torch.dtype, device: str) -> torch.Tensor:
        weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        dense = torch.nn.Linear(16, 24, device=device, dtype=dtype)
        dense.load_state_dict({"weight": weight, "bias": weight[:, 0]})
        made = spectral.SSTLinear.from_linear(dense, 4)
        x = torch.linspace(-2.0, 2.0, 320).view(20, 16).to(device, dtype).requires_grad_()
        y = made(x)
        y.square().mean().backward()
        parts = (y.detach(), x.grad, made.singular_values.grad)
        return torch.cat([part.double().cpu().flatten() for part in parts if part is not None])

    def run(cls: type, dtype: torch.dtype, device: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        values, grads = torch.randn(2, 1000, generator=generator)
        p = torch.nn.Parameter(values.to(device, dtype))
        optimizer = cls([p], weight_decay=0.1)
        for _ in range(3):
            p.grad = grads.to(device, dtype)
            optimizer.step()
        return p.detach().double().cpu()

    checks = {name: partial(run, getattr(optim, name)) for name in optim.__all__} | {"GroupRational": activation}
    checks |= {"ZipCacheLayer": cache, "SSTLinear": layer}
    results = {}
    for name, outcome in checks.items():
        for device in _devices():
            try:
                error = (outcome(torch.float32, device) - outcome(torch.float64, device)).abs().max().item()
                results[f"{name} on {device}"] = "ok" if error < 1e-5 else f"differs from float64 by {error:.1e}"
            except Exception as error:  # the report names every op, also after one that fails
                results[f"{name} on {device}"] = f"{type(error).__name__}: {error}"
    return results


def _print_text(data: dict[str, Any]) -> None:
    cuda = f"CUDA {data['torch_cuda']}" if data["torch_cuda"] else "no CUDA"
    print(
        f"singlepass {data['singlepass']}, torch {data['torch']} ({cuda}), triton {data['triton'] or 'not installed'}"
    )
    print(f"python {data['python']}, {data['platform']}, {data['cpu_capability']}, {data['threads']} threads")
    print("gpus: " + (", ".join(data["gpus"]) or "none"))
    for device, library in data["libraries"].items():
        print(f"native {device}: " + (library["path"] if library["loaded"] else f"not loaded: {library['reason']}"))
    for key, value in data["environment"].items():
        print(f"{key}={value}")
    reasons: dict[str, set[str]] = {}
    print(f"\n{'op':18} {'device':7} backend")
    for name, devices in data["ops"].items():
        for device, entry in devices.items():
            print(f"{name:18} {device:7} {entry['chosen'] or f'none: {_dispatch.ENV} asks for another'}")
            for backend, reason in entry["others"].items():
                if reason != "available":
                    reasons.setdefault(f"{backend} on {device}: {reason}", set()).add(name)
    if reasons:
        print("\nnot usable here")
    for reason, names in reasons.items():
        ops = "all ops" if len(names) == len(data["ops"]) else ", ".join(sorted(names))
        print(f"  {reason} ({ops})")


def main(argv: list[str]) -> int:
    """Prints the report. Returns 1 if ``--check`` found an op that does not work."""
    parser = argparse.ArgumentParser(prog="singlepass info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="run each class once against float64")
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
            print("\ncheck")
            for name, outcome in data["check"].items():
                print(f"  {name:20} {outcome}")
    return int(any(outcome != "ok" for outcome in data.get("check", {}).values()))
