# SPDX-License-Identifier: Apache-2.0
"""Bytes that Triton's kernels read and write, counted while its interpreter runs them on the CPU.

A request is what a program asks for at once: a tile. How lanes share it is up to the compiler, so sectors of warps are
not counted; the compiled code shows how wide accesses are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

from singlepass._ops import Op

from ..traffic import SECTOR, Counts, Owners, Tensors, Traffic, tensors_of


@dataclass
class _Count:
    """Of one direction, to one buffer, while a call runs. sectors: those of each launch."""

    requests: int = 0
    requested: int = 0
    ideal: int = 0
    sectors: dict[int, list[NDArray[np.uint64]]] = field(default_factory=dict)

    def add(self, launch: int, addresses: NDArray[np.uint64], size: int) -> None:
        sectors = np.unique(addresses // SECTOR)
        self.requests, self.requested = self.requests + 1, self.requested + size * len(addresses)
        self.ideal += len(sectors)
        self.sectors.setdefault(launch, []).append(sectors)

    def counts(self) -> Counts:
        unique = sum(len(np.unique(np.concatenate(of_launch))) for of_launch in self.sectors.values())
        return Counts(self.requests, self.requested, self.ideal, self.ideal, unique * SECTOR)


@dataclass
class _Requests:
    """All requests of a call: whether they store, their launch, addresses, and bytes of an element."""

    launches: int = 0
    made: list[tuple[bool, int, NDArray[np.uint64], int]] = field(default_factory=list)

    def add(self, stores: bool, pointers: Any, mask: Any) -> None:
        every, asked = np.broadcast_arrays(pointers.data, mask)
        addresses = every[asked]
        if len(addresses):
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.made.append((stores, self.launches, addresses.astype(np.uint64), size))


@contextmanager
def _counting() -> Iterator[_Requests]:
    requests = _Requests()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    add = builder.create_atomic_rmw

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        requests.add(False, pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        requests.add(True, pointers, mask.data)
        return store(self, pointers, value, mask, *rest)

    def added(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for stores in (False, True):
            requests.add(stores, pointers, mask.data)
        return add(self, kind, pointers, value, mask, *rest)

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        result = launch(self, *arguments, **options)
        requests.launches += 1
        return result

    with (
        mock.patch.object(builder, "create_masked_load", loaded),
        mock.patch.object(builder, "create_masked_store", stored),
        mock.patch.object(builder, "create_atomic_rmw", added),
        mock.patch.object(executor, "__call__", launched),
    ):
        yield requests


def count(
    op: Op, run: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Traffic, Tensors]:
    """What a call of ``run`` does, which is ``op`` in Triton, interpreted; and the call's tensors."""
    with _counting() as requests:
        tensors = tensors_of(op, arguments, options, run(*arguments, **options))
    owners = Owners(tensors)
    found: tuple[dict[str, _Count], dict[str, _Count]] = {}, {}
    for is_store, launch, addresses, size in requests.made:
        # A tile lies in one tensor.
        (owner,) = owners.of(addresses[:1].astype(np.int64), 1)
        found[is_store].setdefault(owners.names[owner], _Count()).add(launch, addresses, size)
    loads, stores = ({name: c.counts() for name, c in of.items()} for of in found)
    return Traffic(requests.launches, loads, stores, 0, 0, 0), tensors
