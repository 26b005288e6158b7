# SPDX-License-Identifier: Apache-2.0
"""Room for ``max_tokens`` tokens: how much it is, that it stays where it is, and what happens beyond it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from singlepass.kv import Codec, MatryoshkaLayer, ZipCacheLayer

from ..tolerances import assert_same_bits
from .layers import assert_same, drawn, part, stream
from .test_matryoshka_layer import made

Layer = ZipCacheLayer | MatryoshkaLayer
LAYERS: dict[str, Callable[..., Layer]] = {
    "4 and 2 bits": lambda **options: ZipCacheLayer(window=24, **options),
    "4 bits, rotated": lambda **options: ZipCacheLayer(
        1.0, codec=Codec.per_token_head(rotate=True), window=24, **options
    ),
    "KIVI": lambda **options: ZipCacheLayer(0.4, codec=Codec.kivi(16), window=24, **options),
    "blocks of any size": lambda **options: ZipCacheLayer(codec=Codec.zipcache(block=None), window=24, **options),
    "low rank": lambda **options: made(**options),
    "ragged ranks, 4 and 2 bits": lambda **options: made(ranks=([16, 32], 32), bits=(4, 2), window=24, **options),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def addresses(layer: Layer) -> set[int]:
    """Of the memory that planned steps use."""
    inner = [group.inner for group in layer._groups] if isinstance(layer, MatryoshkaLayer) else [layer]
    tensors: list[torch.Tensor] = []
    for its in inner:
        tensors += its._fixed_tensors()
    return {t.data_ptr() for t in tensors if t.numel() > 0}


@each_layer
def test_it_holds_the_same_in_memory_that_stays(name: str) -> None:
    q, k, v = drawn(200)
    room, grows = LAYERS[name](max_tokens=200), LAYERS[name]()
    for layer in (room, grows):
        layer.prefill(*part((q, k, v), 0, 50))
    held, bytes_ = addresses(room), room.nbytes
    for tokens in (part((q, k, v), 50, 120), part((q, k, v), 120, 200)):
        for a, b in zip(stream(room, *tokens), stream(grows, *tokens), strict=True):
            assert_same_bits(a, b)
    assert addresses(room) == held
    assert room.nbytes - bytes_ < 2 * 48 * 4 * 32 * 4, "nothing but the queries of probes was added"
    assert_same(room.state_dict(), grows.state_dict())
    for a, b in zip(room.dequantize(), grows.dequantize(), strict=True):
        assert_same_bits(a, b)


@each_layer
def test_a_prompt_and_windows_fill_it_without_growth(name: str, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = drawn(300, batch=1)
    for prompt in (0, 1, 100, 299, 300):
        layer = LAYERS[name](max_tokens=300)
        if prompt:
            layer.prefill(*part((q, k, v), 0, prompt))
        if prompt < 300:
            stream(layer, *part((q, k, v), prompt, 300))
    assert caplog.records == []


@each_layer
def test_beyond_it_room_grows_and_one_line_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = drawn(150, batch=1)
    layer, grows = LAYERS[name](max_tokens=40), LAYERS[name]()
    with caplog.at_level(logging.WARNING, logger="singlepass"):
        for its in (layer, grows):
            its.prefill(*part((q, k, v), 0, 110))
            its.prefill(*part((q, k, v), 110, 150))
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) <= 2, "one for each group of heads"
    assert "more comes than max_tokens=40 reserved room for" in lines[0]
    assert_same(layer.state_dict(), grows.state_dict())


@each_layer
def test_it_is_kept_for_other_tokens(name: str) -> None:
    q, k, v = drawn(60)
    layer, fresh = LAYERS[name](max_tokens=100), LAYERS[name](max_tokens=100)
    layer.prefill(*part((q, k, v), 0, 60))
    held, bytes_ = addresses(layer), layer.nbytes
    layer.reset()
    assert (layer.length, layer.batch) == (0, None)
    assert 0 < layer.nbytes <= bytes_
    outs = [its.prefill(*part((q, k, v), 20, 60)) for its in (layer, fresh)]
    assert_same_bits(*outs)
    assert addresses(layer) == held
    assert_same(layer.state_dict(), fresh.state_dict())
    layer.reset()
    layer.prefill(*(x[:1] for x in part((q, k, v), 0, 60)))  # of another batch
    assert addresses(layer) != held


@each_layer
def test_sequences_change_places_within_it(name: str) -> None:
    q, k, v = drawn(80)
    layer, grows = LAYERS[name](max_tokens=100), LAYERS[name]()
    for its in (layer, grows):
        its.prefill(*part((q, k, v), 0, 60))
        stream(its, *part((q, k, v), 60, 70))
    held = addresses(layer)
    for its in (layer, grows):
        its.select_sequences([1, 0])
    assert addresses(layer) == held
    for a, b in zip(*(stream(its, *part((q, k, v), 70, 80)) for its in (layer, grows)), strict=True):
        assert_same_bits(a, b)
    for its in (layer, grows):
        its.repeat_sequences(2)
    assert_same(layer.state_dict(), grows.state_dict())


@each_layer
def test_what_is_saved_does_not_depend_on_it(name: str) -> None:
    q, k, v = drawn(90)
    layers = [LAYERS[name](max_tokens=100), LAYERS[name](), LAYERS[name](max_tokens=70), LAYERS[name]()]
    for its in layers[:2]:
        its.prefill(*part((q, k, v), 0, 60))
        stream(its, *part((q, k, v), 60, 70))
    layers[2].load_state_dict(layers[1].state_dict())
    layers[3].load_state_dict(layers[0].state_dict())
    for outs in zip(*(stream(its, *part((q, k, v), 70, 90)) for its in layers), strict=True):
        for out in outs[1:]:
            assert_same_bits(out, outs[0])


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "many"])
def test_bad_numbers_are_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match="ZipCacheLayer: expected max_tokens as a whole number, 1 or more, or None; got"
    ):
        ZipCacheLayer(max_tokens=value)
    with pytest.raises(ValueError, match="expected max_tokens as a whole number, 1 or more, or None; got"):
        made(max_tokens=value)


def test_not_with_a_sliding_window() -> None:
    for make in (ZipCacheLayer, made):
        with pytest.raises(ValueError, match="expected max_tokens or a sliding window; got both"):
            make(max_tokens=100, sliding_window=50)


@pytest.mark.parametrize("prompt", range(6))
def test_room_grows_evenly(prompt: int) -> None:
    """Blocks have a start each, and one end: where they grow, so do the starts, whatever number there was before."""
    q, k, v = drawn(140, batch=1)
    layer, grows = (ZipCacheLayer(window=8, max_tokens=room) for room in (16 + 8 * prompt, None))
    for its in (layer, grows):
        its.prefill(*part((q, k, v), 0, 4))
    new = part((q, k, v), 4, 140)
    for a, b in zip(stream(layer, *new), stream(grows, *new), strict=True):
        assert_same_bits(a, b)
    assert_same(layer.state_dict(), grows.state_dict())
