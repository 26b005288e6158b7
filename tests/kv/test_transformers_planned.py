# SPDX-License-Identifier: Apache-2.0
"""Models of Transformers in planned steps, compiled as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24")

from singlepass.kv import MatryoshkaCache, ZipCache, fit_matryoshka

from ..tolerances import assert_same_bits
from .models import MODELS, ROUNDINGS, build, prompt, run, steps

LENGTH = 341


def low_rank(model: Any, **options: Any) -> MatryoshkaCache:
    return MatryoshkaCache(model.config, fit_matryoshka(model, [prompt(2, 40)], progress=False), **options)


CACHES: dict[str, Callable[..., Any]] = {
    "ZipCache": lambda model, **options: ZipCache(model.config, **options),
    "MatryoshkaCache": low_rank,
}


@torch.no_grad()
def planned(model: Any, ids: Tensor, cache: Any, step: Callable[..., Any]) -> Tensor:
    outs = []
    for i in range(ids.shape[1]):
        new = ids[:, i : i + 1].contiguous()
        stance = "default" if i == 0 else "fail_on_recompile"  # it is compiled at first
        with cache.planned(), torch.compiler.set_stance(stance):
            outs.append(step(new, cache=cache).logits)
    return torch.cat(outs, 1)


@pytest.mark.slow("300 steps of a model, and compiling it")
@pytest.mark.parametrize("name", CACHES)
def test_300_tokens_and_two_compressions_are_compiled_once(name: str) -> None:
    torch._dynamo.reset()
    model = build(head_dim=32, num_hidden_layers=2)
    ids = prompt(2, LENGTH)
    make = CACHES[name]
    caches = [make(model, max_tokens=LENGTH), make(model)]
    model.set_attn_implementation("singlepass")
    for cache in caches:
        run(model, ids[:, :40], [], cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    out = planned(model, ids[:, 40:], caches[0], step)
    torch._dynamo.reset()
    want = run(model, ids[:, 40:], steps(1, LENGTH - 40), caches[1])
    assert [cache.get_seq_length() for cache in caches] == [LENGTH, LENGTH]
    if name == "MatryoshkaCache":  # PyTorch's attention in other steps
        torch.testing.assert_close(out, want, rtol=ROUNDINGS, atol=ROUNDINGS)
    else:
        assert caches[0].layers[0].inner.window_length == 45
        assert_same_bits(out, want)


def test_what_can_not_be_planned() -> None:
    model = build(num_hidden_layers=2)
    model.set_attn_implementation("singlepass")
    ids, mask = prompt(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :3] = False
    padded, cache = ZipCache(model.config, max_tokens=30), ZipCache(model.config, max_tokens=30)
    run(model, ids, [], padded, mask)
    with pytest.raises(ValueError, match=r"ZipCache\.planned: expected a cache without padding"), padded.planned():
        pass
    run(model, ids, [], cache)
    new, message = ids[:, :1], r'attention "singlepass": expected no attention_mask in a planned step; got \(2, 21\)'
    with pytest.raises(ValueError, match=message), cache.planned():
        model(new, attention_mask=torch.ones(2, 21, dtype=torch.bool), cache=cache)
    message = r"ZipCache\.planned: expected no mask; got one of four dimensions"
    with pytest.raises(ValueError, match=message), cache.planned():
        model(new, attention_mask=torch.ones(2, 1, 1, 21, dtype=torch.bool), cache=cache)
    assert cache.get_seq_length() == 20
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='expected a model that runs the attention "singlepass"'), cache.planned():
        pass
    sliding = build(**MODELS["qwen2-sliding"])
    sliding.set_attn_implementation("singlepass")
    messages = {
        False: r"expected compressed layers alone; got \['Dyn",
        True: "a cache with max_tokens; got one that grows",
    }
    for compress, message in messages.items():
        cache = ZipCache(sliding.config, compress_sliding=compress, max_tokens=30)
        run(sliding, ids, [], cache)
        with pytest.raises(ValueError, match=message), cache.planned():
            pass
