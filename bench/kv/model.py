# SPDX-License-Identifier: Apache-2.0
"""A whole language model that reads a prompt and writes on, with a compressed cache and without: what a user feels.

The model has the shape of SmolLM2-135M, and random weights: times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..registry import Case, Gate, Pass, Provider, Step, Tier, missing, own_reason
from .caches import (
    FIRST_TOKEN,
    NEXT_TOKEN,
    QUANTIZE,
    SALIENCY,
    STEP,
    CacheShape,
    ModelShape,
    packed_bytes,
)
from .gates import GATE_SHAPE, compare
from .inputs import Call

SMALL = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, inner=96, vocabulary=200)
SMOLLM2 = ModelShape(layers=30, hidden=576, heads=9, kv_heads=3, inner=1536, vocabulary=49152)


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and the model's shape and dtype."""

    shape: ModelShape
    ids: Tensor
    dtype: torch.dtype


def make_prompt(model: ModelShape, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> Prompt:
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.length)
    return Prompt(model, torch.randint(model.vocabulary, size, generator=generator, device=device), dtype)


prompts = lru_cache(maxsize=1)(make_prompt)


@lru_cache(maxsize=2)
def language_model(shape: ModelShape, attention: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    import singlepass.kv  # noqa: F401  registers the attention "singlepass"

    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype).eval()


@dataclass(frozen=True)
class Kind:
    """A cache by what makes it from a model's config, and the attention that it needs."""

    attention: str
    make: Callable[[Any], Any]


def compressed(backend: str) -> Kind:
    from singlepass.kv import ZipCache

    return Kind("singlepass", lambda config: ZipCache(config, backend=backend))


def uncompressed() -> Kind:
    from transformers import DynamicCache

    return Kind("sdpa", lambda config: DynamicCache(config=config))


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Of the last token."""
    found: Tensor = model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits
    return found


def first_token(kind: Kind, prompt: Prompt) -> Call:
    """A prompt is read into an empty cache."""
    model = language_model(prompt.shape, kind.attention, prompt.dtype, prompt.ids.device)
    return lambda: logits(model, prompt.ids, kind.make(model.config))


def next_token(kind: Kind, prompt: Prompt) -> Call:
    """One token, after a prompt; then it is removed from the cache again."""
    model = language_model(prompt.shape, kind.attention, prompt.dtype, prompt.ids.device)
    cache = kind.make(model.config)
    logits(model, prompt.ids, cache)

    def call() -> Tensor:
        found = logits(model, prompt.ids[:, :1], cache)
        cache.crop(-1)
        return found

    return call


MODEL_OPS = {FIRST_TOKEN: first_token, NEXT_TOKEN: next_token}


def model_gate(
    op: str, kind: Callable[[], Any], truth: Callable[[], Any], dtype: torch.dtype, device: torch.device
) -> Gate:
    """A step of a small model, with the truth in float64 where tokens are not quantised."""
    prompt = make_prompt(SMALL, GATE_SHAPE, dtype, device)
    exact = replace(prompt, dtype=torch.float64) if truth is uncompressed else prompt
    return compare(MODEL_OPS[op](kind(), prompt)(), MODEL_OPS[op](truth(), exact)(), dtype)


def model_case(op: str, length: int, dtype: torch.dtype) -> Case:
    """A prompt attends to itself uncompressed, so that all caches must give the same first token."""
    shape = CacheShape(1, length)
    packed = SMOLLM2.layers * packed_bytes(shape, SMOLLM2.width, SMOLLM2.kv_heads, window=0)
    weights = SMOLLM2.parameters * dtype.itemsize

    def provider_of(name: str, column: str, tier: Tier, kind: Callable[[], Any], truth: Callable[[], Any]) -> Provider:
        def why_not(device: torch.device) -> str | None:
            own = None if kind is uncompressed else own_reason((STEP,), name, dtype, device)
            return missing("transformers", device) or own

        def prepare(data: Any) -> Step:
            return Step(MODEL_OPS[op](kind(), data))

        gate = partial(model_gate, op, kind, truth, dtype)
        return Provider(name, column, tier, prepare=prepare, gate=gate, why_not=why_not, footprint=3 * weights)

    truth = uncompressed if op == FIRST_TOKEN else partial(compressed, "eager")
    return Case(
        family="kv",
        op=op,
        size=shape.name,
        dtype=dtype,
        ops=(STEP,) if op == NEXT_TOKEN else (QUANTIZE, SALIENCY),
        passes=(Pass((weights + packed,), ()),),
        flops=2 * SMOLLM2.parameters * (length if op == FIRST_TOKEN else 1),
        elements=length,
        input_bytes=weights + packed,
        tensors=1,
        inputs=partial(prompts, SMOLLM2, shape, dtype),
        providers=(
            provider_of("native", "native", Tier.FUSED, partial(compressed, "native"), truth),
            provider_of("sdpa", "yardstick", Tier.FUSED, uncompressed, uncompressed),
        ),
    )
