# SPDX-License-Identifier: Apache-2.0
"""A layer used in ways of its own: without its attention, with NaN in padding, copied, asked at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass.kv import Codec, MatryoshkaLayer, ZipCacheLayer
from singlepass.kv._selection import SALIENT

from ..tolerances import assert_same_bits
from .layers import assert_same, drawn, kinds, part
from .matryoshka import bases, made


@pytest.mark.parametrize("codec", [Codec.zipcache(), Codec.per_token_head(rotate=True)], ids=["zipcache", "rotated"])
@pytest.mark.parametrize("ratio", [0.6, 1.0])
def test_storing_a_prompt_is_prefill_without_its_attention(ratio: float, codec: Codec) -> None:
    q, k, v = drawn(90)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :9] = False
    layers = [ZipCacheLayer(ratio, codec=codec, window=16) for _ in range(2)]
    for begin, end in ((0, 50), (50, 90)):
        layers[0].prefill(*part((q, k, v), begin, end), mask[:, begin:end])
        layers[1].store(*part((q, k, v), begin, end), mask[:, begin:end])
        assert_same(*(layer.state_dict() for layer in layers))
    with pytest.raises(ValueError, match="90 queries, one for each token; got 1"):
        layers[1].store(q[:, :, :1], k, v)
    assert layers[1].length == 90
    layers[1].store(None, k, v)
    assert bool((kinds(layers[1])[:, :, 90:] == SALIENT).all())


def test_nan_in_padding_reaches_no_token() -> None:
    q, k, v = drawn(40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :9] = mask[1, 30:] = False
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
    layers = [ZipCacheLayer(0.6, window=16) for _ in range(2)]
    for layer, its in zip(layers, ((k, v), dirty), strict=True):
        outs = [layer.prefill(q[:, :, :25], *part(its, 0, 25), mask[:, :25])]
        for i in range(25, 35):
            layer.append(*part(its, i, i + 1), mask[:, i : i + 1])
            outs.append(layer.attend(q[:, :, i : i + 1]))
        outs.append(layer.prefill(q[:, :, 35:], *part(its, 35, 40), mask[:, 35:]))
        outs += layer.dequantize()
        layer.outs = outs
    for clean, other in zip(layers[0].outs, layers[1].outs, strict=True):
        assert_same_bits(other, clean)


def test_a_query_right_after_its_prompt() -> None:
    q, k, v = drawn(40)
    layer, other = ZipCacheLayer(0.6, window=8), ZipCacheLayer(0.6, window=8)
    layer.prefill(q, k, v)
    layer.attend(q[:, :, 39:])
    other.load_state_dict(layer.state_dict())
    assert layer._held.window.probes.queries == []


def test_copies_outlive_inference_mode() -> None:
    q, k, v = drawn(40)
    layer = ZipCacheLayer(0.6, window=8)
    with torch.inference_mode():
        layer.prefill(*part((q, k, v), 0, 30))
        layer.append(*part((k, v), 30, 32))
        other = copy.deepcopy(layer)
        other.append(*part((k, v), 32, 33))
    other.append(*part((k, v), 33, 34))
    assert (layer.length, other.length) == (32, 34)


@pytest.mark.parametrize("ratio", [0.6, 1.0])
def test_masks_and_sinks_may_be_strided(ratio: float) -> None:
    q, k, v = drawn(40)
    mask, sinks = torch.arange(40).ge(3).expand(2, -1).clone(), torch.tensor([0.5, -1.0, 2.0, 0.0])
    outs = []
    for its, one in ((mask, sinks), (mask.T.contiguous().T, torch.stack((sinks, sinks), 1)[:, 0])):
        layer = ZipCacheLayer(ratio, window=8)
        prompt = layer.prefill(q, k, v, its, sinks=one)
        layer.append(*part((k, v), 0, 1))
        outs.append((prompt, layer.attend(q[:, :, :1], sinks=one), *layer.dequantize()))
    for a, b in zip(*outs, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", ["zipcache", "low rank"])
def test_the_default_device_does_not_matter(name: str) -> None:
    """``torch.set_default_device`` may name another one than that of the tokens: what the host draws stays there."""
    tensors = drawn(60)
    mask, its = torch.arange(40).ge(3).expand(2, -1), bases(2, 32)
    low_rank: dict[str, Any] = {"key_ranks": [16, 32], "value_ranks": 32, "bits": (4, 2), "window": 8}

    def used() -> list[Tensor]:
        layer = ZipCacheLayer(window=8) if name == "zipcache" else MatryoshkaLayer(its, its, **low_rank)
        outs = [layer.prefill(*part(tensors, 0, 40), mask)]
        for i in range(40, 60):
            layer.append(*part(tensors[1:], i, i + 1))
            outs.append(layer.attend(tensors[0][:, :, i : i + 1]))
        layer.select_sequences([1, 0])
        return [*outs, *layer.dequantize()]

    want = used()
    with torch.device("meta"):
        got = used()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_a_mask_on_another_device_is_refused() -> None:
    q, k, v = drawn(5)
    mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
    for layer in (ZipCacheLayer(), made()):
        with pytest.raises(ValueError, match="expected a mask on cpu, as the tokens; got meta"):
            layer.prefill(q, k, v, mask)
        assert layer.length == 0
