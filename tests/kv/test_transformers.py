# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with a compressed cache say what they say without."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers import (
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from singlepass.kv import Codec, ZipCache, ZipCacheLayer
from singlepass.kv.functional import seen_by

VOCABULARY = 61
BYTES = {"salient_bits": 8, "regular_bits": 8}  # close to no compression


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
        options = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
        out.append(model(ids[:, begin:end], **options).logits)
    return torch.cat(out, 1)


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


@pytest.mark.parametrize("name", MODELS)
def test_bytes_change_next_to_nothing(name: str) -> None:
    model = build(**MODELS[name])
    ids = prompt(2, 100)
    model.set_attn_implementation("eager")
    cuts = steps(60, 80)
    want = run(model, ids, cuts, DynamicCache(config=model.config))
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    assert error(run(model, ids, cuts, cache), want) < 0.02
    assert cache.get_seq_length() == 100
    assert any(layer.inner.length == 100 for layer in cache.layers if hasattr(layer, "inner"))


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa", "eager"])
def test_generate_says_the_same(implementation: str) -> None:
    model, ids = decided()
    want = greedy(model, ids)
    model.set_attn_implementation(implementation)
    cache = ZipCache(model.config, window=16, **BYTES)
    got = greedy(model, ids, past_key_values=cache)
    assert torch.equal(got, want)
    assert len(want[0, 50:].unique()) > 3  # no model that says one word only
    assert cache.nbytes < 0.5 * 2 * 3 * 2 * 2 * 65 * 64 * 4


def test_three_lines_turn_it_on() -> None:
    model, ids = build(head_dim=64), prompt(1, 90)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, salient_ratio=0.6)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 95)
    layer = cache.layers[0].inner
    assert (layer.length, layer.window_length) == (94, 4)
    assert layer._compressed.segments[1].slots == 54  # 60 % of the prompt: saliency was asked for
    assert layer._compressed.segments[0].slots == 36


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
@pytest.mark.parametrize("codec", [Codec.zipcache(), Codec.per_token_head(rotate=True)], ids=["zipcache", "rotated"])
def test_attention_is_over_what_the_cache_holds(implementation: str, codec: Codec) -> None:
    """The model's step with 4 and 2 bits, and the same step over the restored keys and values."""
    model = build(head_dim=32)
    model.set_attn_implementation(implementation)
    ids = prompt(2, 71)
    cache = ZipCache(model.config, window=12, codec=codec)
    run(model, ids[:, :70], steps(40, 70), cache)
    plain = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        plain.update(*layer.inner.dequantize(), i)
    exact = DynamicCache(config=model.config)
    run(model, ids[:, :70], [], exact)
    with torch.no_grad():
        got = model(ids[:, 70:], past_key_values=cache).logits
        model.set_attn_implementation("sdpa")
        want = model(ids[:, 70:], past_key_values=plain).logits
        uncompressed = model(ids[:, 70:], past_key_values=exact).logits
    assert error(got, want) < 1e-5
    assert error(got, uncompressed) > 1e-3  # it was compressed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    model, ids = build(head_dim=32), prompt(2, 60)
    want = run(model, ids, [], None)
    model.to(dtype).set_attn_implementation("singlepass")
    with torch.inference_mode():
        cache = ZipCache(model.config, window=8, **BYTES)
        got = run(model, ids, steps(40, 60), cache)
    assert got.dtype == cache.layers[0].inner._window[0].dtype == dtype
    assert error(got.float(), want) < 0.05


def test_prompts_in_chunks() -> None:
    model, ids = decided()
    want = greedy(model, ids)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    assert torch.equal(greedy(model, ids, past_key_values=cache, prefill_chunk_size=20), want)


def test_models_with_a_text_model_inside() -> None:
    """The attention and the layers are those of the text model's config."""
    text = build(head_dim=64, num_hidden_layers=2).config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision}
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = prompt(1, 60)
    want = run(model, ids, [], None)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    assert len(cache) == 2
    assert error(run(model, ids, steps(40, 60), cache), want) < 0.02
    assert cache.layers[0].inner._compressed.segments[1].slots > 24  # queries were seen


