# SPDX-License-Identifier: Apache-2.0
"""Models whose sliding layers are compressed too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from transformers import DynamicCache, MistralConfig, Phi3Config

from singlepass.kv import Codec, MatryoshkaCache, ZipCache, fit_matryoshka, search_ranks

from .layers import assert_same
from .models import BYTES, MODELS, build, error, greedy, prompt, run, steps

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"config_class": MistralConfig, "sliding_window": 20},
    "phi3": {"config_class": Phi3Config, "sliding_window": 20},
    **{name: MODELS[name] for name in ("qwen2-sliding", "gemma2")},
    "gpt-oss": MODELS["gpt-oss"] | {"num_experts_per_tok": 2},  # of two: which one it is would hang on roundings
}


def cache_of(model: Any, **options: Any) -> ZipCache:
    return ZipCache(model.config, compress_sliding=True, **({"window": 8, **BYTES} | options))


def low_rank(model: Any, **options: Any) -> MatryoshkaCache:
    """Of full rank, so that it changes nothing but the last bits."""
    bases = fit_matryoshka(model, [prompt(2, 60)], progress=False)
    return MatryoshkaCache(model.config, bases, 1.0, compress_sliding=True, **({"window": 8} | options))


CACHES: dict[str, Callable[..., Any]] = {
    "zipcache": cache_of,
    "low rank": low_rank,
    "low rank in bytes": partial(low_rank, bits=8),
}
each_cache = pytest.mark.parametrize("kind", CACHES)


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
@pytest.mark.parametrize("cuts", [[50, *steps(51, 90)], [10, 35, *steps(36, 60), 85], [70, 73]], ids=len)
@pytest.mark.parametrize("name", SLIDING)
@each_cache
def test_bytes_change_next_to_nothing(kind: str, name: str, cuts: list[int], implementation: str) -> None:
    """Prompts, chunks, tokens one by one and a few at a time, longer than the sliding window."""
    if implementation == "sdpa" and name in ("gemma2", "gpt-oss"):
        implementation = "eager"  # sdpa knows neither soft-capping nor sinks
    model, ids = build(**SLIDING[name]), prompt(2, 90)
    model.set_attn_implementation("eager")
    want = run(model, ids, cuts, DynamicCache(config=model.config))
    model.set_attn_implementation(implementation)
    cache = CACHES[kind](model)
    assert error(run(model, ids, cuts, cache), want) < (1e-4 if kind == "low rank" else 0.02)
    assert cache.get_seq_length() == 90
    assert all(hasattr(layer, "inner") for layer in cache.layers)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@each_cache
def test_padded_batches_that_end_and_go_on(kind: str, name: str) -> None:
    model, ids = build(**SLIDING[name]), prompt(3, 80)
    places = torch.arange(80)
    mask = places >= torch.tensor([[0], [7], [30]])
    mask &= ~((places >= 50) & (places < 60)) | torch.tensor([[True], [False], [True]])  # the second ends, and goes on
    outs = []
    for implementation, cache in (("eager", DynamicCache(config=model.config)), ("singlepass", CACHES[kind](model))):
        model.set_attn_implementation(implementation)
        outs.append(run(model, ids, [40, *steps(41, 60), 70, *steps(71, 80)], cache, mask.long()))
    assert error(outs[1][mask], outs[0][mask]) < 0.03


def test_one_mask_for_layers_of_both_kinds() -> None:
    """Where it shows more than the sliding window, it is followed."""
    model, ids = build(**SLIDING["qwen2-sliding"]), prompt(2, 40)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    masks = {"full_attention": mask, "sliding_attention": mask}
    outs = []
    for implementation, cache in (("eager", None), ("singlepass", cache_of(model))):
        model.set_attn_implementation(implementation)
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        given = dict.fromkeys(masks, added) if cache is None else masks
        with torch.no_grad():
            outs.append(model(ids, attention_mask=given, cache=cache).logits)
    assert error(*outs) < 1e-4


@each_cache
def test_memory_does_not_grow(kind: str) -> None:
    model = build(**SLIDING["mistral"])
    model.set_attn_implementation("singlepass")
    cache = CACHES[kind](model, codec=Codec(block=8, regular_block=8))
    sizes = []
    for _ in range(4):
        run(model, prompt(1, 100), [60, *steps(61, 100)], cache)
        sizes.append(cache.nbytes)
    assert cache.get_seq_length() == 400
    assert max(sizes) < 1.5 * min(sizes)


@each_cache
def test_generate_beams_crop_and_save(kind: str) -> None:
    model, ids = build(**SLIDING["mistral"]), prompt(2, 50)
    model.set_attn_implementation("singlepass")
    make = partial(CACHES[kind], model)
    want = greedy(model, ids, 30, cache=make())
    cache = make()
    assert torch.equal(greedy(model, ids, 30, cache=cache), want)
    other = make()
    other.load_state_dict(cache.state_dict())
    assert_same(other.state_dict(), cache.state_dict())
    assert torch.equal(greedy(model, want, 10, cache=other), greedy(model, want, 10, cache=cache))
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 87
    assert greedy(model, ids[:1], 10, num_beams=3, cache=make()).shape == (1, 60)
    repeated = ids[:1, :10].repeat(1, 5)
    options = {"prompt_lookup_num_tokens": 5}
    assert greedy(model, repeated, 20, cache=make(), **options).shape[1] > 50


def test_ended_tokens_beyond_the_window() -> None:
    """A later turn hides what followed the end of a sequence, when that has long left the window of another."""
    model = build(MistralConfig, sliding_window=20, head_dim=32)
    model.set_attn_implementation("singlepass")
    ids = prompt(2, 90)
    mask = torch.ones_like(ids)
    cache = ZipCache(model.config, compress_sliding=True, window=4, **BYTES)
    run(model, ids[:, :40], steps(30, 40), cache)
    mask[0, 36:40] = 0
    want = run(model, ids, [], None, mask)
    for begin, end in ((40, 70), (70, 71), (71, 90)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        with torch.no_grad():
            options = {"attention_mask": mask[:, :end], "position_ids": positions, "cache": cache}
            got = model(ids[:, begin:end], **options).logits
        assert error(got, want[:, begin:end]) < 0.02


def test_ranks_that_were_searched_for_sliding_layers_too() -> None:
    model = build(**(SLIDING["qwen2-sliding"] | {"head_dim": 32}))
    texts = [prompt(1, 60)]
    bases = fit_matryoshka(model, texts, progress=False)
    options = {"per_round": 8, "progress": False}
    full = search_ranks(model, bases, texts, 0.75, **options)
    with pytest.raises(ValueError, match=r"ranks of layer .* Pass compress_sliding=True to search_ranks, too"):
        MatryoshkaCache(model.config, full, 0.75, compress_sliding=True)
    both = search_ranks(model, full, texts, 0.5, compress_sliding=True, **options)
    assert set(both.ranks_of(0.5)) == set(bases.keys) > set(full.ranks_of(0.75))
    layers = MatryoshkaCache(model.config, both, 0.5, compress_sliding=True).layers
    kept, every = (sum(getattr(x.inner, name) for x in layers) for name in ("kept_channels", "all_channels"))
    assert every / 2 - 16 < kept <= every / 2
    mistral = build(**SLIDING["mistral"])
    with pytest.raises(ValueError, match=r"a layer of full_attention; got only .* Pass compress_sliding=True"):
        search_ranks(mistral, fit_matryoshka(mistral, texts, progress=False), texts, 0.5)
