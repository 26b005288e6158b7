# SPDX-License-Identifier: Apache-2.0
"""What the examples on handwritten digits share: the data and a small vision transformer.

They import what the extra "examples" brings where it is used, so that --help works without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

SEED = 0
BATCH = 32


class Mlp(nn.Module):
    """A transformer's MLP, its parts called as timm calls them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Sees an image of 8x8 pixels as 16 patches of 2x2, and gives a score for each of ten digits."""

    def __init__(self, dim: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, dim))
        self.layers = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(dim=1))


class Digits:
    """1,797 real digits, four fifths to train on: images (n, 1, 8, 8) in [-1, 1], labels (n,)."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=SEED)
        self.train_images, self.test_images = (torch.tensor(x).float().reshape(-1, 1, 8, 8) / 8 - 1 for x in split[:2])
        self.train_labels, self.test_labels = (torch.tensor(y) for y in split[2:])

    @property
    def batches_per_epoch(self) -> int:
        return len(self.train_labels) // BATCH  # whole batches only

    def batches(self, steps: int, seed: int = SEED) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches, the same ones at every call with the same seed."""
        generator = torch.Generator().manual_seed(seed)
        count = self.batches_per_epoch * BATCH
        epochs = -(-steps * BATCH // count)
        order = torch.cat([torch.randperm(len(self.train_labels), generator=generator)[:count] for _ in range(epochs)])
        for chosen in order.split(BATCH)[:steps]:
            yield self.train_images[chosen], self.train_labels[chosen]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the test digits. The model is left as it was."""
        training = model.training
        correct = model.eval()(self.test_images).argmax(dim=1) == self.test_labels
        model.train(training)
        return correct.float().mean().item()