def test_padding_does_not_matter() -> None:
    """A batch padded on the left gives what its sequences give alone, and stores no padding."""
    model = build(head_dim=32)
    model.set_attn_implementation("singlepass")
    lengths, total = (40, 25, 33), 40
    rows = [prompt(1, length + 20, seed=length) for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (total + 20 - row.shape[1], 0)) for row in rows])
    mask = (ids != 0).long()
    cuts = steps(total, total + 20)
    batched = ZipCache(model.config, window=8, **BYTES)
    together = run(model, ids, cuts, batched, mask)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        cache = ZipCache(model.config, window=8, **BYTES)
        alone = run(model, row, steps(length, length + 20), cache)
        assert error(together[i, -row.shape[1] :], alone[0]) < 0.01
        assert int(batched.layers[0].inner._token_mask()[i].sum()) == length + 20
    tokens = greedy(
        model, ids[:, :total], attention_mask=mask[:, :total], past_key_values=ZipCache(model.config, **BYTES)
    )
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = greedy(model, row[:, :length], past_key_values=ZipCache(model.config, **BYTES))
        assert torch.equal(tokens[i, total:], alone[0, length:])


def test_conversations() -> None:
    """Long and short turns on the same cache, and turns with padding in the middle."""
    model = build(head_dim=32)
    ids = prompt(2, 120)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 65:68] = mask[0, 100:103] = 0
    cuts = [30, 31, 32, 37, 60, 61, 95, 98, 104, 105]
    want = run(model, ids, [], None, mask)
    for implementation in ("singlepass", "sdpa"):
        model.set_attn_implementation(implementation)
        got = run(model, ids, cuts, ZipCache(model.config, window=16, **BYTES), mask)
        assert error(got[mask.bool()], want[mask.bool()]) < 0.02
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=16)
    first = greedy(model, ids[:, :30], 10, past_key_values=cache)
    second = torch.cat((first, prompt(2, 5, seed=3)), 1)
    assert greedy(model, second, 10, past_key_values=cache).shape == (2, 55)
    assert cache.get_seq_length() == 54


def test_beam_search() -> None:
    model, ids = decided()
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    want = greedy(model, ids, 10, **options)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    got = greedy(model, ids, 10, past_key_values=cache, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=0.01, rtol=0)
    assert cache.batch_size == 6


def test_changes_of_the_batch() -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    ids = prompt(2, 50)
    cache = ZipCache(model.config, window=8)
    assert cache.batch_size == -1
    cache.batch_select_indices(torch.tensor([0]))  # of an empty cache
    run(model, ids[:, :40], [32], cache)
    again = copy.deepcopy(cache)
    want = run(model, ids[:, 40:], steps(1, 5), copy.deepcopy(cache))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    got = run(model, ids[[1, 0, 0, 1], 40:], steps(1, 5), cache)
    torch.testing.assert_close(got, want[[1, 0, 0, 1]])
    cache.batch_select_indices(torch.tensor([False, True, False, False]))
    assert cache.batch_size == 1
    again.batch_select_indices(torch.tensor([0]))
    run(model, ids[:1, 40:], steps(1, 5), again)
    for got_layer, want_layer in zip(cache.layers, again.layers, strict=True):
        torch.testing.assert_close(got_layer.inner.dequantize(), want_layer.inner.dequantize())
    # A copy asks the model's own config which attention runs.
    model.set_attn_implementation("sdpa")
    assert again.layers[0].update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))[0].shape[2] == 51


def test_crop() -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    ids = prompt(1, 60)
    cache = ZipCache(model.config, window=8)
    run(model, ids[:, :50], [44], cache)
    want = run(model, ids[:, 50:], [], copy.deepcopy(cache))
    run(model, ids[:, 30:32], [], cache)
    cache.crop(-2)
    cache.crop(0)
    assert cache.get_seq_length() == 50
    torch.testing.assert_close(run(model, ids[:, 50:], [], cache), want)
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match=r"^ZipCache\.crop: expected .* to 0.*; got -11\. Compressed"):
        cache.crop(-11)
    with pytest.raises(ValueError, match="got 5"):
        cache.crop(5)
    assert cache.get_seq_length() == before
    run(model, ids[:, :3], [], cache)
    cache.layers[2].inner.drop_newest(3)
    with pytest.raises(ValueError, match=r"expected 0 to 0, .* got -1\."):
        cache.crop(-1)
    assert cache.get_seq_length() == before + 3  # of the first layer, which could have
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert cache.get_max_length() == -1
    assert run(model, ids, [], cache).shape == (1, 60, VOCABULARY)


