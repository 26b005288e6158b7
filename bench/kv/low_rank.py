# SPDX-License-Identifier: Apache-2.0
"""A layer that keeps half of the channels of its tokens, in coordinates of some bases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .caches import HEADS, RANK, WIDTH
from .inputs import Call, Inputs, split


def low_rank_layer(backend: str, bits: tuple[int, int] | None, data: Inputs) -> Any:
    """A layer that holds the tokens, projected on half of some bases. Queries are those of the newest token."""
    from singlepass.kv import MatryoshkaLayer

    generator = torch.Generator(data.k.device).manual_seed(1)
    options: dict[str, Any] = {"generator": generator, "device": data.k.device}
    bases = [torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, **options)).Q for _ in range(2)]
    layer = MatryoshkaLayer(*bases, key_ranks=RANK, value_ranks=RANK, bits=bits, backend=backend)
    compressed = split(data)[1]
    q = None if bits is None else data.q.expand(-1, -1, compressed, -1)
    layer.store(q, data.k[:, :, :compressed], data.v[:, :, :compressed])
    layer.append(data.k[:, :, compressed:], data.v[:, :, compressed:])
    return layer


def own_low_rank(bits: tuple[int, int] | None, backend: str, data: Inputs) -> Call:
    layer = low_rank_layer(backend, bits, data)
    return lambda: layer.attend(data.q)


def own_append(backend: str, data: Inputs) -> Call:
    """What projecting is judged by: the tokens as they come back."""
    layer = low_rank_layer(backend, None, data)
    return lambda: torch.cat([x.flatten() for x in layer.dequantize()])


def append_alone(backend: str, data: Inputs) -> Call:
    """What is timed. Each call adds a token, for what a call takes does not depend on how many there are."""
    layer = low_rank_layer(backend, None, data)
    k, v = data.k[:, :, :1].contiguous(), data.v[:, :, :1].contiguous()

    def call() -> Tensor:
        layer.append(k, v)
        return k

    return call


def low_rank_truth(bits: tuple[int, int] | None, data: Inputs) -> Tensor:
    k, v = (x.double() for x in low_rank_layer("eager", bits, data).dequantize())
    return F.scaled_dot_product_attention(data.q.double(), k, v, enable_gqa=True)
