# SPDX-License-Identifier: Apache-2.0
"""Launches without a GPU: what the launchers would launch is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import create_function_from_signature


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

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
