# SPDX-License-Identifier: Apache-2.0
"""Shapes of the tensors that activations see in real models, and the passes that are measured over them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

FORWARD, BACKWARD = "rational", "rational_backward"
# How the ops of the family are measured: training calls the backward op after the forward one.
TITLES = {FORWARD: "forward", BACKWARD: "forward + backward"}


@dataclass(frozen=True)
class Activation:
    """What an activation is called on; channels come last. `title` is what a plot calls it."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def title(self) -> str:
        return str(self.shape)

    @property
    def elements(self) -> int:
        return prod(self.shape)


GROUPS = 8
TOKENS = 197  # 14 x 14 patches of an image and a class token
# In each block of a Kolmogorov-Arnold Transformer, the first activation sees the model's width D and the second 4 D;
# D is 192, 384 and 768 in KAT-T, -S and -B. The KAT paper's own benchmark is (64, 1000, 512).
KAT_CPU = tuple(Activation((16, TOKENS, channels)) for channels in (3072, 768))
KAT_CUDA = tuple(Activation((128, TOKENS, channels)) for channels in (3072, 768, 1536, 384, 192))
KAT_PAPER = Activation((64, 1000, 512))
ACTIVATIONS = {"cpu": KAT_CPU, "cuda": (KAT_CUDA[0], KAT_PAPER, *KAT_CUDA[1:])}
