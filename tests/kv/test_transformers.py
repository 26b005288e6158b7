# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with a compressed cache say what they say without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

import transformers
from transformers import DynamicCache

from singlepass.kv import Codec, ZipCache

from .models import BYTES, MODELS, ROUNDINGS, build, decided, error, greedy, padded_conversation, prompt, run, steps

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # what transformers will remove


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
    cache = ZipCache(model.config, window=8, **BYTES)
    got = greedy(model, ids, cache=cache)
    assert torch.equal(got, want)
    assert len(want[0, 50:].unique()) > 3  # no model that says one word only
    assert cache.nbytes < 0.5 * 2 * 3 * 2 * 2 * 65 * 64 * 4


def test_three_lines_turn_it_on() -> None:
    model, ids = build(head_dim=64), prompt(1, 90)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, salient_ratio=0.6)
    out = model.generate(ids, cache=cache, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 95)
    layer = cache.layers[0].inner
    assert (layer.length, layer.window_length) == (94, 4)
    assert layer._held.compressed.segments[1].slots == 54  # 60 % of the prompt: saliency was asked for
    assert layer._held.compressed.segments[0].slots == 36


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
        got = model(ids[:, 70:], cache=cache).logits
        model.set_attn_implementation("sdpa")
        want = model(ids[:, 70:], cache=plain).logits
        uncompressed = model(ids[:, 70:], cache=exact).logits
    assert error(got, want) < ROUNDINGS
    assert error(got, uncompressed) > 10 * ROUNDINGS  # it was compressed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    model, ids = build(head_dim=32), prompt(2, 60)
    want = run(model, ids, [], None)
    model.to(dtype).set_attn_implementation("singlepass")
    with torch.inference_mode():
        cache = ZipCache(model.config, window=8, **BYTES)
        got = run(model, ids, steps(40, 60), cache)
    assert got.dtype == cache.layers[0].inner._held.window.keys.dtype == dtype
    assert error(got.float(), want) < 0.05


def test_prompts_in_chunks() -> None:
    model, ids = decided()
    want = greedy(model, ids)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    assert torch.equal(greedy(model, ids, cache=cache, prefill_chunk_size=20), want)


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
    assert cache.layers[0].inner._held.compressed.segments[1].slots > 24  # queries were seen


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
        assert int(batched.layers[0].inner.token_mask()[i].sum()) == length + 20
    tokens = greedy(model, ids[:, :total], attention_mask=mask[:, :total], cache=ZipCache(model.config, **BYTES))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = greedy(model, row[:, :length], cache=ZipCache(model.config, **BYTES))
        assert torch.equal(tokens[i, total:], alone[0, length:])


def test_conversations() -> None:
    """Long and short turns on the same cache, and turns with padding in the middle."""
    model = build(head_dim=32)
    ids, mask, cuts = padded_conversation()
    want = run(model, ids, [], None, mask)
    for implementation in ("singlepass", "sdpa"):
        model.set_attn_implementation(implementation)
        got = run(model, ids, cuts, ZipCache(model.config, window=16, **BYTES), mask)
        assert error(got[mask.bool()], want[mask.bool()]) < 0.02
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=16)
    first = greedy(model, ids[:, :30], 10, cache=cache)
    second = torch.cat((first, prompt(2, 5, seed=3)), 1)
    assert greedy(model, second, 10, cache=cache).shape == (2, 55)
    assert cache.get_seq_length() == 54


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
        model(ids, cache=ZipCache(model.config))
