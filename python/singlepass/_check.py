# SPDX-License-Identifier: Apache-2.0
"""Runs every public class once, on the backend that is chosen for it here, against eager PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import _native, kv, nn, optim, spectral
from ._ops import BACKENDS, OPS, Op, op, requested

# The largest error, relative to the largest number of the tensor where that is above 1.
TOLERANCE = 1e-5

Case = Callable[[torch.dtype, str], list[Tensor]]


def _random(*shape: int) -> Tensor:
    """The same float32 numbers whatever the dtype in which they are used."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _optimizer(cls: type[torch.optim.Optimizer], dtype: torch.dtype, device: str) -> list[Tensor]:
    values, grads = _random(2, 1000)
    p = torch.nn.Parameter(values.to(device, dtype))
    optimizer = cls([p], weight_decay=0.1)  # type: ignore[call-arg]
    for _ in range(3):
        p.grad = grads.to(device, dtype)
        optimizer.step()
    return [p]


def _clipped(dtype: torch.dtype, device: str) -> list[Tensor]:
    params = [torch.nn.Parameter(values.to(device, dtype)) for values in _random(2, 1000)]
    for p in params:
        p.grad = p.detach().clone()
    norm = optim.clip_grad_norm_(params, 1.0)
    return [norm, *(p.grad for p in params if p.grad is not None)]


def _passes(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The result of a module and all gradients."""
    x.requires_grad_()
    y = module(x)
    y.square().mean().backward()
    return [y, *(t.grad for t in (x, *module.parameters()) if t.grad is not None)]


def _rational(dtype: torch.dtype, device: str) -> list[Tensor]:
    x = torch.linspace(-2.0, 2.0, 1600).view(100, 16).to(device, dtype)
    return _passes(nn.GroupRational(16, groups=2).to(device, dtype), x)


def _spectral(cls: type[spectral.SSTLinear], dtype: torch.dtype, device: str) -> list[Tensor]:
    layer = cls(16, 24, 4, bias=False, weight=_random(24, 16), evaluation="factored", device=device, dtype=dtype)
    return _passes(layer, torch.linspace(-2.0, 2.0, 320).view(20, 16).to(device, dtype))


def _sst(dtype: torch.dtype, device: str) -> list[Tensor]:
    layer = spectral.SSTLinear(16, 24, 4, bias=False, weight=_random(24, 16), device=device, dtype=dtype)
    optimizer = spectral.SST(layer, eps=1e-3, steps_per_iteration=2)
    for _ in range(3):
        layer(_random(20, 16).to(device, dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [layer.weight, layer.singular_values]


def _cache(dtype: torch.dtype, device: str) -> list[Tensor]:
    q, k, v = _random(3, 1, 2, 100, 32).to(device, dtype)
    layer = kv.ZipCacheLayer(salient_ratio=0.5)
    layer.prefill(q[:, :, :98], k[:, :, :98], v[:, :, :98])
    layer.append(k[:, :, 98:99], v[:, :, 98:99])
    return [layer.attend(q[:, :, 98:99]), layer.step(q[:, :, 99:], k[:, :, 99:], v[:, :, 99:])]


def _low_rank(dtype: torch.dtype, device: str) -> list[Tensor]:
    q, k, v = _random(3, 1, 2, 100, 32).to(device, dtype)
    bases = torch.linalg.qr(_random(2, 32, 32)).Q.to(device)
    layer = kv.MatryoshkaLayer(bases, bases, key_ranks=16, value_ranks=32)
    layer.prefill(q[:, :, :99], k[:, :, :99], v[:, :, :99])
    layer.append(k[:, :, 99:], v[:, :, 99:])
    return [layer.attend(q[:, :, 99:])]


def _codes(dtype: torch.dtype, device: str) -> list[Tensor]:
    return [kv.dequantize(kv.quantize(_random(1, 2, 100, 32).to(device, dtype), bits=4), dtype)]


def _saliency(dtype: torch.dtype, device: str) -> list[Tensor]:
    q, k = _random(2, 1, 2, 100, 32).to(device, dtype)
    return [kv.probe_saliency(q[:, :, 90:], k, torch.arange(90, 100, device=device))]


CASES: dict[str, Case] = {
    **{name: partial(_optimizer, getattr(optim, name)) for name in optim._OPTIMIZERS},
    "clip_grad_norm_": _clipped,
    "GroupRational": _rational,
    "quantize, dequantize": _codes,
    "probe_saliency": _saliency,
    "ZipCacheLayer": _cache,
    "MatryoshkaLayer": _low_rank,
    "SSTLinear": partial(_spectral, spectral.SSTLinear),
    "LorentzLinear": partial(_spectral, spectral.LorentzLinear),
    "SST": _sst,
}


@contextmanager
def recorded() -> Iterator[set[tuple[str, str]]]:
    """The (op, backend) of every implementation that runs within."""
    find, seen = Op.on, set[tuple[str, str]]()

    def on(op: Op, backend: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add((op.name, backend))
            return find(op, backend)(*args, **kwargs)

        return call

    with mock.patch.object(Op, "on", on):
        yield seen


def _error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of all tensors, each relative to its largest number; NaN if there is one."""
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, truth, strict=True)]
    return torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1.0) for a, b in pairs]).max().item()


def _slower(ran: set[tuple[str, str]], device: str) -> str:
    """What ran on another backend though the native library is loaded and nobody asked for another; else empty."""
    if requested(None) is not None or not _native.status(device).loaded:
        return ""
    others = sorted((op, backend) for op, backend in ran if backend != "native")
    return "; ".join(f"{op} ran on {backend}: {OPS[op].rejection('native', device)}" for op, backend in others)


def run(name: str, device: str) -> dict[str, str]:
    """Checks one class: its ``name`` and ``device``, the ``backend`` that ran, and as ``outcome`` "ok" or a fault."""
    case, ran = CASES[name], set[tuple[str, str]]()
    try:
        with recorded() as ran:
            got = case(torch.float32, device)
        with mock.patch.object(op, "WISH", "eager"):
            error = _error(got, case(torch.float64, device))
        outcome = _slower(ran, device) or ("ok" if error < TOLERANCE else f"differs from float64 by {error:.1e}")
    except Exception as error:  # the report names every class, also after one that fails
        outcome = " ".join(f"{type(error).__name__}: {error}".split())
    backends = [backend for backend in BACKENDS if any(backend == b for _, b in ran)]
    return {"name": name, "device": device, "backend": ", ".join(backends) or "none", "outcome": outcome}
