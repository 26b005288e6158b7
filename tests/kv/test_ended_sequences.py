# SPDX-License-Identifier: Apache-2.0
"""Sequences of a batch that end before others: what follows them costs nothing, and they can go on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from singlepass.kv import ZipCacheLayer
from singlepass.kv._selection import PADDING

from ..tolerances import assert_same_bits
from .inputs import each_cpu_backend
from .layers import assert_same, check_attend, drawn, kinds, part, stream
from .test_layer import CODECS, each_codec

ENDS = torch.tensor([[1000], [39], [52], [30]])  # of four sequences, whose prompts have 30 tokens


def shown(begin: int, end: int) -> Tensor:
    return torch.arange(begin, end) < ENDS


def prompted(tensors: tuple[Tensor, ...], codec: str = "zipcache", **options: object) -> ZipCacheLayer:
    layer = ZipCacheLayer(**({"window": 16, "codec": CODECS[codec]()} | options))
    layer.prefill(*part(tensors, 0, 30))
    return layer


def step(layer: ZipCacheLayer, tensors: tuple[Tensor, ...], i: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = part(tensors, i, i + 1)
    layer.append(k, v, mask)
    return check_attend(layer, q)


@each_cpu_backend
@each_codec
def test_they_wait_for_the_others(codec: str, backend: str) -> None:
    """Attention at every step, of those that go on and of those that have ended, and what is held after it."""
    tensors = drawn(90, batch=4)
    layer = prompted(tensors, codec, backend=backend)
    for i in range(30, 90):
        step(layer, tensors, i, shown(i, i + 1))
        assert torch.equal(layer.token_mask(), shown(0, i + 1))
    k, _ = layer.dequantize()
    assert bool((k.abs().amax((1, 3)) > 0).eq(shown(0, 90)).all()), "padding comes back as zeros"
    for segment in layer._held.compressed.segments.values():
        assert len(segment.keys.starts) < 20, "not a block for each step"


def test_they_cost_nothing() -> None:
    """A batch in which all but one have ended takes no more than one in which none has."""
    tensors = drawn(500, batch=4)
    ended, others = prompted(tensors, window=32), prompted(tensors, window=32)
    for i in range(30, 500):
        q, k, v = part(tensors, i, i + 1)
        ended.append(k, v, torch.tensor([[True], [False], [False], [False]]))
        others.append(k, v)
        ended.attend(q)
        others.attend(q)
    assert ended.nbytes <= 1.01 * others.nbytes
    held = sum(segment.keys.counts.sum((1, 2)) for segment in ended._held.compressed.segments.values())
    assert held.tolist() == [2 * (500 - ended.window_length), 60, 60, 60]


def test_they_go_on() -> None:
    """After padding in the window, which is compressed first; the tokens are those of a batch that never stopped."""
    tensors = drawn(90, batch=4)
    layer = prompted(tensors)
    masks = shown(0, 60)
    for i in range(30, 60):
        step(layer, tensors, i, masks[:, i : i + 1])
    assert layer.window_length > 0
    step(layer, tensors, 60)
    assert layer.window_length == 1
    for i in range(61, 90):
        step(layer, tensors, i)
    assert torch.equal(layer.token_mask(), torch.cat((masks, torch.ones(4, 30, dtype=torch.bool)), 1))
    newest = layer.dequantize()[0][:, :, 90 - layer.window_length :]
    assert torch.equal(newest, tensors[1][:, :, 90 - layer.window_length :])


def test_prompts_and_several_queries_after_they_ended() -> None:
    tensors = drawn(90, batch=4)
    layer = prompted(tensors)
    for i in range(30, 40):
        step(layer, tensors, i, shown(i, i + 1))
    q, k, v = part(tensors, 40, 45)
    with pytest.raises(ValueError, match=r"one query at a time after padding; got 5\. Pass the tokens to prefill"):
        layer.attend(q)
    layer.prefill(q, k, v)
    assert layer.window_length == 0
    assert torch.equal(layer.token_mask()[:, 30:], torch.cat((shown(30, 40), torch.ones(4, 5, dtype=torch.bool)), 1))
    layer.append(k, v)
    check_attend(layer, q)


@each_codec
@pytest.mark.parametrize("ends", [(70, 69, 66, 60), (70, 50, 33, 70), (70, 17, 31, 2), (70, 0, 70, 30)], ids=str)
def test_tokens_turn_out_to_be_padding(ends: tuple[int, ...], codec: str) -> None:
    """The newest of a sequence, in the window, in blocks of tokens added one by one, and in the prompt."""
    tensors = drawn(100, batch=4)
    layer = prompted(tensors, codec)
    stream(layer, *part(tensors, 30, 70))
    before = layer.dequantize()
    mask = torch.arange(70) < torch.tensor(ends)[:, None]
    layer.hide(mask)
    assert torch.equal(layer.token_mask(), mask)
    for was, now in zip(before, layer.dequantize(), strict=True):
        assert torch.equal(now, was * mask[:, None, :, None]), "others are what they were"
    compressed = 70 - layer.window_length
    for i, end in enumerate(ends):
        assert bool((kinds(layer)[i, :, min(end, compressed) :] == PADDING).all())
    other = ZipCacheLayer(window=16, codec=CODECS[codec]())
    other.load_state_dict(layer.state_dict())
    for i in range(70, 100):
        got, want = (step(x, tensors, i) for x in (layer, other))
        assert torch.equal(got, want)
    assert torch.equal(layer.token_mask()[:, :70], mask)


def test_saved_chosen_and_removed() -> None:
    """With padding in the window: the same bits go on; sequences keep what is theirs."""
    tensors = drawn(90, batch=4)
    layer = prompted(tensors)
    for i in range(30, 40):
        step(layer, tensors, i, shown(i, i + 1))
    saved, other = layer.state_dict(), ZipCacheLayer(window=16, codec=CODECS["zipcache"]())
    assert saved["window_counts"].tolist() == [10, 9, 10, 0]
    other.load_state_dict(saved)
    assert_same(other.state_dict(), saved)
    index = [3, 0, 0]
    other.select_sequences(index)
    assert torch.equal(other.token_mask(), layer.token_mask()[index])
    chosen = tuple(t[index] for t in tensors)
    step(other, chosen, 40, shown(40, 41)[index])
    for x in (layer, other):
        x.drop_newest(2)
    assert torch.equal(layer.token_mask(), shown(0, 38))
    assert layer._held.window.counts.tolist() == [8, 8, 8, 0]
    step(layer, tensors, 38, shown(38, 39))
    for wrong in (saved["window_counts"] + 3, -saved["window_counts"], saved["window_counts"][:2], [10, 9, 10, 0]):
        with pytest.raises(ValueError, match="window_counts"):
            other.load_state_dict(saved | {"window_counts": wrong})


def test_wrong_masks() -> None:
    tensors = drawn(31, batch=4)
    layer = prompted(tensors)
    before = layer.state_dict()
    _, k, v = part(tensors, 30, 31)
    for wrong in (torch.ones(4, 1), torch.ones(4, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^ZipCacheLayer: expected a bool mask of shape \(4, 1\)"):
            layer.append(k, v, wrong)
    shows = torch.ones(4, 30, dtype=torch.bool)
    for wrong in (shows.float(), shows[:, 1:], shows[:1]):
        with pytest.raises(ValueError, match=r"^ZipCacheLayer: expected a bool mask of shape \(4, 30\)"):
            layer.hide(wrong)
    with pytest.raises(ValueError, match=r"^ZipCacheLayer: expected a mask that hides the newest tokens; got others"):
        layer.hide(torch.arange(30).expand(4, -1) != 3)
    with pytest.raises(ValueError, match="an empty cache"):
        ZipCacheLayer().hide(shows)
    assert_same(layer.state_dict(), before)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("ends", [1, 4, 7, 8])
def test_no_token_is_lost_where_probes_saw_less_of_one_sequence(ends: int, ratio: float) -> None:
    """A sequence that ends has other probes than one that goes on, and so another share of salient tokens."""
    for seed in range(10):
        q, k, v = drawn(20, seed=seed)
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[0, ends:] = False
        layer = ZipCacheLayer(ratio, window=8, seed=seed)
        layer.append(*part((k, v), 0, 7), mask[:, :7])
        for i in range(7, 20):
            layer.append(*part((k, v), i, i + 1), mask[:, i : i + 1])
            check_attend(layer, q[:, :, i : i + 1])
        assert_same_bits(layer.token_mask(), mask)
        keys, _ = layer.dequantize()
        assert_same_bits(keys.abs().sum(3).ne(0), mask[:, None].expand(keys.shape[:3]))
        again = ZipCacheLayer(ratio, window=8, seed=seed)
        again.load_state_dict(layer.state_dict())
