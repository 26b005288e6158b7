# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache refuses in transformers, and what it warns of."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

import transformers
from transformers import DeepseekV3Config, LlamaConfig, T5Config

from singlepass.kv import ZipCache

from .layers import assert_same
from .models import BYTES, MODELS, build, decided, error, greedy, prompt, run, steps

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # what transformers will remove


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
def test_gradients_through_the_cache_are_refused(implementation: str) -> None:
    model = build()
    model.set_attn_implementation(implementation)
    ids = prompt(1, 30)
    cache = ZipCache(model.config)
    model(ids, cache=cache)
    out = model(ids[:, :1], cache=cache).logits  # without no_grad, which is no reason to fail
    assert out.requires_grad
    assert not cache.layers[0].inner._held.window.keys.requires_grad
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
    with pytest.raises(TypeError, match="scale"):  # which comes from the model
        ZipCache(model.config, scale=1.0)
    with pytest.raises(ValueError, match="layers among"):
        ZipCache(LlamaConfig(num_hidden_layers=1, layer_types=["hybrid"]))
    for head_dim in (24, 100, 528):
        with pytest.raises(ValueError, match=rf"a head_dim of 16, 32, ..., 512; got {head_dim}\. Leave it to transf"):
            ZipCache(LlamaConfig(head_dim=head_dim))
    with pytest.raises(ValueError, match=r"head_dim of 16, .*; got 100\."):
        ZipCache(LlamaConfig(hidden_size=400, num_attention_heads=4))
    with pytest.raises(ValueError, match=r"keys and values of heads; got the latents of deepseek_v3\. Leave it to"):
        ZipCache(DeepseekV3Config())


@pytest.mark.parametrize("name", ["llama-16", "gemma2"])
def test_masks_that_are_refused_change_nothing(name: str) -> None:
    """Neither the layer that sees it, nor others, nor the sliding ones before it."""
    model = build(**MODELS[name])
    model.set_attn_implementation("singlepass")
    ids, padding = prompt(2, 30), torch.ones(2, 31, dtype=torch.long)
    padding[0, 3:5] = 0
    causal = torch.ones(2, 1, 1, 31, dtype=torch.bool)
    hidden = causal & padding[:, None, None].bool()
    wrong = {
        "shows padding": (causal, "a mask that hides padding, which the cache does not hold; got one that shows some"),
        "none": (None, "a mask that hides padding, which the cache does not hold; got no mask"),
        "integers": (hidden.long(), "a bool or floating-point mask; got torch.int64"),
        "too short": (hidden[..., :30], r"a mask of shape \(2, 1, 1, 31\)"),
        "too many heads": (hidden.expand(-1, 3, -1, -1), r"a mask of shape \(2, 1, 1, 31\)"),
        "too many queries": (hidden.expand(-1, -1, 2, -1), r"a mask of shape \(2, 1, 1, 31\)"),
        "a batch of 3": (hidden[[0, 1, 1]], r"a mask of shape \(2, 1, 1, 31\)"),
        "2 dimensions": (hidden[:, 0, 0], r"a mask of shape \(2, 1, 1, 31\)"),
    }
    cache, other = ZipCache(model.config, window=8), ZipCache(model.config, window=8)
    run(model, ids, [25, 26], cache, padding[:, :30])
    other.load_state_dict(cache.state_dict())
    sliding = torch.ones(2, 1, 1, min(31, 20), dtype=torch.bool)
    for label, (mask, text) in wrong.items():
        before = cache.state_dict()
        masks = mask if name == "llama-16" else {"full_attention": mask, "sliding_attention": sliding}
        if label == "2 dimensions":
            masks = padding.clone().fill_(1) if name == "llama-16" else masks  # transformers reads those itself
            text = text if name != "llama-16" else wrong["shows padding"][1].replace("one that shows some", "no mask")
        with pytest.raises(ValueError, match=rf"^ZipCache: expected {text}"), torch.no_grad():
            model(ids[:, :1], attention_mask=masks, cache=cache)
        assert_same(cache.state_dict(), before)
    masks = hidden if name == "llama-16" else {"full_attention": hidden, "sliding_attention": sliding}
    with torch.no_grad():
        got, want = (model(ids[:, :1], attention_mask=masks, cache=x).logits for x in (cache, other))
    assert torch.equal(got, want), "and the cache goes on"


