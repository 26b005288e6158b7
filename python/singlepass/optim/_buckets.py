# SPDX-License-Identifier: Apache-2.0
"""Sorts a group's parameters into buckets: each is what one call of an op can take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import message, require
from .._ops import requested
from ._caller import Caller, Check, alike
from ._checks import check_parameter
from ._shards import check_placed_alike, has_shards, local, offset_of, specs

if TYPE_CHECKING:
    from ._base import FusedOptimizer


@dataclass
class Bucket:
    """Parameters of one group that one call of the op can take, and their gradients in this step."""

    backend: str
    asked: str | None  # the backend that was asked for, if any
    device: torch.device
    role: str  # not empty for parameters that a subclass steps in another way
    has_parts: bool = False  # whether some of the parameters are DTensors
    caller: Caller | None = None  # of a native op, in every step; None in a compiled one
    positions: list[int] = field(default_factory=list)  # among the group's parameters that have gradients
    ids: list[int] = field(default_factory=list)  # positions in the optimizer
    offsets: list[int] = field(default_factory=list)  # of this rank's parts, by which elements draw random numbers
    owners: list[Tensor] = field(default_factory=list)  # the optimizer's parameters, by which it finds their states
    params: list[Tensor] = field(default_factory=list)  # what the op takes: the same, or this rank's parts of DTensors
    grads: list[Tensor] = field(default_factory=list)


class Sorter:
    """Makes the buckets of each step, and remembers how each group was sorted in the last one.

    What is remembered holds no tensor, so that nothing outlives its step here, and is used again only if all that it
    was derived from is as it was: which parameters there are, their and their gradients' types, dtypes, devices, shapes
    and strides, and the backend that is asked for. Groups may be edited in any way between steps.
    """

    def __init__(self) -> None:
        self.has_sorted = False  # whether a group was sorted anew in this step
        self._known: dict[int, tuple[Any, Check, list[Bucket]]] = {}  # by position of the group

    def sort(self, optimizer: FusedOptimizer, index: int, first_id: int) -> list[Bucket]:
        """The buckets of a group's parameters that have a gradient; ``first_id`` is the position of its first one."""
        group = optimizer.param_groups[index]
        self.has_sorted &= index > 0
        all_grads = [p.grad for p in group["params"]]
        kinds = set(map(type, all_grads))
        owners, grads, present = group["params"], all_grads, None
        if type(None) in kinds:
            present = [i for i, g in enumerate(all_grads) if g is not None]
            owners, grads = [owners[i] for i in present], [all_grads[i] for i in present]
        backend = requested(group["backend"])
        if torch.compiler.is_compiling():  # the compiler's guards take the place of ours
            self.has_sorted = True
            return _sorted(optimizer, group, owners, grads, first_id, present, backend)
        params, parts, placed = owners, grads, None
        if any(map(has_shards, kinds)):
            params, parts, placed = list(map(local, owners)), list(map(local, grads)), specs((*owners, *grads))
        facts = (list(map(id, owners)), placed, (present, first_id, backend, group["stochastic_rounding"]))
        known, are_alike, buckets = self._known.get(index, (None, alike([]), []))
        if known != facts or not are_alike([*params, *parts]):
            self.has_sorted = True
            buckets = _sorted(optimizer, group, owners, grads, first_id, present, backend)
            for bucket in buckets:
                bucket.caller = Caller() if bucket.backend == "native" else None
            templates = [replace(bucket, owners=[], params=[], grads=[]) for bucket in buckets]
            self._known[index] = facts, alike([*params, *parts]), templates
            return buckets
        if len(buckets) == 1:
            return [replace(buckets[0], owners=list(owners), params=list(params), grads=parts)]
        return [
            replace(
                bucket,
                owners=[owners[i] for i in bucket.positions],
                params=[params[i] for i in bucket.positions],
                grads=[parts[i] for i in bucket.positions],
            )
            for bucket in buckets
        ]


def _sorted(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    owners: list[Tensor],
    grads: list[Tensor],
    first_id: int,
    present: list[int] | None,
    backend: str | None,
) -> list[Bucket]:
    where = optimizer._name
    buckets: dict[tuple[torch.device, str, str], Bucket] = {}
    for i, (owner, grad) in enumerate(zip(owners, grads, strict=True)):
        check_parameter(where, owner)
        _check_gradient(where, owner, grad)
        role = optimizer._role_of(owner)
        p, g = local(owner), local(grad)
        needed = _needed_backend(where, p, g, backend)
        chosen = optimizer._op(role).choose(p.device.type, (p.dtype, g.dtype), needed)
        bucket = buckets.setdefault((p.device, chosen, role), Bucket(chosen, backend, p.device, role))
        bucket.positions.append(i)
        bucket.ids.append(first_id + (i if present is None else present[i]))
        if group["stochastic_rounding"]:
            bucket.offsets.append(offset_of(owner))
        bucket.has_parts |= p is not owner
        bucket.owners.append(owner)
        bucket.params.append(p)
        bucket.grads.append(g)
        optimizer._follow(owner)
    return list(buckets.values())


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
    check_placed_alike(where, p, g)


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
    """Whether a tensor's class runs operators itself. Fake tensors stand for plain ones."""
    disabled = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
    return not disabled and not isinstance(t, torch._subclasses.FakeTensor)


def has_values(t: Tensor) -> bool:
    """Whether the host can read elements: not of tensors on meta, of fake ones or of wrappers."""
    return t.device.type != "meta" and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
