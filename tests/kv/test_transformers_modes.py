# SPDX-License-Identifier: Apache-2.0
"""Caches under inference mode and autocast, with dtypes that differ or change, and in models that change keys."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from transformers import DiffLlamaConfig, DynamicCache, JetMoeConfig

from singlepass.kv import ZipCache, ZipCacheLayer

from .layers import drawn, part, stream
from .models import BYTES, build, error, greedy, prompt, run, steps

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

each_implementation = pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])


@each_implementation
@pytest.mark.parametrize("prompt_length", [1, 20])
def test_inference_mode_and_then_none(implementation: str, prompt_length: int) -> None:
    """Whatever a cache made in inference mode can be written to outside of it, and the other way round."""
    model, ids = build(), prompt(2, 60)
    model.set_attn_implementation(implementation)
    mixed, plain = ZipCache(model.config, window=8), ZipCache(model.config, window=8)
    want = run(model, ids, [prompt_length, *steps(prompt_length + 1, 60)], plain)
    got = []
    for i, end in enumerate([prompt_length, *steps(prompt_length + 1, 60), 60]):
        with torch.inference_mode(i % 3 == 0), torch.no_grad():
            got.append(model(ids[:, mixed.get_seq_length() : end], cache=mixed).logits.clone())
            if i % 5 == 0:
                mixed.reorder_cache(torch.tensor([0, 1]))
    assert torch.equal(torch.cat(got, 1), want)
    for change in (lambda: mixed.crop(-1), lambda: mixed.batch_repeat_interleave(2)):
        with torch.inference_mode():
            change()
        change()
    with torch.inference_mode():
        saved = mixed.state_dict()
        mixed.load_state_dict(saved)
    model(ids[:, :1].repeat(4, 1), cache=mixed)


def test_inference_mode_without_transformers() -> None:
    q, k, v = drawn(90)
    layer, other = ZipCacheLayer(window=16), ZipCacheLayer(window=16)
    with torch.inference_mode():
        layer.prefill(*part((q, k, v), 0, 30))
        stream(layer, *part((q, k, v), 30, 50))
    other.prefill(*part((q, k, v), 0, 30))
    want = stream(other, *part((q, k, v), 30, 90))[20:]
    for a, b in zip(stream(layer, *part((q, k, v), 50, 90)), want, strict=True):
        assert torch.equal(a, b)
    with torch.inference_mode():
        layer.hide(torch.arange(90).expand(2, -1) < 60)
    assert not layer.dequantize()[0].is_inference()


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, implementation: str) -> None:
    """Keys are float32 then, and values are not: stored in one dtype, and the result is that of autocast."""
    model, ids = build(), prompt(2, 40)
    outs = []
    for name, cache in ((implementation, ZipCache(model.config, window=8, **BYTES)), ("sdpa", DynamicCache())):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=dtype):
            outs.append(run(model, ids, [20, *steps(21, 40)], cache))
    assert outs[0].dtype == outs[1].dtype == dtype
    assert error(*outs) < 0.04  # of eight bits, and of sixteen in another order


@each_implementation
@pytest.mark.parametrize("first", [True, False])
def test_autocast_for_some_of_the_tokens(first: bool, implementation: str) -> None:
    """The cache stays in the dtype of its first tokens; a result has the dtype that it has elsewhere."""
    model, ids = build(), prompt(2, 30)
    model.set_attn_implementation("sdpa")
    want = run(model, ids, [], None)[:, 20:]
    model.set_attn_implementation(implementation)
    cache = ZipCache(model.config, window=8, **BYTES)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        run(model, ids[:, :20], [], cache)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
        got = run(model, ids[:, 20:], steps(1, 10), cache)
    assert cache.layers[0].inner.dtype == (torch.bfloat16 if first else torch.float32)
    assert got.dtype == (torch.float32 if first else torch.bfloat16)
    assert error(got, want) < 0.04


@pytest.mark.parametrize("config_class", [JetMoeConfig, DiffLlamaConfig])
def test_models_that_change_keys(config_class: type, caplog: pytest.LogCaptureFixture) -> None:
    """They decode over restored tokens, as with another attention, and are told so once."""
    options = {"num_local_experts": 4, "kv_channels": 16} if config_class is JetMoeConfig else {}
    model, ids = build(config_class, **options), prompt(2, 30)
    model.set_attn_implementation("sdpa")
    want = run(model, ids, [20, *steps(21, 30)], DynamicCache())
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    with caplog.at_level(logging.WARNING, logger="singlepass"):
        got = run(model, ids, [20, *steps(21, 30)], cache)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "singlepass"]
    assert said.startswith(f"ZipCache: models of type '{model.config.model_type}' do not attend to the keys")
    assert error(got, want) < 0.1
    assert greedy(model, ids, 4, cache=ZipCache(model.config)).shape == (2, 34)
