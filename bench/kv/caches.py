# SPDX-License-Identifier: Apache-2.0
"""KV caches of real models, and the ops that are measured over them."""

from __future__ import annotations

from dataclasses import dataclass

DECODE, QUANTIZE, DEQUANTIZE, SALIENCY = "kv_decode", "kv_quantize_", "kv_dequantize_", "kv_saliency"
# Attention of a MatryoshkaLayer that keeps half of the channels; what that has of its own.
LOW_RANK, LOW_RANK_CODES, PROJECT = "low_rank_attend", "low_rank_attend_4_2", "low_rank_append"
# A whole model, which reads a prompt and writes on.
FIRST_TOKEN, NEXT_TOKEN = "first_token", "next_token"
STEP = "kv_step_"  # what a model's next token runs
TITLES = {
    DECODE: "decode attention",
    LOW_RANK: "decode attention, half the ranks",
    LOW_RANK_CODES: "decode attention, half the ranks, 4/2 bits",
    PROJECT: "project and append a token, half the ranks",
    QUANTIZE: "quantise and pack",
    DEQUANTIZE: "restore",
    SALIENCY: "saliency of 512 probes",
    FIRST_TOKEN: "a model's first token",
    NEXT_TOKEN: "a model's next token",
}


@dataclass(frozen=True)
class CacheShape:
    """The tokens that one attention layer holds. `title` is what a plot calls it."""

    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.length}"

    @property
    def title(self) -> str:
        return f"batch {self.batch}, {self.length:,} tokens"

    @property
    def elements(self) -> int:
        """Of keys and values."""
        return 2 * self.batch * HEADS * self.length * WIDTH


@dataclass(frozen=True)
class ModelShape:
    """A language model of Llama's kind, whose embeddings are tied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Of matrices, the embedding once."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.width
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocabulary * self.hidden


# One layer of Llama-3-8B.
QUERY_HEADS, HEADS, WIDTH = 32, 8, 128
# ZipCache's default: 60% of the tokens in 4 bits, the others in 2 and smaller blocks; half of the window is in use.
SALIENT_RATIO, BLOCK, REGULAR_BLOCK, WINDOW = 0.6, 128, 32, 64
PROBES = 512
RANK = WIDTH // 2  # of low-rank caches

MODEL_LENGTHS = (1024, 7000)  # tokens of a prompt

SHAPES = {
    "cpu": tuple(CacheShape(batch, length) for batch, length in ((1, 32768), (4, 32768), (1, 4096), (4, 4096))),
    "cuda": tuple(CacheShape(batch, length) for length in (32768, 8192, 131072) for batch in (8, 1)),
}


def packed_bytes(shape: CacheShape, width: int = WIDTH, heads: int = HEADS, window: int = WINDOW) -> int:
    """Of the compressed tokens, of so many channels: codes; steps and minima of keys for each block's channels, of
    values for each token; values' channel factors for each block."""
    salient = round(SALIENT_RATIO * (shape.length - window))
    total = 0
    for bits, block, tokens in ((4, BLOCK, salient), (2, REGULAR_BLOCK, shape.length - window - salient)):
        blocks = -(-tokens // block)
        total += tokens * (2 * width * bits // 8 + 4) + blocks * 6 * width
    return shape.batch * heads * total
