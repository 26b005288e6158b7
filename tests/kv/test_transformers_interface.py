# SPDX-License-Identifier: Apache-2.0
"""The installed transformers is the one that the cache was written for: names and flags that it relies on, and none
that it does not know. A release that changes them fails here, and says what to look at."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from singlepass import kv
from singlepass.kv import ZipCache, _hf_cache
from singlepass.kv._hf_layer import CompressedLayer

from .models import build, greedy, prompt

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

LAYER_FLAGS = {"is_compileable": False, "is_croppable": False, "supports_early_init": True, "_layer_type": None}
LAYER_METHODS = {
    "lazy_initialization": ("key_states", "value_states"),
    "update": ("key_states", "value_states", "args", "kwargs"),
    "get_mask_sizes": ("query_length",),
    "get_seq_length": (),
    "get_max_length": (),
    "reset": (),
    "reorder_cache": ("beam_idx",),
}
NOT_OURS = {"offload": (), "prefetch": ()}  # moves a DynamicLayer's keys and values; a ZipCache is never offloaded
MORE_METHODS = {  # which transformers' own layers have beside those
    "crop": ("tokens_to_remove",),
    "batch_repeat_interleave": ("repeats",),
    "batch_select_indices": ("indices",),
    "activate_past_recording": (),
}
CACHE = {
    *("activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "batch_size", "crop"),
    *("early_initialization", "get_conv_state", "get_mask_sizes", "get_max_length", "get_query_offset"),
    *("get_recurrent_state", "get_seq_length", "has_previous_state", "is_compileable", "is_croppable", "is_dummy"),
    *(
        "is_initialized",
        "is_linear",
        "is_recording_past",
        "is_sliding",
        "offload",
        "prefetch",
        "reorder_cache",
        "reset",
    ),
    *("update", "update_conv_state", "update_indexer", "update_recurrent_state"),
}


def parameters(function: object) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def test_layers_have_the_known_flags_and_methods() -> None:
    methods = LAYER_METHODS | NOT_OURS
    own = {name: value for name, value in vars(CacheLayerMixin).items() if not name.startswith(("__", "_abc"))}
    assert set(own) == set(LAYER_FLAGS) | set(methods)
    assert {name: own[name] for name in LAYER_FLAGS} == LAYER_FLAGS
    assert {name: parameters(own[name]) for name in methods} == methods
    own_by_nature = {name for name in vars(DynamicSlidingWindowLayer) if not name.startswith("__")}
    own_by_nature |= {name for name in vars(DynamicLayer) if not name.startswith("__")}
    assert own_by_nature == {*LAYER_METHODS, *MORE_METHODS, "is_sliding", "is_croppable", "_abc_impl"} - {
        "reorder_cache"
    }
    for name, arguments in MORE_METHODS.items():
        assert parameters(getattr(DynamicSlidingWindowLayer, name)) == arguments
    for name, arguments in (LAYER_METHODS | MORE_METHODS).items():
        assert name in vars(CompressedLayer)
        assert parameters(getattr(CompressedLayer, name)) == arguments


def test_completion_shows_the_public_names() -> None:
    """ZipCache too, which is imported when it is asked for."""
    assert dir(kv) == sorted(kv.__all__)
    assert "ZipCache" in dir(kv)


def test_caches_have_the_known_methods() -> None:
    assert {name for name in vars(Cache) if not name.startswith("__")} == CACHE
    assert parameters(Cache.update) == parameters(ZipCache.update)
    assert parameters(Cache.crop) == parameters(ZipCache.crop)


def test_flags_of_a_cache() -> None:
    model = build()
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8)
    assert not cache.is_compileable
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False] * 3
    assert cache.is_recording_past(0) is False
    greedy(model, prompt(1, 30), 1, cache=cache)
    assert not cache.is_croppable, "a prompt was compressed"
    greedy(model, prompt(1, 34), 2, cache=cache)
    assert cache.is_croppable, "short continuations are not"
    cache.reset()
    cache.activate_past_recording()
    assert cache.is_recording_past(2) is True
    for length in (5, 30):
        cache.reset()
        model(prompt(1, length), cache=cache)
        assert cache.is_croppable, "nor are the newest tokens of a prompt, where a cache records its past"
        cache.crop(-min(length, 8))
        assert cache.get_seq_length() == max(length - 8, 0)
        assert cache.is_croppable == (length == 5), "empty, or with compressed tokens alone"
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[:, -2:] = 0
    cache.reset()
    model(prompt(1, 30), attention_mask=mask, cache=cache)
    assert not cache.is_croppable, "padding has no place in a window"


def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("singlepass.kv.hf_again", _hf_cache.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    monkeypatch.setattr("transformers.__version__", "5.23.1")
    text = r"^singlepass\.kv: expected transformers 5\.24 or newer; got version 5\.23\.1\. Run: pip install"
    with pytest.raises(ImportError, match=text):
        spec.loader.exec_module(again)
