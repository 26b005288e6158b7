# SPDX-License-Identifier: Apache-2.0
"""Heads of equal ranks, and how their vectors are projected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._errors import require
from .._dense import DenseLayer
from .._functional import BITS
from .._layer import ZipCacheLayer


class Basis:
    """The directions that some heads keep.

    Args:
        matrices: orthogonal (heads, channels, channels), a basis in the columns of each. If they are the identity,
            vectors come in coordinates of a basis already.
        rank: how many directions are kept, the first ones.
    """

    def __init__(self, matrices: Tensor, rank: int):
        self.channels, self.rank = matrices.shape[1], rank
        whole = torch.eye(self.channels, dtype=matrices.dtype, device=matrices.device)
        self._kept = None if bool((matrices == whole).all()) else matrices[..., :rank]

    def settle(self, like: Tensor) -> None:
        """Chooses dtype and device for such vectors. On CPUs products are float32: bfloat16 ones are slow if small."""
        if self._kept is not None:
            dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
            self._kept = self._kept.to(like.device, dtype)

    def project(self, x: Tensor) -> Tensor:
        """x (batch, heads, tokens, channels) in coordinates of the basis (batch, heads, tokens, rank)."""
        return x[..., : self.rank] if self._kept is None else (x.to(self._kept.dtype) @ self._kept).to(x.dtype)

    def back(self, y: Tensor) -> Tensor:
        """What has these coordinates."""
        if self._kept is None:
            return F.pad(y, (0, self.channels - self.rank))
        return (y.to(self._kept.dtype) @ self._kept.mT).to(y.dtype)


@dataclass
class Group:
    """KV heads of equal ranks, and what is kept of them.

    Attributes:
        heads: their numbers.
        keys: directions that are kept of their keys.
        values: and of their values.
        inner: their tokens, projected.
    """

    heads: list[int]
    keys: Basis
    values: Basis
    inner: ZipCacheLayer | DenseLayer

    def of(self, x: Tensor) -> Tensor:
        """Its heads of x (batch, heads, ...)."""
        return x if len(self.heads) == x.shape[1] else x[:, self.heads]

    def project(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Its heads of k and v (batch, heads, tokens, channels) in coordinates of the bases."""
        return self.keys.project(self.of(k)), self.values.project(self.of(v))

    def project_queries(self, q: Tensor, heads: int) -> Tensor:
        """Queries of its heads likewise, of all the query heads of ``heads`` KV heads."""
        group, queries = q.shape[1] // heads, q.shape[2]
        rows = self.keys.project(self.of(q.unflatten(1, (heads, group)).flatten(2, 3)))
        return rows.unflatten(2, (group, queries)).flatten(1, 2)

    def queries_of(self, x: Tensor, heads: int) -> Tensor:
        """Of one number for each query head those of its heads."""
        return x.unflatten(0, (heads, -1))[self.heads].flatten().contiguous()


def check_bits(where: str, bits: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """A pair of them, for salient tokens and regular ones."""
    pair = bits if bits is None or isinstance(bits, (tuple, list)) else (bits, bits)
    fits = pair is None or (len(pair) == 2 and all(type(b) is int and b in BITS for b in pair) and pair[0] >= pair[1])
    require(fits, where, "bits None, 8, 4, 2 or a pair such as (4, 2)", repr(bits), "None: those of the tokens.")
    return None if pair is None else (pair[0], pair[1])
