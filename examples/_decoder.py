# SPDX-License-Identifier: Apache-2.0
"""A small language model of bytes in plain PyTorch, nearly all of whose parameters are weights of linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256
STD = 0.02  # of all weights at the start, as of GPT-2's and Llama's


def distances(heads: int, length: int) -> Tensor:
    """ALiBi (Press et al., arXiv 2108.12409): what is added to scores (heads, length, length); no position is learned.

    From one token to the next the first head loses 1, each further one a quarter of the one before.
    """
    back = torch.arange(length)[:, None] - torch.arange(length)
    slopes = 0.25 ** torch.arange(heads)
    return torch.where(back >= 0, -slopes[:, None, None] * back, -torch.inf)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("bias", distances(heads, length), persistent=False)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        length = x.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, self.bias[:, :length, :length])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = Attention(dim, heads, length)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Bytes (batch, length), int64, to scores of the byte that follows each (batch, length, 256)."""

    def __init__(self, dim: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, dim)
        self.layers = nn.Sequential(*(Block(dim, heads, length) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=STD)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(tokens))))
