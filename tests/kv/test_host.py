# SPDX-License-Identifier: Apache-2.0
"""What a step that compresses nothing asks of the host: how many ops, and that none reads a value from the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from singlepass.kv import ZipCacheLayer

from .layers import drawn, part
from .test_matryoshka_layer import made

READS = ("aten._local_scalar_dense", "aten.item", "aten._to_copy", "aten.lift_fresh")  # the last: of Python numbers


class Calls(TorchDispatchMode):
    """The names of all ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


STEPS: dict[str, tuple[Callable[[], Any], int]] = {
    # Two places in the window, two copies, two views of its bounds, attention, and a copy of the query as a probe.
    "zipcache": (ZipCacheLayer, 8),
    "one number of bits": (lambda: ZipCacheLayer(1.0), 7),
    # Two places, three projections with two new results, and what PyTorch's attention takes in other shapes.
    "low rank": (lambda: made(ranks=(16, 16)), 14),
    "low rank with bits": (lambda: made(ranks=(16, 16), bits=(4, 2)), 11),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_of_a_step(dtype: torch.dtype, name: str) -> None:
    make, most = STEPS[name]
    layer, tensors = make(), drawn(40, dtype=dtype)
    layer.prefill(*part(tensors, 0, 30))
    steps: list[tuple[Tensor, ...]] = [tuple(x.contiguous() for x in part(tensors, i, i + 1)) for i in range(30, 40)]
    for q, k, v in steps[:-1]:
        layer.append(k, v)
        layer.attend(q)
    q, k, v = steps[-1]
    with Calls() as calls:
        layer.append(k, v)
        layer.attend(q)
    assert len(calls.names) <= most, calls.names
    assert not [name for name in calls.names if name.startswith(READS)]
