# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs.

An explicit choice, by ``backend=`` or by ``SINGLEPASS_BACKEND``, that can't be honoured raises and says why. The
automatic one takes the first backend of :data:`BACKENDS` that can run, and logs once what it took and why not another.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Iterable

import torch

from . import _native
from ._errors import message
from ._ops import kv as _kv_ops  # noqa: F401  defines the ops that are bound below
from ._ops import library, op
from ._ops import optim as _optim_ops  # noqa: F401
from ._ops import rational as _rational_ops  # noqa: F401
from ._ops import spectral as _spectral_ops  # noqa: F401
from .reference import kv as reference_kv
from .reference import optim as reference_optim
from .reference import rational as reference_rational
from .reference import spectral as reference_spectral

BACKENDS = ("native", "triton", "eager")
ENV = "SINGLEPASS_BACKEND"

_NATIVE = "Leave it out to have one chosen; native is C++ on CPU tensors and CUDA on CUDA tensors."

logger = logging.getLogger("singlepass")

_KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_EAGER: dict[str, Callable] = {
    **reference_optim.STEPS,
    "grad_norm": reference_optim.grad_norm,
    "kv_decode": reference_kv.decode,
    "kv_dequantize_": reference_kv.dequantize_,
    "kv_quantize_": reference_kv.quantize_,
    "kv_saliency": reference_kv.saliency,
    "lorentz": reference_spectral.lorentz,
    "lorentz_backward": reference_spectral.lorentz_backward,
    "rational": reference_rational.rational,
    "rational_backward": reference_rational.rational_backward,
    "spectral_sample": reference_spectral.sample,
    "spectral_scale_": reference_spectral.scale_,
    "spectral_step_": reference_spectral.step_,
    "spectral_swap_": reference_spectral.swap_,
    "stream_": reference_optim.stream_,
}
_TRITON_MODULES = {
    **dict.fromkeys((*reference_optim.STEPS, "grad_norm"), "optim"),
    **dict.fromkeys(("rational", "rational_backward"), "rational"),
    **dict.fromkeys(("kv_decode", "kv_dequantize_", "kv_quantize_", "kv_saliency"), "kv"),
    **dict.fromkeys(("spectral_sample", "spectral_scale_", "spectral_step_", "spectral_swap_"), "spectral"),
    **dict.fromkeys(("lorentz", "lorentz_backward"), "spectral"),
}
_DEVICES = ("cpu", "cuda")
_obstacles: dict[tuple[str, str, str], str | None] = {}  # found once, so that torch.compile traces a choice
_logged: set[str] = set()


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_EAGER)


def _obstacle(name: str, backend: str, device_type: str) -> str | None:
    """Why a backend can't run an op on a type of device, whatever the dtypes; None if it can."""
    if backend == "eager":
        return None
    if backend == "native":
        if device_type not in _DEVICES:
            return f"there is no native library for {device_type}"
        status = _native.status(device_type)
        if not status.loaded:
            return status.reason
        if not _native.has_kernel(name, device_type):
            return f"the native library for {device_type} has no kernel for this op"
        return None
    if name not in _TRITON_MODULES:
        return "there is no Triton kernel for this op"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type != "cuda" and not interpreted:
        return f"Triton kernels run on cuda, not on {device_type}"
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


def rejection(name: str, backend: str, device_type: str, dtypes: Iterable[torch.dtype] = ()) -> str | None:
    """Why a backend can't run an op on this type of device and these dtypes, or None if it can."""
    if backend != "eager":
        for dtype in dtypes:
            if dtype not in _KERNEL_DTYPES:
                return f"kernels take float32, bfloat16 and float16, not {dtype}"
    key = (name, backend, device_type)
    return _obstacles[key] if key in _obstacles else _obstacle(name, backend, device_type)


def choose(name: str, device_type: str, dtypes: Collection[torch.dtype], backend: str | None) -> str:
    """The backend that runs op ``name`` for these dtypes and this type of device; None asks for the automatic choice.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: an explicit backend that can't run here.
    """
    if backend is None:
        return _first_usable(name, device_type, dtypes)
    if backend not in BACKENDS:
        raise ValueError(message(name, f"backend among {', '.join(BACKENDS)}", repr(backend), _NATIVE))
    reason = rejection(name, backend, device_type, dtypes)
    if reason:
        remedy = f"Unset backend and {ENV}: what can run is then chosen."
        raise RuntimeError(message(name, f"backend {backend!r} to be usable", reason, remedy))
    return backend


def _first_usable(name: str, device_type: str, dtypes: Collection[torch.dtype]) -> str:
    """The automatic choice, logged once for each combination with the reasons against the backends before it."""
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = rejection(name, backend, device_type, dtypes)
        if reason is None:
            if not torch.compiler.is_compiling():
                _log_once(f"{name} on {device_type}: " + "; ".join([backend, *reasons]))
            return backend
        reasons.append(f"{backend}: {reason}")
    raise AssertionError("eager runs everywhere")


def _log_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        logger.info(line)


def implementation(name: str, backend: str) -> Callable:
    """The function of one backend, with the op's signature."""
    return _implementations[name, backend]


def requested(backend: str | None) -> str | None:
    """The explicit choice: the argument, else the environment variable, else None.

    Raises:
        ValueError: the environment variable names no backend.
    """
    if backend is not None:
        return backend
    wish = os.environ.get(ENV) or None
    if wish is not None and wish not in BACKENDS:
        raise ValueError(message(ENV, ", ".join(BACKENDS), repr(wish), _NATIVE))
    return wish


def _triton_op(name: str) -> Callable:
    """Imports Triton at the first call."""

    def call(*args, **kwargs):
        module = importlib.import_module(f"{__package__}.triton_kernels.{_TRITON_MODULES[name]}")
        return module.OPS[name](*args, **kwargs)

    return call


_implementations: dict[tuple[str, str], Callable] = {
    **{(name, "native"): op(name) for name in _EAGER},
    **{(name, "triton"): _triton_op(name) for name in _TRITON_MODULES},
    **{(name, "eager"): function for name, function in _EAGER.items()},
}


def register_implementations() -> None:
    """Puts Python implementations behind the ops: eager on every device, Triton on CUDA where native is missing."""
    for name in _EAGER:
        for backend in BACKENDS:
            for device_type in _DEVICES:
                _obstacles[name, backend, device_type] = _obstacle(name, backend, device_type)
    for name, function in _EAGER.items():
        library.impl(name, function, "CompositeExplicitAutograd")
    if importlib.util.find_spec("triton") is not None:
        for name in _TRITON_MODULES:
            if _obstacles[name, "native", "cuda"] is not None:
                library.impl(name, implementation(name, "triton"), "CUDA")
