# SPDX-License-Identifier: Apache-2.0
"""What an op is: a contract, the implementations that can run it, and the choice between them.

An explicit choice, by ``backend=`` or by ``SINGLEPASS_BACKEND``, that can't be honoured raises and says why. The
automatic one takes the first backend of :data:`BACKENDS` that can run, and logs once what it took and why not another.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _native
from .._errors import message, require

NAMESPACE = __name__.partition(".")[0]  # singlepass, unless a loader imports the package under another name
BACKENDS = ("native", "triton", "eager")
ENV = "SINGLEPASS_BACKEND"
_FOUND = os.environ.get(ENV) or None
WISH = _FOUND  # read once: to look for a variable at each call takes as long as a small op
OPS: dict[str, Op] = {}  # all ops, by name

_NATIVE = "Leave it out to have one chosen; native is C++ on CPU tensors and CUDA on CUDA tensors."
_KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_DEVICES = ("cpu", "cuda")
_FLOATS = "fp32, bf16, fp16"

logger = logging.getLogger("singlepass")
_library = torch.library.Library(NAMESPACE, "DEF")  # registrations live as long as this object

F = TypeVar("F", bound=Callable[..., Any])


class Op:
    """One op. Its implementations register themselves: :meth:`eager` and :meth:`triton` are decorators for them, and
    the native libraries register with torch.

    Args:
        family: the folder in which each layer keeps it.
        schema: as ``torch.library`` takes it: tensors by position, everything else by keyword.
        fake: makes empty results, with the op's signature. None for an op without results.
        doc: what arguments and results are.
        used_by, dtypes: what the table of supported ops says.
        typed: which arguments, tensors or lists of them, decide by their dtypes what can run.
        has_triton: whether there is a Triton kernel.
    """

    def __init__(
        self,
        family: str,
        schema: str,
        fake: Callable[..., Any] | None,
        doc: str,
        *,
        used_by: str,
        dtypes: str = _FLOATS,
        typed: tuple[int, ...] = (0,),
        has_triton: bool = True,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.family, self.used_by, self.dtypes = family, used_by, dtypes
        self.typed, self.has_triton = typed, has_triton
        self.__doc__ = f"{schema}\n\n{doc}"
        define(schema)
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake or _no_results, lib=_library)
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._functions: dict[str, Callable[..., Any]] = {"native": self.overload}
        self._obstacles: dict[tuple[str, str], str | None] = {}
        self._chosen: dict[tuple[str, frozenset[torch.dtype], str | None], str] = {}
        self._logged: set[tuple[str, str]] = set()
        OPS[self.name] = self

    def eager(self, function: F) -> F:
        """Makes a function of plain PyTorch the reference, which runs on every device."""
        _library.impl(self.name, function, "CompositeExplicitAutograd")
        self._functions["eager"] = function
        return function

    def triton(self, function: F) -> F:
        """Makes a function the launcher of the Triton kernel."""
        self._functions["triton"] = function
        return function

    def on(self, backend: str) -> Callable[..., Any]:
        """The function of one backend, with the op's signature."""
        if backend not in self._functions:  # importing Triton takes a second
            importlib.import_module(f"{NAMESPACE}.triton_kernels.{self.family}")
        return self._functions[backend]

    def __call__(self, *args: Any, backend: str | None = None, **options: Any) -> Any:
        """Runs the op on the backend that is asked for, or else on the first that can run it."""
        tensors: list[Tensor] = []
        for i in self.typed:
            tensors += args[i] if isinstance(args[i], list) else (args[i],)
        chosen = self.choose(tensors[0].device.type, {t.dtype for t in tensors}, backend)
        return self.on(chosen)(*args, **options)

    @torch.compiler.assume_constant_result  # a graph keeps the choice, and does not look at what led to it
    def choose(self, device_type: str, dtypes: Iterable[torch.dtype], backend: str | None = None) -> str:
        """The backend that runs the op for these dtypes and this type of device.

        Raises:
            ValueError: an unknown backend.
            RuntimeError: an explicit backend that can't run here.
        """
        case = device_type, frozenset(dtypes), WISH if backend is None else backend
        return self._chosen.get(case) or self._choose(*case)

    def _choose(self, device_type: str, dtypes: frozenset[torch.dtype], backend: str | None) -> str:
        check_backend(ENV if backend == WISH else self.name, backend)
        floats = dtypes - {torch.int8}  # codes of a float tensor
        if backend is None:
            chosen = self._first_usable(device_type, floats)
        elif (reason := self.rejection(backend, device_type, floats)) is None:
            chosen = backend
        else:
            remedy = f"Unset backend and {ENV}: what can run is then chosen."
            raise RuntimeError(message(self.name, f"backend {backend!r} to be usable", reason, remedy))
        self._chosen[device_type, dtypes, backend] = chosen
        return chosen

    def rejection(self, backend: str, device_type: str, dtypes: Iterable[torch.dtype] = ()) -> str | None:
        """Why a backend can't run the op on this type of device and these dtypes, or None if it can."""
        if backend != "eager":
            for dtype in dtypes:
                if dtype not in _KERNEL_DTYPES:
                    return f"kernels take float32, bfloat16 and float16, not {dtype}"
        key = (backend, device_type)
        return self._obstacles[key] if key in self._obstacles else self._obstacle(backend, device_type)

    def _obstacle(self, backend: str, device_type: str) -> str | None:
        """Why a backend can't run the op on a type of device, whatever the dtypes; None if it can."""
        if backend == "eager":
            return None
        if backend == "native":
            if device_type not in _DEVICES:
                return f"there is no native library for {device_type}"
            status = _native.status(device_type)
            if not status.loaded:
                return status.reason
            if not _native.has_kernel(self.name, device_type):
                return f"the native library for {device_type} has no kernel for this op"
            return None
        interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
        if device_type != "cuda" and not interpreted:
            return f"Triton kernels run on cuda, not on {device_type}"
        if torch.version.hip is not None and not interpreted:
            return "Triton kernels are for NVIDIA GPUs, and this torch is for ROCm"
        if not self.has_triton:
            return "there is no Triton kernel for this op"
        return "triton is not installed" if importlib.util.find_spec("triton") is None else None

    def _first_usable(self, device_type: str, dtypes: Iterable[torch.dtype]) -> str:
        """The automatic choice, logged once for each type of device and outcome, with the reasons against others."""
        reasons: list[str] = []
        for backend in BACKENDS:
            reason = self.rejection(backend, device_type, dtypes)
            if reason is None:
                if (device_type, backend) not in self._logged:
                    self._logged.add((device_type, backend))
                    logger.info("%s on %s: %s", self.name, device_type, "; ".join([backend, *reasons]))
                return backend
            reasons.append(f"{backend}: {reason}")
        raise AssertionError("eager runs everywhere")


