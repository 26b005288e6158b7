# SPDX-License-Identifier: Apache-2.0
"""Functions under test on the CPU or on a GPU: the backend "cuda triton" is Triton's on copies in GPU memory, and
"simt" is what "cuda native" is, with kernels that run on the CPU.

Copies have the layout, the alignment and the surroundings of what they are made from, and what a function writes comes
back to its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from singlepass._ops import OPS

from .simt.ops import in_place_of_native


class _Copies:
    """Copies of whole memories, each made once."""

    def __init__(self) -> None:
        self.memories: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def move(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            own = value.untyped_storage()
            if own.data_ptr() not in self.memories:
                self.memories[own.data_ptr()] = own, own.cuda()
            copy = torch.empty(0, dtype=value.dtype, device="cuda")
            return copy.set_(self.memories[own.data_ptr()][1], value.storage_offset(), value.shape, value.stride())
        return _map(self.move, value)

    def write_back(self) -> None:
        for own, copy in self.memories.values():
            own.copy_(copy)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(function, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: function(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def _home(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else _map(_home, value)


def placed(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run(*args, backend=...)`` on copies if the backend says so."""

    def call(*args: Any, backend: str | None = None, **options: Any) -> Any:
        if backend == "simt":
            with in_place_of_native():
                return run(*args, backend="native", **options)
        if backend is None or not backend.startswith("cuda "):
            return run(*args, backend=backend, **options)
        copies = _Copies()
        args = copies.move(args)
        options = {name: copies.move(value) for name, value in options.items()}
        result = run(*args, backend=backend.removeprefix("cuda "), **options)
        copies.write_back()
        return _home(result)

    return call


def implementation(name: str, backend: str) -> Callable[..., Any]:
    """The op itself."""

    def run(*args: Any, backend: str, **options: Any) -> Any:
        return OPS[name].on(backend)(*args, **options)

    def call(*args: Any, **options: Any) -> Any:
        return placed(run)(*args, backend=backend, **options)

    return call
