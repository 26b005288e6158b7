# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs.

An explicit choice, by ``backend=`` or by ``SINGLEPASS_BACKEND``, that can't be honoured raises and says why. The
automatic one takes the first backend of :data:`BACKENDS` that can run, and logs once what it took and why not another.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection

import torch

from . import _native
from ._errors import message
from ._ops import library, op
from .reference import optim as reference_optim

BACKENDS = ("native", "triton", "eager")
ENV = "SINGLEPASS_BACKEND"

logger = logging.getLogger("singlepass")

_KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_EAGER: dict[str, Callable] = {
    **reference_optim.STEPS,
    "grad_norm": reference_optim.grad_norm,
    "stream_": reference_optim.stream_,
}
_TRITON_MODULES = {name: "optim" for name in (*reference_optim.STEPS, "grad_norm")}


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(_EAGER)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def rejection(name: str, backend: str, device_type: str, dtypes: Collection[torch.dtype] = ()) -> str | None:
    """Why a backend can't run an op on this device and these dtypes, or None if it can."""
    if backend == "eager":
        return None
    unsupported = sorted(str(dtype) for dtype in set(dtypes) - _KERNEL_DTYPES)
    if unsupported:
        return f"kernels take float32, bfloat16 and float16, not {', '.join(unsupported)}"
    if backend == "native":
        if device_type not in ("cpu", "cuda"):
            return f"there is no native library for {device_type}"
        status = _native.status(device_type)
        return None if status.loaded else status.reason
    if name not in _TRITON_MODULES:
        return "there is no Triton kernel for this op"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type != "cuda" and not (device_type == "cpu" and _interpreting()):
        return f"Triton kernels run on cuda, not on {device_type}"
    return None


@torch.compiler.assume_constant_result
def choose(name: str, device_type: str, dtypes: frozenset[torch.dtype], backend: str | None) -> str:
    """The backend that runs op ``name`` for tensors of ``dtypes`` on ``device_type``; None asks for the automatic choice.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: an explicit backend that can't run here.
    """
    if backend is None:
        return _first_usable(name, device_type, dtypes)
    if backend not in BACKENDS:
        raise ValueError(message(name, f"backend among {', '.join(BACKENDS)}", repr(backend), "Or leave it out."))
    reason = rejection(name, backend, device_type, dtypes)
    if reason:
        raise RuntimeError(message(name, f"backend {backend!r} to be usable", reason, "Leave the choice to None."))
    return backend


@functools.lru_cache(maxsize=1024)
def _first_usable(name: str, device_type: str, dtypes: frozenset[torch.dtype]) -> str:
    """The automatic choice; logs it, once for each combination, with the reasons against the backends before it."""
    rejected = {backend: rejection(name, backend, device_type, dtypes) for backend in BACKENDS}
    chosen = next(backend for backend in BACKENDS if rejected[backend] is None)
    passed_over = "".join(f"; {backend}: {rejected[backend]}" for backend in BACKENDS[: BACKENDS.index(chosen)])
    logger.info("%s on %s: %s%s", name, device_type, chosen, passed_over)
    return chosen


def implementation(name: str, backend: str) -> Callable:
    """The function of one backend, with the op's signature."""
    return _implementations[name, backend]


def requested(backend: str | None) -> str | None:
    """The explicit choice: the argument, else the environment variable, else None."""
    return backend if backend is not None else os.environ.get(ENV) or None


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
    for name, function in _EAGER.items():
        library.impl(name, function, "CompositeExplicitAutograd")
    if not _native.status("cuda").loaded and importlib.util.find_spec("triton") is not None:
        for name in _TRITON_MODULES:
            library.impl(name, implementation(name, "triton"), "CUDA")
