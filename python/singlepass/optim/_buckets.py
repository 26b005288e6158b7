# SPDX-License-Identifier: Apache-2.0
"""Sorts a group's parameters into buckets: each is what one call of an op can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import message, require
from .._ops import requested
from ._checks import check_parameter

if TYPE_CHECKING:
    from ._base import FusedOptimizer

# torch.compile's own check of its inputs: four times as fast as the same in Python, but not a public name.
TensorGuards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards = getattr(TensorGuards, "TensorGuards", None)

Check = Callable[[list[Tensor]], bool]


@dataclass
class Bucket:
    """Parameters of one group that one call of the op can take, and their gradients in this step."""

    backend: str
    asked: str | None  # the backend that was asked for, if any
    device: torch.device
    role: str  # not empty for parameters that a subclass steps in another way
    offsets: list[int]  # positions among the group's parameters that have gradients
    ids: list[int]  # positions in the optimizer
    params: list[Tensor]
    grads: list[Tensor]


class Sorter:
    """Makes the buckets of each step, and remembers how each group was sorted in the last one.

    What is remembered holds no tensor, so that nothing outlives its step here, and is used again only if all that it
    was derived from is as it was: which parameters there are, their types, dtypes, devices and layouts, their
    gradients' dtypes and layouts, and the backend that is asked for. Groups may be edited in any way between steps.
    """

    def __init__(self) -> None:
        self.has_sorted = False  # whether a group was sorted anew in this step
        self._known: dict[int, tuple[Any, Check, list[Bucket]]] = {}  # by position of the group

    def sort(self, optimizer: FusedOptimizer, index: int, first_id: int) -> list[Bucket]:
        """The buckets of a group's parameters that have a gradient; ``first_id`` is the position of its first one."""
        group = optimizer.param_groups[index]
        self.has_sorted &= index > 0
        grads = [p.grad for p in group["params"]]
        present = [g for g in grads if g is not None]
        params, offsets = group["params"], None
        if len(present) < len(grads):
            offsets = [offset for offset, g in enumerate(grads) if g is not None]
            params = [params[offset] for offset in offsets]
        backend = requested(group["backend"])
        if torch.compiler.is_compiling():  # the compiler's guards take the place of ours
            self.has_sorted = True
            return _sorted(optimizer, group, params, present, first_id, offsets, backend)
        facts = (
            [id(p) for p in params],
            [type(g) for g in present],
            [g.dtype for g in present],
            [g.layout for g in present],
            (offsets, first_id, backend, group["stochastic_rounding"]),
        )
        known, are_alike, buckets = self._known.get(index, (None, alike([]), []))
        if known != facts or not are_alike(params):
            self.has_sorted = True
            buckets = _sorted(optimizer, group, params, present, first_id, offsets, backend)
            self._known[index] = facts, alike(params), [replace(bucket, params=[], grads=[]) for bucket in buckets]
            return buckets
        if len(buckets) == 1:
            return [replace(buckets[0], params=list(params), grads=present)]
        return [
            replace(bucket, params=[params[i] for i in bucket.offsets], grads=[present[i] for i in bucket.offsets])
            for bucket in buckets
        ]


def _sorted(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    first_id: int,
    offsets: list[int] | None,
    backend: str | None,
) -> list[Bucket]:
    where = optimizer._name
    buckets: dict[tuple[torch.device, str, str], Bucket] = {}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        check_parameter(where, p)
        _check_gradient(where, p, g)
        role = optimizer._role_of(p)
        needed = _needed_backend(where, p, g, backend)
        if group["stochastic_rounding"] and is_sharded(p):
            require(False, where, "stochastic_rounding=False for DTensors", True, "Round to nearest there.")
        chosen = optimizer._op(role).choose(p.device.type, (p.dtype, g.dtype), needed)
        bucket = buckets.setdefault((p.device, chosen, role), Bucket(chosen, backend, p.device, role, [], [], [], []))
        bucket.offsets.append(i)
        bucket.ids.append(first_id + (i if offsets is None else offsets[i]))
        bucket.params.append(p)
        bucket.grads.append(g)
        optimizer._follow(p)
    return list(buckets.values())


def alike(tensors: list[Tensor]) -> Check:
    """A check whether tensors have the types, dtypes, devices, sizes and strides of these, without holding these."""
    if TensorGuards is not None:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return lambda others: bool(guards.check(*others))

    def facts(some: list[Tensor]) -> list[tuple[Any, ...]]:
        return [(type(t), t.dtype, t.device, t.shape, t.stride()) for t in some]

    expected = facts(tensors)
    return lambda others: facts(others) == expected


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape order their elements alike; strides of dimensions of size 1 don't matter."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _check_gradient(where: str, p: Tensor, g: Tensor) -> None:
    """Refuses gradients that no backend can take, before anything is changed."""
    if g.layout != torch.strided:
        remedy = "Create the embedding with sparse=False."
        raise RuntimeError(message(where, "dense gradients", f"a {g.layout} one", remedy))
    if not g.dtype.is_floating_point:
        raise RuntimeError(message(where, "floating-point gradients", g.dtype, "Convert them."))
    if g.shape != p.shape:
        contract, got = f"a gradient of shape {tuple(p.shape)}", tuple(g.shape)
        raise RuntimeError(message(where, contract, got, "Set it to None when the parameter changes."))


def _needed_backend(where: str, p: Tensor, g: Tensor, backend: str | None) -> str | None:
    """The backend to ask for: eager alone takes gaps in memory, and tensors that are made of other tensors."""
    if not _is_dense(p):
        contract, got = "dense parameters for kernels", f"shape {tuple(p.shape)} with strides {p.stride()}"
    elif is_wrapper(p) or is_wrapper(g):
        # A kernel would be called once for each tensor inside, and count as many steps.
        kind = f"parameter of type {type(p).__name__}" if is_wrapper(p) else f"gradient of type {type(g).__name__}"
        contract, got = "plain tensors for kernels", f"a {kind}"
    else:
        return backend
    require(backend in (None, "eager"), where, contract, got, 'Use backend="eager" or None.')
    return "eager"


def _is_dense(t: Tensor) -> bool:
    """Whether the strides order the elements without gaps: then, and only then, new tensors like it keep them."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()


def is_wrapper(t: Tensor) -> bool:
    """Whether a tensor's class runs operators itself, as DTensor does. Fake tensors stand for plain ones."""
    disabled = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
    return not disabled and not isinstance(t, torch._subclasses.FakeTensor)


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, told without importing what defines them."""
    return hasattr(t, "placements")


def has_values(t: Tensor) -> bool:
    """Whether the host can read elements: not of tensors on meta, of fake ones or of wrappers."""
    return t.device.type != "meta" and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_any_nonzero(t: Tensor) -> bool:
    """Whether an element is not 0, of the whole tensor if it is sharded. Tensors without values count as zeros."""
    if t.device.type == "meta" or isinstance(t, torch._subclasses.FakeTensor):
        return False
    return bool(whole(t.any()))


def whole(t: Tensor) -> Tensor:
    """A tensor, or all of one that is sharded, as a plain tensor on every rank."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]
