# SPDX-License-Identifier: Apache-2.0
"""What transformers does with caches: beams, changes of the batch, removing tokens, saving."""

from __future__ import annotations

import copy
import io

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers import MistralConfig

from singlepass.kv import ZipCache, ZipCacheLayer
from singlepass.kv.functional import seen_by

from .models import BYTES, MODELS, VOCABULARY, build, decided, error, greedy, prompt, run, steps


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
    assert layer._probes.scores is not None
    mean = layer._probes.scores[0, 0] / seen_by(torch.tensor(layer._probes.places), 8, None, "probe_nnz")[0]
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
