# SPDX-License-Identifier: Apache-2.0
"""Models with a low-rank cache: at full rank they say what they say without, and in every loop of transformers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24")

from transformers import DynamicCache, MistralConfig, PreTrainedModel

from singlepass.kv import MatryoshkaBases, MatryoshkaCache, fit_matryoshka
from singlepass.kv._hf_layer import TRANSFORM

from .models import (
    MODELS,
    ROUNDINGS,
    build,
    check_saved_and_loaded,
    decided,
    error,
    greedy,
    padded_conversation,
    prompt,
    run,
    steps,
)

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # what transformers will remove


def fitted(model: PreTrainedModel) -> MatryoshkaBases:
    return fit_matryoshka(model, [prompt(2, 100, seed=7)], progress=False)


def truncating(model: PreTrainedModel, bases: MatryoshkaBases, ids: Tensor, budget: float, layers: set[int]) -> Tensor:
    """Logits with keys and values that lack what a cache of those layers does not keep, computed without a cache."""
    ranks = bases.ranks_of(budget)

    def cut(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for x, matrices, its in zip((k, v), (bases.keys[layer], bases.values[layer]), ranks[layer], strict=True):
            u = matrices * (torch.arange(x.shape[3]) < its[:, None])[:, None]
            out.append(x @ u @ u.mT)
        return out[0], out[1]

    modules = [m for m in model.modules() if getattr(m, "layer_idx", None) in layers]
    model.set_attn_implementation("singlepass")
    for module in modules:
        setattr(module, TRANSFORM, partial(cut, module.layer_idx))
    with torch.no_grad():
        out = model(ids, use_cache=False).logits
    for module in modules:
        delattr(module, TRANSFORM)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_the_uncompressed_model(name: str) -> None:
    model = build(**MODELS[name])
    ids, cuts = prompt(2, 100), steps(60, 80)
    bases = fitted(model)
    model.set_attn_implementation("eager")
    want = run(model, ids, cuts, DynamicCache(config=model.config))
    model.set_attn_implementation("singlepass")
    for prefill in ("full", "truncated"):
        cache = MatryoshkaCache(model.config, bases, budget=1.0, prefill=prefill)
        assert error(run(model, ids, cuts, cache), want) < ROUNDINGS
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize(("name", "head_dim"), [("llama-64", 64), ("gemma2", 64), ("gpt-oss", 64), ("qwen3", 32)])
def test_attention_is_over_what_the_bases_keep(name: str, head_dim: int) -> None:
    """Token by token, so that nothing is attended to but what the cache holds; softcap and sinks included."""
    model = build(**(MODELS[name] | {"head_dim": head_dim}))
    bases, ids = fitted(model), prompt(2, 40)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    layers = {i for i, kind in enumerate(kinds) if kind == "full_attention"}
    want = truncating(model, bases, ids, 0.5, layers)
    cache = MatryoshkaCache(model.config, bases, budget=0.5, prefill="truncated")
    assert error(run(model, ids, steps(1, 40), cache), want) < ROUNDINGS
    assert error(want, run(model, ids, [], None)) > 10 * ROUNDINGS, "something is lost"


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
def test_generate_says_the_same(implementation: str, bits: int | None) -> None:
    model, ids = decided()
    want = greedy(model, ids)
    bases = fitted(model)
    model.set_attn_implementation(implementation)
    beams = [{"num_beams": 3}] if bits is None else []  # noise of eight bits decides close calls between beams
    for options in ({}, *beams, {"prompt_lookup_num_tokens": 4}):
        its = ids[:1] if "prompt_lookup_num_tokens" in options else ids
        cache = MatryoshkaCache(model.config, bases, budget=1.0, bits=bits, window=16)
        got = greedy(model, its, cache=cache, **options)
        assert torch.equal(got, greedy(model, its, **options))
    assert len(want[0, 50:].unique()) > 3  # no model that says one word only


def test_bytes_are_the_sum_of_the_ranks() -> None:
    model = build(head_dim=64)
    bases = fitted(model)
    model.set_attn_implementation("singlepass")
    ids = prompt(2, 100)
    full = MatryoshkaCache(model.config, bases, budget=1.0)
    run(model, ids, [], full)
    assert full.nbytes == 3 * 2 * 2 * 100 * (64 + 64) * 4
    half = MatryoshkaCache(model.config, bases, budget=0.5)
    run(model, ids, [], half)
    assert half.nbytes == full.nbytes / 2
    ranks = {0: (16, 64), 1: ([16, 32], [16, 64]), 2: (64, 16)}
    ragged = MatryoshkaCache(model.config, bases, ranks=ranks)
    run(model, ids, [], ragged)
    assert ragged.nbytes == 2 * 100 * 4 * (2 * 80 + 128 + 2 * 80)
    its = f"bits=None, layers=3, compressed=3, tokens=100, nbytes={ragged.nbytes}"
    assert repr(ragged) == f"MatryoshkaCache(kept=0.583, {its})"
    coded = MatryoshkaCache(model.config, bases, budget=0.5, bits=(4, 2))
    run(model, ids, [], coded)
    assert coded.nbytes < half.nbytes / 6  # of 32 bits


@pytest.mark.parametrize("bits", [None, 8])
def test_padding_and_conversations(bits: int | None) -> None:
    """Long and short turns on the same cache, with padding anywhere, as without a cache."""
    model = build(head_dim=32)
    bases = fitted(model)
    ids, mask, cuts = padded_conversation()
    want = run(model, ids, [], None, mask)
    for implementation in ("singlepass", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = MatryoshkaCache(model.config, bases, budget=1.0, bits=bits, window=16)
        got = run(model, ids, cuts, cache, mask)
        assert error(got[mask.bool()], want[mask.bool()]) < (ROUNDINGS if bits is None else 0.02)


def test_changes_of_the_batch_crop_and_copies() -> None:
    model = build(head_dim=32)
    bases = fitted(model)
    model.set_attn_implementation("singlepass")
    ids = prompt(2, 60)
    cache = MatryoshkaCache(model.config, bases, ranks={i: ([16, 32], 16) for i in range(3)})
    run(model, ids[:, :50], [40], cache)
    want = run(model, ids[:, 50:], [], copy.deepcopy(cache))
    run(model, ids[:, :30], [], cache)
    cache.crop(-30)  # any number: nothing is quantised
    assert error(run(model, ids[:, 50:], [], copy.deepcopy(cache)), want) == 0.0
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    rows = [1, 0, 0, 1]
    assert error(run(model, ids[rows, 50:], [], copy.deepcopy(cache)), want[rows]) < ROUNDINGS
    cache.batch_select_indices(torch.tensor([False, True, False, False]))
    assert error(run(model, ids[:1, 50:], [], cache), want[:1]) < ROUNDINGS
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0


@pytest.mark.parametrize("bits", [None, (4, 2)])
@pytest.mark.parametrize("name", ["llama-64", "qwen2-sliding"])
def test_saved_and_loaded(name: str, bits: Any) -> None:
    model = build(**MODELS[name])
    bases = fitted(model)
    model.set_attn_implementation("singlepass")
    cache, other = (MatryoshkaCache(model.config, bases, budget=1.0, bits=bits, window=8) for _ in range(2))
    check_saved_and_loaded(model, cache, other)


def test_narrow_dtypes() -> None:
    model = build(head_dim=64)
    bases, ids = fitted(model), prompt(2, 60)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = model.to(dtype)
        narrow.set_attn_implementation("singlepass")
        want = run(narrow, ids, [], None)
        got = run(narrow, ids, steps(40, 60), MatryoshkaCache(narrow.config, bases, budget=1.0))
        # Each of three layers rounds keys, values, queries and results once more than it does without.
        assert error(got, want) < 3 * 4 * torch.finfo(dtype).eps


def test_wrong_arguments() -> None:
    model = build(head_dim=32)
    config, bases = model.config, fitted(model)
    other = fitted(build(head_dim=64))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bases": other}, "MatryoshkaCache: expected bases of this model"),
        ({"bases": None}, "expected MatryoshkaBases; got NoneType"),
        ({"budget": 0.0}, "a budget over 0, up to 1; got 0.0"),
        ({"budget": 1.1}, "a budget over 0, up to 1; got 1.1"),
        ({"budget": "half"}, "a budget over 0, up to 1"),
        ({"budget": 0.3}, "a budget of 0.5 or more for heads of 32; got 0.3"),
        ({"ranks": {0: (16, 16)}}, "bases and ranks of layer 1"),
        ({"ranks": dict.fromkeys(range(3), (20, 16))}, "2 ranks of keys among 16, 32"),
        ({"ranks": {0: 16, 1: 16, 2: 16}}, "a pair of ranks for layer 0; got 16"),
        ({"ranks": 16}, "bases and ranks of layer 0"),
        ({"ranks": dict.fromkeys(range(3), ("a", 16))}, "2 ranks of keys among 16, 32"),
        ({"bits": 5}, "bits None, 8, 4, 2 or a pair"),
        ({"prefill": "some"}, "'full' or 'truncated'"),
        ({"backend": "cuda"}, "backend among"),
        ({"config": None}, "a model's config; got NoneType"),
        (
            {"config": build(MistralConfig, head_dim=32, sliding_window=20).config},
            "a layer of full_attention; got only",
        ),
    ]
    for options, contract in cases:
        with pytest.raises(ValueError, match=contract):
            MatryoshkaCache(**({"config": config, "bases": bases} | options))
    model.set_attn_implementation("singlepass")
    cache = MatryoshkaCache(config, bases)
    run(model, prompt(2, 20), [], cache)
    with pytest.raises(ValueError, match="expected k of shape"):
        run(model, prompt(1, 20), [], cache)
