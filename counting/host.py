# SPDX-License-Identifier: Apache-2.0
"""What a call does on the host: ops of PyTorch that it dispatches, and whether it would wait for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros"),
    *("ones", "ones_like", "full", "full_like", "arange", "rand", "randn", "clone", "cat", "stack"),
)
COPIES = ("copy_", "_to_copy", "clone", "lift_fresh", "lift_fresh_copy")
# What needs a value of the device on the host, or a size that depends on one.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "item")


class HostReadError(RuntimeError):
    """A value of the device was asked for."""


class HostOps(TorchDispatchMode):
    """Counts ops by name. Reads of values are errors, unless they are allowed and counted."""

    def __init__(self, allow_reads: bool = False) -> None:
        super().__init__()
        self.aten = Counter[str]()
        self.own = Counter[str]()
        self._allow_reads = allow_reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "aten" and name in READS and not self._allow_reads:
            raise HostReadError(f"counting: expected no read of a value; got {name}. Keep the value on the device")
        if namespace in ("aten", "singlepass"):
            (self.aten if namespace == "aten" else self.own)[name] += 1
        return func(*args, **(kwargs or {}))

    def count(self, *names: str) -> int:
        return sum(self.aten[name] for name in names)


def host_ops(call: Callable[[], object], allow_reads: bool = False) -> HostOps:
    """What a call does, once it has been called before."""
    call()
    with HostOps(allow_reads) as ops:
        call()
    return ops
