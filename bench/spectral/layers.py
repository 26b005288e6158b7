# SPDX-License-Identifier: Apache-2.0
"""Layers under sparse spectral training, and the ops that are measured over them."""

from __future__ import annotations

from dataclasses import dataclass

TRAIN, UPDATE, SCALE = "sst_linear", "spectral_step_", "spectral_scale_"
SAMPLE, SWAP = "spectral_sample", "spectral_swap_"
DECOMPOSE = "decompose"
LORENTZ, LORENTZ_BACKWARD = "lorentz", "lorentz_backward"
TITLES = {
    TRAIN: "training step",
    UPDATE: "update",
    SCALE: "scale and sum",
    SAMPLE: "draw vectors",
    SWAP: "swap vectors",
    DECOMPOSE: "decompose again",
    LORENTZ: "to the hyperboloid",
    LORENTZ_BACKWARD: "to the hyperboloid, backward",
}

# Vectors that are trained at a time, as a fraction of all.
RANK = 1 / 16


@dataclass(frozen=True)
class LayerShape:
    """A square layer and the tokens of a step. `title` is what a plot calls it."""

    width: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.tokens}"

    @property
    def title(self) -> str:
        return f"width {self.width:,}, {self.tokens:,} tokens"

    @property
    def rank(self) -> int:
        return max(1, round(RANK * self.width))


SHAPES = {
    "cpu": (LayerShape(1024, 2048), LayerShape(2048, 2048)),
    "cuda": (LayerShape(2048, 8192), LayerShape(4096, 8192)),
}

# The linear layers of a transformer of 12 blocks of width 768, as (outputs, inputs).
MODEL_NAME = "12-blocks-768"
MODEL = ((768, 768), (768, 768), (768, 768), (768, 768), (3072, 768), (768, 3072)) * 12
