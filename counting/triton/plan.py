# SPDX-License-Identifier: Apache-2.0
"""A launch of a Triton kernel as its launcher makes it, and what the compiler makes of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from .. import cubins
from ..cubins import Kernel
from ..plan import Compiled, Plan, Work
from .recorder import Launch

ITEMSIZE = {"fp32": 4, "bf16": 2}  # of a kernel's storage types


@dataclass(frozen=True)
class TritonPlan(Plan):
    """One launch. launch: as it is recorded, which says what to compile."""

    launch: Launch = field(kw_only=True)

    def compiled(self, arch: str) -> Compiled:
        return Compiled(self, _compiled(self.launch, arch))


def plan(
    launch: Launch,
    family: str,
    work: tuple[Work, ...],
    moved: float,
    hot: str,
    elements: float,
    blocks: int | None = None,
    **more: Any,
) -> TritonPlan:
    """As Plan; what a record of a launch says is taken from there. blocks: where it is of other tensors."""
    programs = prod(launch.grid) if blocks is None else blocks
    source, name = f"triton/{family}", name_of(launch)
    return TritonPlan(source, name, work, moved, programs, launch.threads, hot, elements, launch=launch, **more)


def name_of(launch: Launch) -> str:
    """Of the kernel, with its constants as C++ would write them."""
    constants = [launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr]
    return f"{launch.kernel.__name__}<{', '.join(str(getattr(c, '__name__', c)) for c in constants)}>"


_kernels: dict[tuple[str, str], Kernel] = {}


def _compiled(launch: Launch, arch: str) -> Kernel:
    """Launches that share their code share the kernel."""
    compiled = launch.compile(int(arch.removeprefix("sm_")))
    if (compiled.hash, arch) not in _kernels:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"kernel.{arch}.cubin"
            path.write_bytes(compiled.asm["cubin"])
            (kernel,) = cubins.read(path).values()
        # Triton asks for all of its shared memory when it launches.
        _kernels[compiled.hash, arch] = replace(kernel, name=name_of(launch), shared=compiled.metadata.shared)
    return _kernels[compiled.hash, arch]


def alone(kind: str, itemsize: int, elements: int) -> tuple[tuple[str, int], ...]:
    """As accesses() of one tensor, where each element is an access."""
    return ((f"{kind}.{8 * itemsize}", elements),)