@pytest.mark.parametrize("name", ["llama-16", "gemma2"])
def test_other_prompts_than_the_rest_of_the_conversation_are_refused(name: str) -> None:
    """transformers takes an unrelated prompt for the rest of one, and fills masks up with padding: both would give
    wrong text without a word."""
    model, first = build(**MODELS[name]), prompt(2, 30)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8)
    run(model, first, [], cache)
    before, padded = cache.state_dict(), torch.ones(2, 26, dtype=torch.long)
    padded[0, :3] = 0
    remedy = r"\. Pass the whole conversation with its mask, or call reset\(\) before another\. Leave use_cache on\.$"
    positions = "expected new tokens from position 30 on, after those cached; got position {}"
    masks = "expected an attention_mask of {} tokens, cached and new; got one of {}"
    shorter, rest = prompt(2, 26, seed=2), {"input_ids": first[:, :5], "attention_mask": padded[:, 4:9]}
    for call, text in (
        (lambda: greedy(model, prompt(2, 28, seed=2), cache=cache), positions.format(2)),
        (lambda: greedy(model, shorter, cache=cache, attention_mask=padded), masks.format(52, 26)),
        (lambda: greedy(model, first, cache=cache, use_cache=False), positions.format(0)),
        (lambda: model(**rest, cache=cache), masks.format(35, 5)),
    ):
        with pytest.raises(ValueError, match=f"^ZipCache: {text}{remedy}"), torch.no_grad():
            call()
        assert_same(cache.state_dict(), before)


def test_models_with_more_layers_are_refused() -> None:
    model = build(num_hidden_layers=4)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(build(num_hidden_layers=3).config)
    with pytest.raises(
        ValueError, match=r"^ZipCache: expected a model of 3 layers, .*; got layer 3\. Pass the config of"
    ):
        run(model, prompt(1, 30), [], cache)


def test_a_mask_is_not_taken_for_what_it_was() -> None:
    model, ids = build(), prompt(1, 20)
    model.set_attn_implementation("singlepass")
    cache, lowest = ZipCache(model.config), torch.finfo(torch.float32).min
    mask = torch.full((1, 1, 20, 20), lowest).triu(1)
    want = run(model, ids, [], None)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask, cache=cache).logits, want)
        cache.reset()
        both_ways = model(ids, attention_mask=mask.zero_(), cache=cache).logits
    assert error(both_ways, want) > 0.1


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
@pytest.mark.parametrize("batch", [1, 2])
def test_another_prompt_without_reset(implementation: str, batch: int) -> None:
    """``generate`` takes the tokens of a short prompt for those that the cache holds, and has none left."""
    model = build()
    model.set_attn_implementation(implementation)
    cache = ZipCache(model.config)
    greedy(model, prompt(1, 30), 4, cache=cache)
    held, other = cache.get_seq_length(), prompt(batch, 12)
    with pytest.raises(ValueError, match=rf"^ZipCache: expected new tokens; got none after the {held} "):
        greedy(model, other, 4, cache=cache, attention_mask=torch.ones_like(other))
    assert cache.get_seq_length() == held
    cache.reset()
    greedy(model, other, 4, cache=cache, attention_mask=torch.ones_like(other))


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
    names = ["ZipCache", "MatryoshkaCache", "fit_matryoshka", "search_ranks", "fold_values"]
    code = (
        "import sys, singlepass.kv\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None  # as if it were not installed\n"
        f"for name in {names}:\n"
        "    try: getattr(singlepass.kv, name)\n"
        "    except ImportError as e: print(name, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{name} singlepass.kv: expected transformers 5.24 or newer; got ")
        assert "pip install" in line


def test_a_slow_attention_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build(), prompt(1, 20)
    for implementation in ("singlepass", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = ZipCache(model.config)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="singlepass"):
            run(model, ids, steps(10, 15), cache)
            run(model, ids[:, :1], [], copy.deepcopy(cache))
        said = [record.getMessage() for record in caplog.records if record.name == "singlepass"]
        assert len(said) == (implementation == "sdpa")
    assert said[0].startswith("ZipCache: the model runs its attention 'sdpa', ")
    assert 'Call model.set_attn_implementation("singlepass")' in said[0]


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
def test_more_candidates_than_the_window_holds(implementation: str) -> None:
    """The error says what to change, and that helps."""
    model, ids = decided()
    model.set_attn_implementation(implementation)
    repeated = ids[:1, :10].repeat(1, 4)
    want = greedy(model, repeated)
    options = {"prompt_lookup_num_tokens": 10}
    refused = ZipCache(model.config, window=4, **BYTES)
    with pytest.raises(ValueError, match=r"^ZipCache\.crop: .* give the cache a window of as many tokens as there are"):
        greedy(model, repeated, cache=refused, **options)
    assert [layer.inner.length for layer in refused.layers] == [refused.get_seq_length()] * 3, "no layer was cropped"
    cache = ZipCache(model.config, window=10, **BYTES)
    assert torch.equal(greedy(model, repeated, cache=cache, **options), want)


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"^ZipCache: expected backend among native, triton, eager; got 'cuda'"):
        ZipCache(None, backend="cuda")


@pytest.mark.parametrize("changes", [{"scale": []}, {"scale": "1"}, {"softcap": None}, {"softcap": -1.0}], ids=str)
def test_a_saved_cache_with_a_scale_that_is_none(changes: dict[str, Any]) -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config)
    run(model, prompt(1, 5), [], cache)
    saved = cache.state_dict()
    saved["layers"][1]["options"] |= changes
    with pytest.raises(ValueError, match=r"load_state_dict: expected .*(scale as a number|softcap)"):
        cache.load_state_dict(saved)
    assert cache.get_seq_length() == 5
