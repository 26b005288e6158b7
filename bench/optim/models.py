# SPDX-License-Identifier: Apache-2.0
"""Parameter shapes of real models, written as their architecture's formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A named list of parameter shapes. `title` is what a plot calls it."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes)


def linear(d_in: int, d_out: int) -> list[Shape]:
    return [(d_out, d_in), (d_out,)]


def layer_norm(d: int) -> list[Shape]:
    return [(d,), (d,)]


def transformer_block(d: int) -> list[Shape]:
    """Pre-norm block: attention with a joint query, key, value projection, and an MLP four times as wide."""
    attention = linear(d, 3 * d) + linear(d, d)
    mlp = linear(d, 4 * d) + linear(4 * d, d)
    return layer_norm(d) + attention + layer_norm(d) + mlp


def gpt2(layers: int = 12, d: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """GPT-2; the output layer shares the token embedding."""
    return [(vocabulary, d), (context, d)] + transformer_block(d) * layers + layer_norm(d)


def vit(layers: int = 12, d: int = 768, patch: int = 16, image: int = 224, classes: int = 1000) -> list[Shape]:
    """Vision transformer with a class token, learned positions and a linear head."""
    tokens = 1 + (image // patch) ** 2
    embedding: list[Shape] = [(1, 1, d), (1, tokens, d), (d, 3, patch, patch), (d,)]
    return embedding + transformer_block(d) * layers + layer_norm(d) + linear(d, classes)


def gpt2_blocks(count: int, d: int = 768) -> Model:
    """The transformer blocks of GPT-2 small without its embeddings: as many as a quick run has time for."""
    shapes = tuple(transformer_block(d) * count)
    model = Model(f"gpt2-{count}-block{'s' * (count > 1)}", "", shapes)
    of = "one of the" if count == 1 else f"{count} of the"
    return replace(model, title=f"{of} 12 blocks of GPT-2 small ({model.elements / 1e6:.0f}M parameters)")


BLOCK_COUNTS = (12, 8, 4, 2, 1)
GPT2_SMALL = Model("gpt2-small", "GPT-2 small (124M parameters)", tuple(gpt2()))
VIT_B16 = Model("vit-b16", "ViT-B/16 (87M parameters)", tuple(vit()))
MANY_SMALL = Model("1000x1000", "1,000 tensors of 1,000 elements", ((1000,),) * 1000)
# So little to compute that a step is what it costs the host.
ONE_ELEMENT = Model("300x1", "300 tensors of one element", ((1,),) * 300)
# Enough parameters to fill a GPU and enough tensors to show the cost of launching one kernel for each.
TENSORS_300 = Model("300-tensors", "300 tensors, 123M parameters", ((640, 640),) * 300)