def test_short_continuations_stay_removable() -> None:
    """Whatever number of tokens the window holds, all those of the last short continuation can be removed."""
    model = build()
    model.set_attn_implementation("singlepass")
    ids = prompt(1, 60)
    cache = ZipCache(model.config, window=8, **BYTES)
    want = run(model, ids, [], None)
    run(model, ids[:, :30], [], cache)
    for begin in range(30, 54, 2):
        got = run(model, ids[:, begin : begin + 6], [], cache)
        assert error(got, want[:, begin : begin + 6]) < 0.02
        cache.crop(-4)
    assert cache.get_seq_length() == 54


def test_removed_tokens_were_probes() -> None:
    """Their queries count where their attention does, so that no mean attention is above 1."""
    layer, zeros = ZipCacheLayer(window=8, recent_probes=1.0), torch.zeros(1, 1, 3, 16)
    layer.append(zeros, zeros)
    layer.attend(zeros)
    layer.drop_newest(2)
    assert layer._scores is not None
    mean = layer._scores[0, 0] / seen_by(torch.tensor(layer._probed), 8, None, "probe_nnz")[0]
    torch.testing.assert_close(mean[0], torch.tensor((1 + 1 / 2 + 1 / 3) / 3))
    assert float(mean[1:].abs().max()) == 0.0


def test_speculative_decoding() -> None:
    (model, ids), assistant = decided(), build(seed=5)
    ids = ids[:1]
    want = greedy(model, ids)
    model.set_attn_implementation("singlepass")
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 4}):
        cache = ZipCache(model.config, window=16, **BYTES)
        assert torch.equal(greedy(model, ids, past_key_values=cache, **options), want)


