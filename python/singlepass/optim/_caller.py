# SPDX-License-Identifier: Apache-2.0
"""Calls native step ops by the addresses of tensors: each tensor that is passed in a list costs the host time."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops.optim import StepOp

# Two things that torch.compile has for itself, under names that are not public: a check of tensors, four times as fast
# as the same in Python, and a C function that finds a tensor's memory from its Python object.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_IS_CPYTHON = sys.implementation.name == "cpython"
TensorGuards = getattr(_guards, "TensorGuards", None)
_READER: int = getattr(_guards, "_torchinductor_pyobject_tensor_data_ptr", 0) if _IS_CPYTHON else 0

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as native ops number them

Check = Callable[[Sequence[Tensor]], bool]


def alike(tensors: Sequence[Tensor]) -> Check:
    """A check whether tensors have the types, dtypes, devices, sizes and strides of these, without holding these."""
    if TensorGuards is not None:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return lambda others: bool(guards.check(*others))

    def facts(some: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(type(t), t.dtype, t.device, t.shape, t.stride()) for t in some]

    expected = facts(tensors)
    return lambda others: facts(others) == expected


class Caller:
    """Calls the native step op of one bucket, whose parameters and gradients are alike in all steps.

    The first call passes tensors, which the op checks. Those that follow pass addresses, as long as states and counts
    are like the first call's too. What is remembered are layouts, never addresses: these are read anew in each step.
    """

    def __init__(self) -> None:
        # Of the lists of tensors that were checked: their lengths, whether others are like them, their layout.
        self._checked: tuple[list[int], Check, Tensor] | None = None

    def step(
        self,
        op: StepOp,
        lists: list[list[Tensor]],
        lr: Tensor,
        *,
        ids: list[int],
        offsets: list[int],
        **options: Any,
    ) -> None:
        """One step over ``lists``, which are the op's up to ``steps``."""
        if torch._C._len_torch_dispatch_stack() > 0:  # a mode that has to see the tensors
            op.on("native")(*lists, lr, ids=ids, offsets=offsets, **options)
            return
        lengths = list(map(len, lists))
        joined: list[Tensor] = []
        for values in lists:
            joined += values  # in a tenth of the time that an iterator over all tensors takes
        tensors = tuple(joined)
        others = tensors[2 * lengths[0] :]
        if self._checked is not None:
            known, are_alike, layout = self._checked
            if lengths == known and are_alike(others):
                words, address = _words(tensors)
                count = len(tensors) // lengths[0]
                op.at()(tensors[0], layout, lr, tensors=address, lists=count, reader=_READER, **options)
                del words  # which had to live until now
                return
        op.on("native")(*lists, lr, ids=ids, offsets=offsets, **options)
        if all(map(_is_plain, lists[0], lists[1])) and _PLAIN.issuperset(map(type, others)):
            self._checked = lengths, alike(others), _layout(lists[: 2 + len(op.states)], ids, offsets)


_PLAIN = {Tensor, torch.nn.Parameter}


def _is_plain(p: Tensor, g: Tensor) -> bool:
    """Whether the op takes both as they are: it copies a gradient in another memory order."""
    return _PLAIN.issuperset((type(p), type(g))) and p.stride() == g.stride()


def _words(tensors: tuple[Tensor, ...]) -> tuple[object, int]:
    """What keeps the words that stand for the tensors, and where they are: what ``_READER`` takes, or addresses."""
    if _READER:
        return tensors, id(tensors) + tuple.__basicsize__  # where CPython keeps the objects of a tuple
    addresses = array("q", map(Tensor.data_ptr, tensors))
    return addresses, addresses.buffer_info()[0]


def _layout(lists: list[list[Tensor]], ids: list[int], offsets: list[int]) -> Tensor:
    """Elements, ids, offsets and dtypes, as native ops take them; ``lists`` are those with dtypes."""
    none = [0] * len(lists[0])
    dtypes = list(none)
    for k, tensors in enumerate(lists):
        for i, t in enumerate(tensors):
            dtypes[i] |= _DTYPES[t.dtype] << 8 * k
    return torch.tensor([[p.numel() for p in lists[0]], ids or none, offsets or none, dtypes], device="cpu")
