# SPDX-License-Identifier: Apache-2.0
"""Singular value decompositions: of a weight at the start, and of U^T diag(s) V whose vectors have drifted."""

from __future__ import annotations

import torch
from torch import Tensor

# Vectors of smaller singular values, in proportion to the largest, would come out of the Gram matrix less orthogonal
# than float32 can tell: float64's rounding over the square of this.
_CONDITION = 3e-5


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (k, m) and V (k, n) as rows, and s (k,), descending, of a finite weight (m, n); in float64.

    From the eigenvectors of the smaller Gram matrix, or, where the condition number does not allow that, by
    torch.linalg.svd.
    """
    weight = weight.double()
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    _, right = torch.linalg.eigh(tall.mT @ tall)
    left = tall @ right
    s, order = torch.linalg.vector_norm(left, dim=0).sort(descending=True)
    if not s[-1] > _CONDITION * s[0]:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u.mT.contiguous(), s, v
    left, right = (left[:, order] / s).mT.contiguous(), right[:, order].mT.contiguous()
    return (left, s, right) if tall is weight else (right, s, left)


def drift(u: Tensor, v: Tensor) -> float:
    """The largest element of |U U^T - I| and |V V^T - I|: how far rows are from being orthonormal."""
    worst = 0.0
    for rows in (u, v):
        gram = rows @ rows.mT
        gram.diagonal().sub_(1.0)
        worst = max(worst, float(gram.abs().max()))
    return worst