def test_sliding_layers_stay_uncompressed() -> None:
    model = build(**MODELS["qwen2-sliding"])
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config)
    assert cache.is_sliding == [False, True, True]
    greedy(model, prompt(1, 40), past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == 19
    assert cache.layers[1].keys.dtype == torch.float32
    sliding = sum(t.nbytes for layer in cache.layers[1:] for t in (layer.keys, layer.values))
    rest = sum(layer._sliding_window_tensor.nbytes for layer in cache.layers[1:])
    assert cache.nbytes == cache.layers[0].inner.nbytes + sliding + rest
    with pytest.raises(ValueError, match="a full-attention layer"):
        ZipCache(build(MistralConfig, sliding_window=20).config)


@pytest.mark.parametrize("name", ["llama-16", "qwen2-sliding"])
def test_saved_and_loaded(name: str) -> None:
    model = build(**MODELS[name])
    model.set_attn_implementation("singlepass")
    ids = prompt(2, 60)
    cache, other = (ZipCache(model.config, window=8) for _ in range(2))
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
    with pytest.raises(ValueError, match="the options"):
        ZipCache(model.config, window=9).load_state_dict(cache.state_dict())
    assert other.get_seq_length() == 60


@pytest.mark.parametrize("name", MODELS)
def test_without_this_cache(name: str) -> None:
    """No cache, and transformers' own: ordinary attention."""
    model = build(**MODELS[name])
    ids = prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model.set_attn_implementation("eager" if name in ("gemma2", "gpt-oss") else "sdpa")
    caches: list[Any] = [None, DynamicCache(config=model.config)]
    for cuts in ([], [30, 31, 40]):
        want = run(model, ids, cuts, copy.deepcopy(caches[bool(cuts)]), mask)
        before = model.config._attn_implementation
        model.set_attn_implementation("singlepass")
        got = run(model, ids, cuts, copy.deepcopy(caches[bool(cuts)]), mask)
        model.set_attn_implementation(before)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-16", "gemma2"])
def test_training(name: str) -> None:
    model = build(**MODELS[name]).train()
    ids = prompt(2, 30)
    gradients = []
    for implementation in ("eager", "singlepass"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert max(float(g.abs().max()) for g in gradients[0]) > 0.01
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_dropout() -> None:
    model = build(attention_dropout=0.5).train()
    model.set_attn_implementation("singlepass")
    ids = prompt(1, 30)
    first, second = (model(ids).logits.detach() for _ in range(2))
    assert error(first, second) > 0.01
    with pytest.raises(ValueError, match="no dropout with a cache"):
        model(ids, past_key_values=ZipCache(model.config))


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
def test_gradients_through_the_cache_are_refused(implementation: str) -> None:
    model = build()
    model.set_attn_implementation(implementation)
    ids = prompt(1, 30)
    cache = ZipCache(model.config)
    model(ids, past_key_values=cache)
    out = model(ids[:, :1], past_key_values=cache).logits  # without no_grad, which is no reason to fail
    assert out.requires_grad
    assert not cache.layers[0].inner._window[0].requires_grad
    with pytest.raises(ValueError, match="no gradient through compressed tokens; got a backward pass"):
        out.sum().backward()


def test_wrong_configs() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"^ZipCache: expected a model's config; got LlamaForCausalLM\. Pass model"):
        ZipCache(model)
    with pytest.raises(ValueError, match="decoder-only"):
        ZipCache(T5Config())
    with pytest.raises(ValueError, match="salient_ratio from 0 to 1"):
        ZipCache(model.config, salient_ratio=60)
    with pytest.raises(ValueError, match="no scale and softcap"):
        ZipCache(model.config, scale=1.0)
    with pytest.raises(ValueError, match="layers among"):
        ZipCache(LlamaConfig(num_hidden_layers=1, layer_types=["hybrid"]))
    odd = build(head_dim=24)
    odd.set_attn_implementation("singlepass")
    with pytest.raises(ValueError, match="k of 16, 32"):
        run(odd, prompt(1, 4), [], ZipCache(odd.config))


def test_wrong_masks() -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    ids = prompt(1, 20)
    cache = ZipCache(model.config)
    both_ways = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    for mask in (both_ways, both_ways.tril().float(), both_ways[:, :, :, :19]):
        with pytest.raises(ValueError, match=r"expected a (causal )?mask"):
            model(ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
    lowest = torch.finfo(torch.float32).min
    causal = torch.zeros(1, 1, 20, 20).masked_fill(~both_ways.tril(), lowest)
    want = run(model, ids, [], None)
    with torch.no_grad():
        got = model(ids, attention_mask=causal, past_key_values=cache).logits
    torch.testing.assert_close(got, want)
    held = copy.deepcopy(cache)
    cache.reset()
    with pytest.raises(ValueError, match="a causal mask, but for padding"):  # a mask is not taken for what it was
        model(ids, attention_mask=causal.zero_(), past_key_values=cache)
    mask = torch.ones(1, 21, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="shows all tokens in the cache; got one that hides some"):
        model(ids[:, :1], attention_mask=mask, past_key_values=held)


def test_wrong_attention() -> None:
    """Tokens that the attention function never got are missed at the next update, not lost silently."""
    model = build()
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config)
    k = torch.zeros(1, 2, 3, 16)
    cache.update(k, k, 0)
    with pytest.raises(ValueError, match=r'expected a call of the attention "singlepass".*none by layer 0'):
        cache.update(k, k, 0)
    with pytest.raises(ValueError, match="a call of the attention"):
        cache.crop(-1)
    cache.reset()
    keys, values = cache.update(k, k, 0)
    attention = model.model.layers[0].self_attn
    function = transformers.AttentionInterface._global_mapping["singlepass"]
    q = torch.zeros(1, 4, 3, 16)
    bias = torch.zeros(1, 4, 3, 3)
    with pytest.raises(ValueError, match="no position bias"):
        function(attention, q, keys, values, None, position_bias=bias)
    assert function(attention, q, keys, values, None)[0].shape == (1, 3, 4, 16)
    with pytest.raises(ValueError, match="one attention call for each update"):
        function(attention, q, keys, values, None)
    for wrong in ({"sliding_window": 4}, {"dropout": 0.1}, {"is_causal": False}):
        keys, values = cache.update(k, k, 1)
        with pytest.raises(ValueError, match=r'^attention "singlepass": expected'):
            function(attention, q, keys, values, None, **wrong)
    assert function(attention, q, k, k, None, position_bias=bias)[0].shape == (1, 3, 4, 16)


def test_transformers_is_imported_late() -> None:
    code = (
        "import sys, singlepass.kv\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None  # as if it were not installed\n"
        "try: singlepass.kv.ZipCache\n"
        "except ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("singlepass.kv.ZipCache: expected transformers 5.23 or newer; got ")
    assert "pip install" in done.stdout
