# SPDX-License-Identifier: Apache-2.0
"""DTensors: the part of each that this rank holds, and where it stands in the whole tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .._errors import message, require

if TYPE_CHECKING:  # whoever has a DTensor has imported what defines it
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    return has_shards(type(t))


def has_shards(kind: type) -> bool:
    """Whether a class of tensors is DTensor."""
    return hasattr(kind, "placements")


def local(t: Tensor) -> Tensor:
    """The tensor itself, or the part of a DTensor that this rank holds: its memory, not a copy."""
    # Of a parameter, to_local() makes a new view each time, which takes the host 3 us.
    inside: Tensor = getattr(t, "_local_tensor", t)
    return inside if type(inside) is Tensor else _arrived(inside)


def _arrived(t: Tensor) -> Tensor:
    """What a collective that may still be under way returns; other tensors as they are."""
    wait = getattr(t, "trigger_wait", None)
    return t if wait is None else wait()


def specs(tensors: Iterable[Tensor]) -> list[Any]:
    """Mesh and placements of each, as objects that are equal if these are; None of plain tensors."""
    # In a fifth of the time that the public properties take, which are read where something is derived from them.
    return [getattr(t, "_spec", None) for t in tensors]


def whole(t: Tensor) -> Tensor:
    """A tensor, or all of one that is sharded, as a plain tensor on every rank."""
    return t.full_tensor() if is_sharded(t) else t


def check_placements(where: str, p: Tensor) -> None:
    """Raises ValueError for a parameter that is a sum still to be made."""
    if is_sharded(p) and any(placement.is_partial() for placement in p.placements):
        remedy = "Redistribute it to Replicate() or Shard(0) first."
        require(False, where, "parameters placed by Shard or Replicate", _described(p), remedy)


def check_placed_alike(where: str, p: Tensor, g: Tensor) -> None:
    """Raises RuntimeError for a gradient whose parts are not those of its parameter."""
    if _placement(p) == _placement(g) and local(p).shape == local(g).shape:
        return
    contract = f"a gradient placed as its parameter: {_described(p)}"
    remedy = "Redistribute it: g.redistribute(p.device_mesh, p.placements)."
    raise RuntimeError(message(where, contract, _described(g), remedy))


def _described(t: Tensor) -> str:
    if not is_sharded(t):
        return "a plain tensor"
    ranks = " x ".join(map(str, t.device_mesh.shape))
    return f"{t.placements} on {ranks} ranks, here {tuple(local(t).shape)}"


def _placement(t: Tensor) -> Any:
    (spec,) = specs([t])
    return None if spec is None else (spec.mesh, spec.placements)


def ranks_of(p: Tensor) -> tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...]]:
    """The groups of ranks that a parameter is divided over, and those that hold copies: one for each dimension of its
    mesh that has several ranks."""
    if not is_sharded(p):
        return (), ()
    mesh = p.device_mesh
    if mesh.get_coordinate() is None:
        return (), ()
    sizes = zip(p.placements, mesh.shape, strict=True)
    copies = {dim: placement.is_replicate() for dim, (placement, size) in enumerate(sizes) if size > 1}
    divided = tuple(mesh.get_group(dim) for dim, is_copy in copies.items() if not is_copy)
    return divided, tuple(mesh.get_group(dim) for dim, is_copy in copies.items() if is_copy)


def offset_of(p: Tensor) -> int:
    """The place of the first element of this rank's part, by which elements draw random numbers.

    Of contiguous rows it is their place in the whole tensor, so that they draw what they would in one process. Other
    parts get places that no two of them share. Replicas have the same.
    """
    if not is_sharded(p):
        return 0
    from torch.distributed.tensor import Shard

    coordinates = p.device_mesh.get_coordinate()
    if coordinates is None:  # of a rank outside the mesh, which holds nothing
        return 0
    part, by_rows, first_row, rows = 0, p.is_contiguous(), 0, p.shape[0] if p.dim() else 1
    for placement, size, coordinate in zip(p.placements, p.device_mesh.shape, coordinates, strict=True):
        if placement.is_replicate():
            continue
        part = part * size + coordinate
        by_rows &= type(placement) is Shard and placement.dim == 0
        chunk = -(-rows // size)
        skipped = min(coordinate * chunk, rows)
        first_row, rows = first_row + skipped, min(chunk, rows - skipped)
    if by_rows:
        return first_row * p.shape[1:].numel()
    return part * (-(-p.numel() // 8) * 8)  # eight elements share one draw


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in a parameter's layout and placement."""
    part = local(p)
    return _placed_as(p, torch.zeros_like(part, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False))


def copy_like(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a value of a parameter's shape, sharded in any way or not, in its layout and placement."""
    part = torch.empty_like(local(p), dtype=dtype, requires_grad=False)
    return _placed_as(p, part.copy_(_part_for(p, value)))


def is_laid_out_as(p: Tensor, value: Tensor) -> bool:
    """Whether a value of a parameter's shape is placed as it is, and has its order of elements in memory."""
    return _placement(p) == _placement(value) and same_layout(local(p), local(value))


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape order their elements alike; strides of dimensions of size 1 don't matter."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _placed_as(p: Tensor, part: Tensor) -> Tensor:
    if not is_sharded(p):
        return part
    # Without shape and strides, it would take all parts for as large as this one.
    return type(p).from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=tuple(p.stride())
    )


def _part_for(p: Tensor, value: Tensor) -> Tensor:
    """What of a value belongs to the part of a parameter that this rank holds."""
    if is_sharded(value) and _placement(value) != _placement(p):
        value = whole(value)
    if is_sharded(p) and not is_sharded(value):
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate()] * p.device_mesh.ndim
        replicas = DTensor.from_local(value.to(p.device), p.device_mesh, everywhere, run_check=False)
        value = replicas.redistribute(p.device_mesh, p.placements)
    return local(value)
