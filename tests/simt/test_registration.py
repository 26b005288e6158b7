# SPDX-License-Identifier: Apache-2.0
"""The registration that GPUs get: arguments, workspaces, results and the cache of tables, with kernels on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from singlepass._ops import OPS

from ..kv import samples as kv_samples
from ..optim import samples as optim_samples
from ..rational import samples as rational_samples
from ..spectral import samples as spectral_samples
from .ops import overload

FAMILIES = {"kv": kv_samples, "optim": optim_samples, "rational": rational_samples, "spectral": spectral_samples}


def copied(value: Any) -> Any:
    def copy(t: Tensor) -> Tensor:
        memory = t.untyped_storage().clone()
        return torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.shape, t.stride())

    return tree_map_only(Tensor, copy, value)


@pytest.mark.parametrize("name", OPS)
def test_every_op(name: str) -> None:
    op = OPS[name]
    # Which rounds 16-bit queries to integers on CPUs.
    other = "eager" if name in {"kv_decode", "kv_step_"} else "native"
    for sample in (sample for sample in FAMILIES[op.family].samples("cpu") if sample.op is op):
        ours, native = copied(sample.arguments), copied(sample.arguments)
        got = overload(op)(*ours, **sample.options)
        want = op.on(other)(*native, **sample.options)
        for a, b in zip(tree_leaves((got, ours)), tree_leaves((want, native)), strict=True):
            if isinstance(a, Tensor):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                torch.testing.assert_close(a, b, equal_nan=True)