def define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.needs_exact_strides,))


def bind() -> None:
    """Finds out once what can run; puts Triton behind the ops on CUDA where the native library is missing."""
    for op in OPS.values():
        for backend in BACKENDS:
            for device_type in _DEVICES:
                op._obstacles[backend, device_type] = op._obstacle(backend, device_type)
        if op._obstacles["native", "cuda"] is not None and op._obstacles["triton", "cuda"] is None:
            _library.impl(op.name, partial(_run_on_triton, op), "CUDA")


def _run_on_triton(op: Op, *args: Any, **options: Any) -> Any:
    return op.on("triton")(*args, **options)


def check_backend(where: str, backend: str | None) -> None:
    """Raises ValueError for what is neither None nor the name of a backend, and if the environment variable is not what
    it was when this was imported."""
    known = backend is None or backend in BACKENDS
    require(known, where, f"backend among {', '.join(BACKENDS)}", repr(backend), _NATIVE)
    now = os.environ.get(ENV) or None
    contract, remedy = f"{_FOUND!r}, as when singlepass was imported", "Set it before, or pass backend=."
    require(now == _FOUND, ENV, contract, repr(now), remedy)


def requested(backend: str | None) -> str | None:
    """The explicit choice: the argument, else the environment variable, else None.

    Raises:
        ValueError: the environment variable names no backend.
    """
    if backend is None and WISH is not None:
        check_backend(ENV, WISH)
    return WISH if backend is None else backend


def _no_results(*args: object, **kwargs: object) -> None:
    """The fake of an op that only writes to its arguments."""
