# SPDX-License-Identifier: Apache-2.0
"""Low-rank layers, and what they keep of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from singlepass.kv import MatryoshkaLayer

from .inputs import generator


def bases(heads: int, width: int, seed: int = 0) -> Tensor:
    """Orthogonal matrices of so many heads."""
    return torch.linalg.qr(torch.randn(heads, width, width, generator=generator(seed), dtype=torch.float64)).Q.float()


def made(
    heads: int = 2, width: int = 32, value_width: int | None = None, ranks: tuple[Any, Any] = (16, 32), **options: Any
) -> MatryoshkaLayer:
    keys, values = bases(heads, width), bases(heads, value_width or width, 1)
    return MatryoshkaLayer(keys, values, key_ranks=ranks[0], value_ranks=ranks[1], **options)


def truncated(x: Tensor, matrices: Tensor, ranks: Any) -> Tensor:
    """What a cache keeps of x (batch, heads, tokens, channels), float64."""
    kept = torch.arange(x.shape[3]) < torch.as_tensor(ranks).expand(x.shape[1])[:, None]
    u = matrices.double() * kept[:, None]
    return x.double() @ u @ u.mT


def check(out: Tensor, want: np.ndarray, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Within roundings of as many additions as products of vectors and sums over tokens have, where a logit's error is
    one of its weight, and what is turned by a basis is rounded once more."""
    additions = 2 * q.shape[3] + v.shape[3] + k.shape[2] + 16
    logit = float(q.double().norm(dim=3).max() * k.double().norm(dim=3).max()) * q.shape[3] ** -0.5
    bound = additions * torch.finfo(q.dtype).eps * (1 + logit) * float(v.double().norm(dim=3).max())
    assert np.abs(out.double().numpy() - want).max() < bound


RANKS = {
    "uniform": (16, 32),
    "full": (32, 32),
    "ragged": ([16, 32, 16, 32], [16, 16, 32, 16]),
    "low-beside-full": ([16, 32, 32, 32], [32, 32, 16, 32]),
}
