# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is: inputs, traffic of its floor, and the providers that compete on it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from .probe import Probe

Size = TypeVar("Size")

FAMILIES = ("optim", "rational", "kv", "spectral")

# Kinds of providers. A yardstick is another op than the case's own, for a bar that refers to it.
COLUMNS = ("native", "triton", "eager", "torch.optim", "yardstick", "torch.compile", "peer")


class Tier(IntEnum):
    """What a provider costs to measure."""

    FUSED = 0  # ours and torch's own fused code
    EAGER = 1  # plain PyTorch: many passes over memory
    COMPILED = 2  # by torch.compile, in seconds
    PEER = 3  # other packages as they are installed
    SLOW = 4  # what compiles for minutes: only with --full


@dataclass(frozen=True)
class Pass:
    """One trip through memory: the bytes of each stream that is only read, and of each that is read and written."""

    reads: tuple[int, ...]
    updates: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(self.reads) + 2 * sum(self.updates)


@dataclass(frozen=True)
class Step:
    """A provider ready to be timed. `before(i)` runs untimed ahead of the i-th call of `run`."""

    run: Callable[[], object]
    before: Callable[[int], None] = lambda i: None


@dataclass(frozen=True)
class Gate:
    """The outcome of comparing a provider with the float64 reference on a small input.

    `error` is the largest elementwise error in units of the allowed one: at most 1 means that it agrees.
    """

    error: float

    @classmethod
    def of(cls, errors: Iterable[torch.Tensor]) -> Gate:
        """The largest of all; what is not a number is as wrong as can be."""
        return cls(max((e.nan_to_num(nan=float("inf")).max().item() for e in errors), default=0.0))

    @property
    def agrees(self) -> bool:
        return self.error <= 1.0


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    name: identifier in results. column: one of `COLUMNS`; several variants of one kind share a column.
    prepare: builds a `Step` from the case's inputs. gate: compares with the float64 reference on a small input.
    why_not: the reason why it cannot run on a device, or None.
    differs: how the formula of a peer differs from ours; None where the gate must agree.
    footprint: bytes that it holds while it is timed, temporaries included.
    first_calls: calls until states are made and code is compiled.
    """

    name: str
    column: str
    tier: Tier
    prepare: Callable[[Any], Step]
    gate: Callable[[torch.device], Gate]
    why_not: Callable[[torch.device], str | None] = lambda device: None
    differs: str | None = None
    footprint: int = 0
    first_calls: int = 1


@dataclass(frozen=True)
class Case:
    """One op on one input.

    ops: the registered ops that are measured. passes: the traffic of the one-pass floor. flops: arithmetic of one call.
    elements: elements of the input (parameters, for an optimizer; x, for an activation); their bytes are `input_bytes`.
    tensors: how many tensors the call works on. warm: whether a call finds them in the CPU's cache, left there by
    another one: where it is asked what a call costs the host.
    """

    family: str
    op: str
    size: str
    dtype: torch.dtype
    ops: tuple[str, ...]
    passes: tuple[Pass, ...]
    flops: int
    elements: int
    input_bytes: int
    tensors: int
    inputs: Callable[[torch.device], Any]
    providers: tuple[Provider, ...] = field(repr=False)
    warm: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}/{self.op}/{self.size}/{dtype_name(self.dtype)}"

    @property
    def bytes(self) -> int:
        """Floor traffic in bytes."""
        return sum(p.bytes for p in self.passes)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def missing(package: str, device: torch.device) -> str | None:
    """Why a provider that needs a package can't run, or None."""
    return None if importlib.util.find_spec(package) else "not installed"


def own_reason(ops: Sequence[str], backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend of ours can't run all of these ops, or None."""
    from singlepass._ops import OPS

    return next((why for op in ops if (why := OPS[op].rejection(backend, device.type, (dtype,)))), None)


def cases(device: torch.device) -> Iterator[Case]:
    """All cases of all families that make sense on a device."""
    for family in FAMILIES:
        yield from module_of(family).cases(device)


def quick_cases(device: torch.device, probe: Probe) -> Iterator[Case]:
    """The cases of a run of minutes: each family's most telling first, in sizes that this machine gets through."""
    for family in FAMILIES:
        yield from module_of(family).quick_cases(device, probe)


def fitting(sizes: Sequence[Size], seconds: Callable[[Size], float], limit: float) -> Size:
    """The first of these sizes, largest first, whose seconds are within the limit; the last if none is."""
    return next((size for size in sizes if seconds(size) <= limit), sizes[-1])


def module_of(family: str) -> Any:
    return importlib.import_module(f".{family}.cases", __package__)
