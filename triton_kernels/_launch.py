# SPDX-License-Identifier: Apache-2.0
"""Shared by all launchers: the checks that memory safety needs, made before anything is changed, and a cache."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .._errors import require
from ._common import STORAGE, is_interpreted

T = TypeVar("T")
_get_dtype = Tensor.dtype.__get__  # type: ignore[attr-defined]


def require_device(op: str, lists: Sequence[Sequence[Tensor]]) -> torch.device:
    """Checks that all tensors are on one device on which Triton can run, and returns it."""
    devices = {t.device for tensors in lists for t in tensors}
    names = ", ".join(sorted(map(str, devices)))
    require(len(devices) == 1, op, "tensors on one device", names, "Call it once for each device.")
    (device,) = devices
    kind = "cpu" if is_interpreted() else "cuda"
    require(device.type == kind, op, f"{kind} tensors for the triton backend", device, "Choose backend='eager'.")
    return device


def require_dtypes(op: str, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        require(t.dtype in STORAGE, op, "float32, bfloat16 or float16 tensors", t.dtype, "Choose backend='eager'.")


def require_scalar(op: str, name: str, value: Tensor | None, device: torch.device) -> int:
    """The address of an optional float32 scalar on the device; 0 if there is none."""
    if value is None:
        return 0
    holds = value.device == device and value.dtype == torch.float32 and value.numel() == 1
    got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    require(holds, op, f"{name} as one float32 on {device}", got, f"Convert {name}.")
    return value.data_ptr()


def require_lengths(op: str, params: Sequence[Tensor], lists: Iterable[Sequence[Any]]) -> None:
    for values in lists:
        contract = f"{len(params)} in each list, one per parameter"
        require(len(values) == len(params), op, contract, len(values), "Pass lists of one length.")


def address_of_lr(op: str, lr: Tensor, device: torch.device) -> int:
    """The address of a learning rate on the device; 0 for one on the CPU, which the launcher passes by value."""
    if lr.device == device and lr.dtype == torch.float32:
        return require_scalar(op, "lr", lr, device)
    contract = f"lr on the CPU, or as a float32 on {device}"
    require(lr.device.type == "cpu", op, contract, f"{lr.dtype} on {lr.device}", "Convert lr.")
    return 0


def log_of(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one, because Triton launches on the current stream of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """True if the current stream captures a CUDA graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def identities(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """The addresses and dtypes of tensors."""
    return tuple(map(Tensor.data_ptr, tensors)), tuple(map(_get_dtype, tensors))


def layouts(tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    """The shapes and strides of tensors."""
    return tuple(map(Tensor.size, tensors)), tuple(map(Tensor.stride, tensors))


class Cache(Generic[T]):
    """A least-recently-used cache of values, each made from some content on some stream and valid for these alone.

    While a CUDA graph is captured, the cache is neither read nor filled, because the graph could outlive an entry.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[object, tuple[object, T]] = OrderedDict()

    def get(self, key: object, content: object, device: torch.device, make: Callable[[], T]) -> T:
        """``key`` is a part of the content that is cheap to hash. An entry counts only if all its content is equal."""
        if is_capturing(device):
            return make()
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        full_key = (key, device, stream)
        entry = self._entries.get(full_key)
        if entry is None or entry[0] != content:
            entry = (content, make())
            self._entries[full_key] = entry
            if len(self._entries) > self.capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(full_key)
        return entry[1]
