# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache refuses in transformers, and what it warns of."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

import transformers
from transformers import LlamaConfig, T5Config

from singlepass.kv import ZipCache

from .models import BYTES, build, decided, greedy, prompt, run, steps


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
    with pytest.raises(ValueError, match=r"^ZipCache\.crop: .* give ZipCache a window .* the attention \"singlepass\""):
        greedy(model, repeated, past_key_values=ZipCache(model.config, window=4, **BYTES), **options)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=10, **BYTES)
    assert torch.equal(greedy(model, repeated, past_key_values=cache, **options), want)


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"^ZipCache: expected backend among native, triton, eager; got 'cuda'"):
        ZipCache(None, backend="cuda")
