# SPDX-License-Identifier: Apache-2.0
"""Heads of equal ranks, and how their vectors are projected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._errors import require
from ..._ops import kv as ops
from .._checks import FLOATS
from .._dense import DenseLayer
from .._functional import last_dense
from .._layer import ZipCacheLayer

Rotary = tuple[Tensor, Tensor]  # cosines and sines


class Projection:
    """How the keys or the values of all heads are projected, those of a group on as many directions as the group keeps.

    Args:
        matrices: orthogonal (heads, channels, channels), a basis in the columns of each. If they are the identity,
            vectors come in coordinates of a basis already.
        heads: the numbers of the heads of each group.
        ranks: how many directions each group keeps, the first ones.

    Attributes:
        order: the numbers of all heads, group after group.
        bases: of each group (its heads, channels, rank).
        is_identity: whether vectors come in coordinates of a basis already.
    """

    def __init__(self, matrices: Tensor, heads: list[list[int]], ranks: list[int]):
        self.channels, self.ranks = matrices.shape[1], ranks
        self.order = [head for its in heads for head in its]
        self.bases = [matrices[its, :, :rank].contiguous() for its, rank in zip(heads, ranks, strict=True)]
        self._transposed: list[Tensor] = []
        self._heads = [torch.tensor(its, device=matrices.device) for its in heads]
        whole = torch.eye(self.channels, dtype=matrices.dtype, device=matrices.device)
        self.is_identity = bool((matrices == whole).all())

    def settle(self, like: Tensor) -> None:
        """Chooses the dtype and the device for such vectors."""
        wide = torch.promote_types(like.dtype, torch.float32)
        if self._transposed and self._transposed[0].dtype == wide and self._transposed[0].device == like.device:
            return
        self.bases = [basis.to(like.device, wide) for basis in self.bases]
        self._transposed = [basis.mT.contiguous() for basis in self.bases]
        self._heads = [heads.to(like.device) for heads in self._heads]

    def empty(self, x: Tensor) -> list[Tensor]:
        """Room for what each group keeps of x (batch, n * heads, tokens, channels): (batch, n * its heads, tokens,
        rank)."""
        batch, heads, tokens, _ = x.shape
        n = heads // len(self.order)
        return [x.new_empty((batch, n * basis.shape[0], tokens, basis.shape[2])) for basis in self.bases]

    def copy(self, x: Tensor, to: list[Tensor]) -> None:
        """Writes there what each group keeps of x, which comes in coordinates of the bases."""
        rows = x.unflatten(1, (len(self.order), -1))
        for heads, rank, place in zip(self._heads, self.ranks, to, strict=True):
            its = rows if len(heads) == len(self.order) else rows.index_select(1, heads)
            place.copy_(its[..., :rank].flatten(1, 2))

    def back(self, parts: list[Tensor], backend: str | None) -> Tensor:
        """Vectors of all heads (batch, n * heads, tokens, channels), from what each group keeps of them."""
        restored = [self._restore(part, i, backend) for i, part in enumerate(parts)]
        if len(restored) == 1:
            return restored[0]
        n = restored[0].shape[1] // len(self._heads[0])
        batch, _, tokens, channels = restored[0].shape
        whole = restored[0].new_empty((batch, len(self.order), n, tokens, channels))
        for heads, part in zip(self._heads, restored, strict=True):
            whole.index_copy_(1, heads, part.unflatten(1, (len(heads), n)))
        return whole.flatten(1, 2)

    def _restore(self, part: Tensor, group: int, backend: str | None) -> Tensor:
        """A group's vectors (batch, n * its heads, tokens, channels)."""
        if self.is_identity:
            return F.pad(part, (0, self.channels - self.ranks[group]))
        whole = part.new_empty((*part.shape[:3], self.channels))
        bases = self._transposed[group]
        heads = list(range(bases.shape[0]))
        ops.project_([last_dense(part)], [bases], None, None, [whole], heads=heads, backend=backend)
        return whole


def project(
    projections: Sequence[Projection],
    x: Sequence[Tensor],
    rotary: Rotary | None,
    to: Sequence[list[Tensor]] | None,
    backend: str | None,
) -> list[list[Tensor]]:
    """What each group keeps of each of x (batch, n * heads, tokens, channels), in one pass.

    Args:
        projections: of each of x; their groups have the same heads.
        x: of the same tokens, such as keys and values.
        rotary: what the first of x is rotated by before.
        to: where that goes, as :meth:`Projection.empty` makes room.
        backend: "native", "triton" or "eager"; None selects one.
    """
    places = [projection.empty(its) for projection, its in zip(projections, x, strict=True)] if to is None else list(to)
    tokens: list[Tensor] = []
    bases: list[Tensor] = []
    out: list[Tensor] = []
    for i, (projection, its, place) in enumerate(zip(projections, x, places, strict=True)):
        if projection.is_identity and (i > 0 or rotary is None):
            projection.copy(its, place)
        else:
            tokens.append(last_dense(its))
            bases += projection.bases
            out += place
    if tokens:
        cos, sin = (None, None) if rotary is None else map(last_dense, rotary)
        ops.project_(tokens, bases, cos, sin, out, heads=projections[0].order, backend=backend)
    return places


@dataclass
class Group:
    """KV heads of equal ranks, and what is kept of them.

    Attributes:
        heads: their numbers.
        inner: their tokens, projected.
    """

    heads: list[int]
    inner: ZipCacheLayer | DenseLayer

    def queries_of(self, x: Tensor, heads: int) -> Tensor:
        """Of one number for each query head of ``heads`` KV heads, those of its heads."""
        if len(self.heads) == heads:
            return x
        return torch.stack([x.unflatten(0, (heads, -1))[head] for head in self.heads]).flatten()


def check_rotary(where: str, rotary: Rotary | None, x: Tensor) -> Rotary | None:
    """Cosines and sines for the tokens of x (batch, heads, tokens, channels), as kernels take them."""
    if rotary is None:
        return None
    remedy = "Pass what the model's rotary embedding gives."
    fits = isinstance(rotary, (tuple, list)) and len(rotary) == 2 and all(isinstance(t, Tensor) for t in rotary)
    require(fits, where, "rotary as a pair of tensors, cosines and sines", type(rotary).__name__, remedy)
    for t in rotary:
        fits = t.dim() == 3 and t.shape[0] in (1, x.shape[0]) and t.shape[1] == x.shape[2] and t.dtype in FLOATS
        fits = fits and t.shape == rotary[0].shape and t.device == x.device and 2 <= t.shape[2] <= x.shape[3]
        contract = f"rotary (1 or {x.shape[0]}, {x.shape[2]}, up to {x.shape[3]} channels) on {x.device}"
        require(fits and t.shape[2] % 2 == 0, where, contract, f"{tuple(t.shape)} of {t.dtype} on {t.device}", remedy)
    if all(t.dtype == x.dtype for t in rotary):
        return rotary
    wide = torch.promote_types(x.dtype, torch.float32)
    return rotary[0].to(wide), rotary[1].to(wide)


def check_bits(where: str, bits: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """A pair of them, for salient tokens and regular ones."""
    pair = bits if bits is None or isinstance(bits, (tuple, list)) else (bits, bits)
    fits = pair is None or (
        len(pair) == 2 and all(type(b) is int and b in ops.BITS for b in pair) and pair[0] >= pair[1]
    )
    require(fits, where, "bits None, 8, 4, 2 or a pair such as (4, 2)", repr(bits), "None: those of the tokens.")
    return None if pair is None else (pair[0], pair[1])
