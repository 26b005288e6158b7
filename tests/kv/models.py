# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers, and what they say."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
BYTES = {"salient_bits": 8, "regular_bits": 8}  # close to no compression
# Of float32 through a model, thousands of 2^-24: on any processor, and far below what a wrong token or code changes.
ROUNDINGS = 1e-4


def build(config_class: type = LlamaConfig, head_dim: int = 16, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A tiny model with random weights; four heads of queries and two of keys."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 512}
    # Weights large enough for attention to matter, and an output with clear winners.
    more = {"initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**(sizes | heads | more | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name or "experts" in name:  # from_config leaves these as memory happens to be
            torch.nn.init.normal_(parameter, 4.0 if "sinks" in name else 0.0, 0.15)
    return model


def prompt(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def decided() -> tuple[PreTrainedModel, Tensor]:
    """A model and prompts that it continues without close calls, which noise of eight bits might decide otherwise: the
    likeliest token leads by 5 % of the logits' standard deviation at least."""
    return build(head_dim=64, seed=8), prompt(2, 50, seed=1)


def greedy(model: PreTrainedModel, ids: Tensor, tokens: int = 16, **options: Any) -> Tensor:
    defaults = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **(defaults | options))


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, cuts: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of ids, given to the model in pieces that end at cuts and at the end."""
    out = []
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        options = {"attention_mask": seen, "position_ids": positions, "cache": cache}
        out.append(model(ids[:, begin:end], **options).logits)
    return torch.cat(out, 1)


def padded_conversation() -> tuple[Tensor, Tensor, list[int]]:
    """Tokens of two sequences, their mask with padding before, within and after, and where long and short turns end."""
    ids = prompt(2, 120)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 65:68] = mask[0, 100:103] = 0
    return ids, mask, [30, 31, 32, 37, 60, 61, 95, 98, 104, 105]


def check_saved_and_loaded(model: PreTrainedModel, cache: Any, other: Any) -> None:
    """An empty cache goes on as the other one does that it was loaded from, and refuses what is not one's state."""
    ids = prompt(2, 60)
    other.load_state_dict(cache.state_dict())
    assert other.get_seq_length() == 0
    run(model, ids[:, :45], steps(40, 45), cache)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    want = run(model, ids[:, 45:], steps(1, 15), cache)
    assert torch.equal(run(model, ids[:, 45:], steps(1, 15), other), want)
    for wrong in ({}, {"layers": []}, {"layers": [{}] * 3}, None):
        with pytest.raises(ValueError, match="load_state_dict: expected"):
            other.load_state_dict(wrong)
    assert other.get_seq_length() == 60


def steps(begin: int, end: int) -> list[int]:
    return list(range(begin, end))


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to what is wanted."""
    return float((got - want).norm() / want.norm())


MODELS = {
    "llama-16": {"config_class": LlamaConfig},
    "llama-64": {"config_class": LlamaConfig, "head_dim": 64},
    "llama-80-mha": {"config_class": LlamaConfig, "head_dim": 80, "num_key_value_heads": 4},
    "mistral": {"config_class": MistralConfig, "sliding_window": None},
    "qwen2": {"config_class": Qwen2Config},
    "qwen2-sliding": {
        "config_class": Qwen2Config,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen3": {"config_class": Qwen3Config, "head_dim": 32},
    "gemma2": {
        "config_class": Gemma2Config,
        "sliding_window": 20,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
    },
    "gpt-oss": {"config_class": GptOssConfig, "sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1},
}
