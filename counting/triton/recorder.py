# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton's kernels without a GPU: what the launchers would launch is recorded, and can be compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, create_function_from_signature

from singlepass._ops import OPS
from singlepass.triton_kernels import _launch, _table
from singlepass.triton_kernels.kv import launchers as kv
from singlepass.triton_kernels.optim import grad_norm
from singlepass.triton_kernels.optim import launchers as optim
from singlepass.triton_kernels.rational import launchers as rational
from singlepass.triton_kernels.spectral import launchers as spectral

TABLE = "list_chunks_kernel"  # makes the table of the tensors of steps, which is kept
LAUNCHERS = (_table, grad_norm, optim, rational, kv, spectral)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """By their names in the kernel."""
        return dict(zip(self.kernel.arg_names, self.args, strict=True))

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * int(self.options["num_warps"])

    def specialization(self, target: GPUTarget) -> tuple[dict[str, str], dict[str, Any], str]:
        """Signature, constants, and the key under which Triton keeps the compiled kernel."""
        backend = triton.compiler.make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, _ = binder(*self.args)
        types = [kind for kind, _ in specialization]
        signature = dict(zip(bound, types, strict=True))
        constants = {name: bound[name] for name, kind in signature.items() if kind == "constexpr"}
        return signature, constants, str(specialization)

    def compile(self, arch: int) -> CompiledKernel:
        target = GPUTarget("cuda", arch, 32)
        signature, constants, _ = self.specialization(target)
        return triton.compile(ASTSource(self.kernel, signature, constants), target=target, options=self.options)


@dataclass
class Recorder:
    """Stands for a kernel: launching it adds to the record."""

    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, grid, args, options))

        return launch


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """What all launchers launch meanwhile, on CPU tensors, which keep their values. Nothing runs."""
    launches: list[Launch] = []
    with ExitStack() as patches:
        patches.enter_context(mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}))
        patches.enter_context(mock.patch.object(_launch, "is_interpreted", return_value=True))
        for op in OPS.values():
            patches.enter_context(mock.patch.object(op, "_obstacles", {}))
            patches.enter_context(mock.patch.object(op, "_chosen", {}))
        for module in LAUNCHERS:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    patches.enter_context(mock.patch.object(module, name, Recorder(value, launches)))
                elif isinstance(value, _launch.Cache):
                    patches.enter_context(mock.patch.object(module, name, _launch.Cache()))
        yield launches
