# SPDX-License-Identifier: Apache-2.0
"""Bytes, sectors, wavefronts and launches of CUDA kernels, counted while they run on the CPU.

csrc/simt/simt_traffic.h counts requests by address; here they are given to the tensors of an op's call. Memory that is
none of theirs is the workspace: what the op allocates for itself, and the table of tensors that a step reads.

What the counts are not: GCC's accesses after its early optimisations are not a GPU's instructions; lanes that leave out
turns of a loop shift their place among the others until they meet again; no cache is modelled, so that a tensor is
"once" where each launch reads each of its sectors once, however often it asks for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from singlepass._ops import Op, kv

SECTOR = 32  # bytes
WORKSPACE = "workspace"
_LAUNCH_SHIFT = 43


@dataclass(frozen=True)
class Counts:
    """Of one direction, to one buffer."""

    requests: int = 0
    requested: int = 0  # bytes, each lane's for itself
    sectors: int = 0  # of all requests
    ideal: int = 0  # the fewest sectors that hold what each request asks for
    unique: int = 0  # bytes of sectors, each sector once per launch


@dataclass(frozen=True)
class Traffic:
    """``loads`` and ``stores`` by the name of the tensor, or WORKSPACE."""

    launches: int
    loads: Mapping[str, Counts]
    stores: Mapping[str, Counts]
    shared_requests: int
    wavefronts: int
    ideal_wavefronts: int

    def __str__(self) -> str:
        lines = [
            f"{self.launches} launches",
            f"shared memory: {self.shared_requests} requests, {self.wavefronts} wavefronts of {self.ideal_wavefronts}",
        ]
        for kind, counts in (("loads", self.loads), ("stores", self.stores)):
            lines += (
                f"{kind} of {name}: {c.requests} requests for {c.requested} bytes, {c.sectors} sectors of {c.ideal}; "
                f"{c.unique} bytes once"
                for name, c in counts.items()
            )
        return "\n".join(lines)


class _Counted(ctypes.Structure):
    _fields_ = (
        ("requests", ctypes.POINTER(ctypes.c_int64)),
        ("request_count", ctypes.c_int64),
        ("sectors", ctypes.POINTER(ctypes.c_uint64)),
        ("sector_count", ctypes.c_int64),
        ("shared_requests", ctypes.c_int64),
        ("shared_wavefronts", ctypes.c_int64),
        ("shared_ideal", ctypes.c_int64),
    )


Tensors = Mapping[str, list[Tensor]]


def tensors_of(op: Op, arguments: Sequence[Any], options: Mapping[str, Any], results: Any) -> Tensors:
    """The tensors of a call by their names in the schema; those that it returns as "result", numbered if several."""
    given = {declared.name: value for declared, value in zip(op.overload._schema.arguments, arguments, strict=False)}
    named: dict[str, list[Tensor]] = {}
    for argument, value in {**given, **options}.items():
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(tensor, Tensor):
                name = kv.SEGMENT[i % len(kv.SEGMENT)] if argument == "segments" else argument
                named.setdefault(name, []).append(tensor)
    results = [] if results is None else [results] if isinstance(results, Tensor) else list(results)
    for i, tensor in enumerate(results):
        named.setdefault("result" if len(results) == 1 else f"result {i}", []).append(tensor)
    return named


def floor(op: Op, tensors: Tensors, read: Mapping[str, float], written: Mapping[str, float]) -> int:
    """Bytes of a call that reads its arguments once, and writes its results and what it changes in place once.

    ``read`` and ``written`` say of which tensors it is another share than all or nothing.
    """
    changed = {a.name for a in op.overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    total = 0.0
    for name, several in tensors.items():
        size = sum(t.numel() * t.element_size() for t in several)
        made = name.startswith("result")
        total += size * (read.get(name, not made) + written.get(name, made or name in changed))
    return round(total)


def count(
    library: Path, op: Op, run: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Traffic, Tensors]:
    """What a call of ``run`` does, which is ``op`` as ``library``, built to count, has it; and the call's tensors."""
    functions = ctypes.CDLL(str(library))
    functions.simt_finish_counting.restype = _Counted
    before = functions.simt_launches()
    functions.simt_start_counting()
    tensors = tensors_of(op, arguments, options, run(*arguments, **options))
    counted = functions.simt_finish_counting()
    requests = _array(counted.requests, counted.request_count, 5)
    sectors = _array(counted.sectors, counted.sector_count, 1)[:, 0]
    owners = Owners(tensors)
    by_request = owners.of(requests[:, 0], 1)
    stored = (sectors & 1).astype(bool)
    by_sector = owners.of((sectors >> 1 & (1 << _LAUNCH_SHIFT - 1) - 1).astype(np.int64) * SECTOR, SECTOR)
    found: tuple[dict[str, Counts], dict[str, Counts]] = {}, {}
    for store, (owner, name) in product((0, 1), enumerate(owners.names)):
        chosen = requests[(requests[:, 1] == store) & (by_request == owner)]
        if len(chosen):
            unique = int(((stored == bool(store)) & (by_sector == owner)).sum()) * SECTOR
            requested, moved, ideal = chosen[:, 2:].sum(0).tolist()
            found[store][name] = Counts(len(chosen), requested, moved, ideal, unique)
    launches = functions.simt_launches() - before
    shared = counted.shared_requests, counted.shared_wavefronts, counted.shared_ideal
    return Traffic(launches, *found, *shared), tensors


def _array(pointer: Any, rows: int, columns: int) -> NDArray[Any]:
    if rows == 0:
        return np.zeros((0, columns), np.int64)
    return np.ctypeslib.as_array(pointer, (rows, columns)).copy()


class Owners:
    """To which buffer addresses belong: a number in ``names``."""

    def __init__(self, named: Tensors) -> None:
        self.names = [*named, WORKSPACE]
        ranges = sorted(self._ranges(named))
        self.begin, self.end, self.owner = (np.array(column, np.int64) for column in zip(*ranges, strict=True))

    @staticmethod
    def _ranges(named: Tensors) -> Iterator[tuple[int, int, int]]:
        for owner, tensors in enumerate(named.values()):
            for t in tensors:
                if t.numel():
                    extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
                    yield t.data_ptr(), t.data_ptr() + extent * t.element_size(), owner

    def of(self, addresses: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Of what lies in ``size`` bytes from each address on."""
        last = np.searchsorted(self.begin, addresses + size - 1, "right") - 1
        held = (last >= 0) & (addresses < self.end[last])
        return np.where(held, self.owner[last], len(self.names) - 1)
