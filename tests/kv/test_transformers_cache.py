# SPDX-License-Identifier: Apache-2.0
"""What transformers does with caches: beams, changes of the batch, removing tokens, saving."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24")

from transformers import MistralConfig

from singlepass.kv import ZipCache

from .layers import assert_same
from .models import BYTES, MODELS, VOCABULARY, build, check_saved_and_loaded, decided, error, greedy, prompt, run, steps
from .test_bytes import behind

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # what transformers will remove


def test_beam_search() -> None:
    model, ids = decided()
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    want = greedy(model, ids, 10, **options)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    got = greedy(model, ids, 10, cache=cache, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=0.01, rtol=0)
    assert cache.batch_size == 6


def restored(cache: ZipCache, rows: list[int], tokens: int | None = None) -> list[Tensor]:
    """Keys and values that all layers hold of some sequences, of the first tokens."""
    return [x[rows, :, :tokens] for layer in cache.layers for x in layer.inner.dequantize()]


def test_changes_of_the_batch() -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    ids = prompt(2, 50)
    cache = ZipCache(model.config, window=8)
    assert cache.batch_size == -1
    cache.batch_select_indices(torch.tensor([0]))  # of an empty cache
    run(model, ids[:, :40], [32], cache)
    before, again = copy.deepcopy(cache), copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    assert_same(restored(cache, [0, 1, 2, 3]), restored(before, [0, 0, 1, 1]))
    rows = [1, 0, 0, 1]
    cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
    assert_same(restored(cache, [0, 1, 2, 3]), restored(before, rows))
    want = run(model, ids[:, 40:], steps(1, 5), before)
    got = run(model, ids[rows, 40:], steps(1, 5), cache)
    # Products of another batch are summed in another order, and codes may flip: far less than what codes change.
    codes = error(want, run(model, ids, [], None)[:, 40:])
    assert error(got, want[rows]) < 0.05 * codes
    assert_same(restored(cache, [0, 1, 2, 3], 40), restored(before, rows, 40))
    cache.batch_select_indices(torch.tensor([False, True, False, False]))
    assert cache.batch_size == 1
    again.batch_select_indices(torch.tensor([0]))
    run(model, ids[:1, 40:], steps(1, 5), again)
    assert_same(restored(cache, [0], 40), restored(again, [0], 40))
    for found, wanted in zip(restored(cache, [0]), restored(again, [0]), strict=True):
        off = (found - wanted).abs()
        step = float(wanted.max() - wanted.min()) / 3.0  # of two bits
        assert float(off.max()) <= 1.1 * step, "codes flip by one"
        assert float((off > 0.01 * step).float().mean()) < 0.02, "and seldom"
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
    assert torch.equal(run(model, ids[:, 50:], [], cache), want)
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match=r"^ZipCache\.crop: expected .* to 0.*; got -11\. Compressed"):
        cache.crop(-11)
    with pytest.raises(ValueError, match=r"minus the number of tokens to remove; got 5\. Pass -3 to remove"):
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


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
@pytest.mark.parametrize("length", [10, 50])
def test_speculative_decoding(length: int, implementation: str) -> None:
    """Of prompts that the window holds, and longer ones. In a second turn transformers gives the model the whole
    conversation again, whatever the cache."""
    (model, ids), assistant = decided(), build(seed=5)
    ids = ids[:1, 50 - length :]
    want = greedy(model, ids)
    model.set_attn_implementation(implementation)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 4}):
        cache = ZipCache(model.config, window=16, **BYTES)
        assert torch.equal(greedy(model, ids, cache=cache, **options), want)
        assert cache.get_seq_length() == length + 15
        assert cache.layers[0].inner._held.compressed.segments, "some tokens were compressed"
        if implementation == "singlepass":
            with pytest.raises(
                ValueError, match=rf"expected new tokens from position {length + 15} on.*got position 0\."
            ):
                greedy(model, want, 3, cache=cache, **options)
        cache.reset()
        assert torch.equal(greedy(model, want, 3, cache=cache, **options), greedy(model, want, 3))


def test_crops_that_some_layers_refuse_change_none() -> None:
    """Sliding layers beyond their window have dropped what would be needed again."""
    model = build(**MODELS["qwen2-sliding"])
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8)
    run(model, prompt(1, 30), [28], cache)
    before = cache.state_dict()
    with pytest.raises(ValueError, match=r"^ZipCache\.crop: expected layers that record their past; got Dynamic"):
        cache.crop(-1)
    assert_same(cache.state_dict(), before)
    cache.activate_past_recording()
    run(model, prompt(1, 2), [], cache)
    cache.crop(-2)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 30


def test_its_representation_tells_tokens_bits_and_bytes() -> None:
    model = build(**MODELS["qwen2-sliding"])
    cache = ZipCache(model.config, salient_ratio=0.5, regular_bits=4)
    kinds = [layer.is_sliding for layer in cache.layers]
    head = f"ZipCache(salient_ratio=0.5, bits=(4, 4), layers={len(kinds)}, compressed={kinds.count(False)}, "
    assert repr(cache) == f"{head}tokens=0, nbytes={cache.nbytes})"
    run(model, prompt(2, 20), [], cache)
    assert repr(cache) == f"{head}tokens=20, nbytes={cache.nbytes})"


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
@pytest.mark.parametrize("name", ["llama-16", "qwen2-sliding"])
def test_bytes_told_are_bytes_held(name: str, implementation: str) -> None:
    model = build(**MODELS[name])
    model.set_attn_implementation(implementation)
    ids = prompt(2, 60)
    cache = ZipCache(model.config, window=16)
    assert cache.nbytes == behind(cache)
    uncompressed = 10 * 2 * 2 * 2 * 16 * 4 * len(cache)
    run(model, ids[:, :10], [], cache)
    assert cache.nbytes == behind(cache)
    if name == "llama-16" and implementation == "singlepass":
        assert cache.nbytes < uncompressed
    cache.reset()
    run(model, ids[:, :10], steps(1, 10), cache)
    queries = 10 * 2 * 4 * (16 + 1) * 4 * len(cache)
    assert cache.nbytes == behind(cache) <= 1.25 * uncompressed + queries + 8 * len(cache) + 2 * uncompressed / 10
    run(model, ids[:, 10:40], [20], cache)
    assert cache.nbytes == behind(cache)
    cache.activate_past_recording()
    run(model, ids[:, 40:45], [], cache)
    cache.crop(-3)
    assert cache.nbytes == behind(cache)
    cache.batch_repeat_interleave(2)
    assert cache.nbytes == behind(cache)
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    assert cache.nbytes == behind(cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes == behind(cache)
    cache.reset()
    assert all(layer.inner.nbytes == 0 for layer in cache.layers if hasattr(layer, "inner"))
    assert cache.nbytes == behind(cache)


def test_sliding_layers_stay_uncompressed() -> None:
    model = build(**MODELS["qwen2-sliding"])
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config)
    assert cache.is_sliding == [False, True, True]
    greedy(model, prompt(1, 40), cache=cache)
    assert cache.layers[1].keys.shape[2] == 19
    assert cache.layers[1].keys.dtype == torch.float32
    memory = [t.untyped_storage() for layer in cache.layers[1:] for t in (layer.keys, layer.values)]
    sliding = sum(storage.nbytes() for storage in memory)
    assert sliding > 2 * 2 * 2 * 19 * 16 * 4, "they are parts of larger tensors"
    rest = sum(layer._sliding_window_tensor.nbytes for layer in cache.layers[1:])
    assert cache.nbytes == cache.layers[0].inner.nbytes + sliding + rest
    with pytest.raises(ValueError, match=r"a layer of full_attention; got only .* Pass compress_sliding=True"):
        ZipCache(build(MistralConfig, sliding_window=20).config)


@pytest.mark.parametrize("name", ["llama-16", "qwen2-sliding"])
def test_saved_and_loaded(name: str) -> None:
    model = build(**MODELS[name])
    model.set_attn_implementation("singlepass")
    cache, other = (ZipCache(model.config, window=8) for _ in range(2))
    check_saved_and_loaded(model, cache, other)
    with pytest.raises(
        ValueError, match=r"the options \{'window': 9\}; got \{'window': 8\}\. Load it into a cache made"
    ):
        ZipCache(model.config, window=9).load_state_dict(cache.state_dict())


def test_pickling_says_what_to_save() -> None:
    """A pickled config would not tell which attention the model runs."""
    model = build()
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config)
    run(model, prompt(1, 5), [], cache)
    for save in (pickle.dumps, lambda its: torch.save(its, io.BytesIO())):
        with pytest.raises(TypeError, match=r"ZipCache: expected state_dict\(\) of a cache to pickle or save"):
            save(cache)
    assert copy.deepcopy(cache).get_seq_length() == 5


def test_sequences_by_a_list() -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config)
    run(model, prompt(3, 5), [], cache)
    cache.batch_select_indices([0, 2])
    assert cache.batch_size == 2
    with pytest.raises(ValueError, match="expected numbers of sequences from 0 to 1"):
        cache.reorder_cache(torch.tensor([0, 2]))
