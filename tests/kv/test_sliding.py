# SPDX-License-Identifier: Apache-2.0
"""Layers with sliding windows: what is seen, and that what is not seen any more is not held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from singlepass.kv import Codec, ZipCacheLayer

from ..tolerances import assert_same_bits
from .inputs import each_cpu_backend
from .layers import assert_same, check_attend, dense, drawn, part
from .test_layer import CODECS, each_codec


def streamed(layer: ZipCacheLayer, tensors: tuple[Tensor, ...], begin: int, end: int) -> None:
    for i in range(begin, end):
        q, k, v = part(tensors, i, i + 1)
        layer.append(k, v)
        check_attend(layer, q, sliding_window=layer.sliding_window)


def stored(layer: ZipCacheLayer) -> int:
    """How many tokens of the first sequence and head have a slot, or stand in the window."""
    segments = layer._held.compressed.segments.values()
    return layer.window_length + sum(int(segment.keys.counts[0, 0].sum()) for segment in segments)


@each_cpu_backend
@each_codec
@pytest.mark.parametrize("sliding", [1, 10, 33, 64])
def test_token_by_token(sliding: int, codec: str, backend: str) -> None:
    """Each query against float64, over the tokens that it sees."""
    tensors = drawn(160)
    layer = ZipCacheLayer(window=16, codec=CODECS[codec](), sliding_window=sliding, backend=backend)
    layer.prefill(*part(tensors, 0, 20))
    streamed(layer, tensors, 20, 160)
    seen = (torch.arange(160) >= 160 - sliding).expand(2, -1)
    assert torch.equal(layer.token_mask(), seen)
    for x in layer.dequantize():
        assert torch.equal(x.abs().amax((1, 3)) > 0, seen), "what was forgotten comes back as zeros"


@each_cpu_backend
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (3.0, False), (0.0, True)])
@pytest.mark.parametrize("chunks", [(100,), (10, 90), (40, 41, 60, 100), (300,), (1, 300)], ids=str)
def test_prompts(chunks: tuple[int, ...], softcap: float, with_sinks: bool, backend: str) -> None:
    """Longer and shorter than the window, alone or after other tokens, exactly while nothing was compressed before."""
    q, k, v = drawn(300)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    layer = ZipCacheLayer(1.0, salient_bits=8, window=16, softcap=softcap, sliding_window=33, backend=backend)
    begin = 0
    for end in chunks:
        got = layer.prefill(*part((q, k, v), begin, end), sinks=sinks)
        logits = q[:, :, begin:end].double() @ k[:, :, :end].repeat_interleave(2, 1).double().mT * 32**-0.5
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        rows, columns = torch.arange(begin, end)[:, None], torch.arange(end)
        logits = logits.masked_fill((columns > rows) | (columns <= rows - 33), -torch.inf)
        column = torch.full((*logits.shape[:3], 1), -torch.inf).double()
        if sinks is not None:
            column[:] = sinks[:, None, None]
        weights = torch.cat((logits, column), 3).softmax(3)[..., :end]
        want = weights @ v[:, :, :end].repeat_interleave(2, 1).double()
        torch.testing.assert_close(got.double(), want, rtol=0.0, atol=1e-5 if begin == 0 else 0.02)  # of eight bits
        begin = end
    assert stored(layer) <= 2 * 33


def test_memory_does_not_grow() -> None:
    """It stays below that of the tokens that are seen and a third more, and those of a few blocks."""
    tensors, codec = drawn(2000, batch=1), Codec(block=16, regular_block=16)
    layer = ZipCacheLayer(codec=codec, window=32, sliding_window=256)
    layer.prefill(*part(tensors, 0, 300))
    assert stored(layer) == 256
    full = ZipCacheLayer(codec=codec, window=32)
    full.prefill(*part(tensors, 0, 256 + 128))
    limit, most = 256 / 0.75 + 2 * 32 + 16 / 0.4, 0
    for i in range(300, 2000):
        q, k, v = part(tensors, i, i + 1)
        layer.append(k, v)
        layer.attend(q)
        most = max(most, stored(layer))
    assert 256 < most <= limit
    assert layer.nbytes < 1.4 * full.nbytes
    assert layer._held.compressed.kinds.shape[2] <= limit
    assert (layer.length, layer.token_mask().shape) == (2000, (1, 2000))


def test_several_queries() -> None:
    """Each sees its own newest tokens, as one by one."""
    q, k, v = drawn(100)
    layer, other = (ZipCacheLayer(window=16, sliding_window=24) for _ in range(2))
    for x in (layer, other):
        x.prefill(*part((q, k, v), 0, 60))
    layer.append(*part((k, v), 60, 68))
    got = layer.attend(q[:, :, 60:68])
    for i in range(60, 68):
        other.append(*part((k, v), i, i + 1))
        want = check_attend(other, q[:, :, i : i + 1], sliding_window=24)
        torch.testing.assert_close(got[:, :, i - 60 : i - 59], want, rtol=1e-5, atol=1e-6)


def test_padded_sequences_that_end_are_saved_and_chosen() -> None:
    tensors = drawn(200, batch=3)
    mask = torch.arange(50) >= torch.tensor([[0], [20], [45]])
    layer = ZipCacheLayer(window=16, sliding_window=40)
    layer.prefill(*part(tensors, 0, 50), mask)
    for i in range(50, 200):
        q, k, v = part(tensors, i, i + 1)
        layer.append(k, v, torch.tensor([[True], [True], [i < 70]]))
        got = layer.attend(q)
        if i % 20 == 0:
            keys, values = layer.dequantize()
            want = dense(q, keys, values, None, i + 1 - 40, layer.token_mask())
            torch.testing.assert_close(got[:2].double(), torch.from_numpy(want)[:2], rtol=1e-4, atol=1e-5)
    other = ZipCacheLayer(window=16, sliding_window=40)
    other.load_state_dict(layer.state_dict())
    assert_same(other.state_dict(), layer.state_dict())
    for x in (layer, other):
        x.select_sequences([1, 0])
        x.drop_newest(1)
        x.append(*(t[[1, 0], :, :1] for t in tensors[1:]))
    assert torch.equal(layer.attend(tensors[0][[1, 0], :, :1]), other.attend(tensors[0][[1, 0], :, :1]))
    for wrong in (-1, 1000, 1.5, None):
        with pytest.raises(ValueError, match="forgotten"):
            other.load_state_dict(layer.state_dict() | {"forgotten": wrong})
    with pytest.raises(ValueError, match="the options"):
        ZipCacheLayer(window=16).load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="a sliding window of at least 1, at most 40; got 41"):
        layer.attend(tensors[0][:2, :, :1], sliding_window=41)
    for wrong in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="sliding_window as a whole number, 1 or more, or None"):
            ZipCacheLayer(sliding_window=wrong)


@pytest.mark.parametrize("window", [4, 16, 128])
def test_hiding_nothing_changes_nothing(window: int) -> None:
    """What left the sliding window is false in the mask, but is no padding."""
    q, k, v = drawn(40)
    layer = ZipCacheLayer(1.0, salient_bits=8, sliding_window=20, window=window)
    layer.prefill(*part((q, k, v), 0, 17))
    for i in range(17, 40):
        layer.append(*part((k, v), i, i + 1))
        before = layer.attend(q[:, :, i : i + 1])
        layer.hide(layer.token_mask())
        assert_same_bits(layer.attend(q[:, :, i : i + 1]), before)
    mask = layer.token_mask()
    mask[0, 35:] = False
    layer.hide(mask)
    assert_same_bits(layer.token_mask(), mask)


def test_no_tokens_after_many() -> None:
    """An empty piece of a prompt, where older tokens are out of sight."""
    q, k, v = drawn(30)
    layer = ZipCacheLayer(window=16, sliding_window=10)
    layer.prefill(*part((q, k, v), 0, 30))
    before = layer.state_dict()
    assert layer.prefill(*part((q, k, v), 0, 0)).shape == (2, 4, 0, 32)
    assert_same(layer.state_dict(), before)


@pytest.mark.parametrize("held", [4, 40])
def test_hidden_tokens_do_not_come_back_when_newer_ones_are_removed(held: int) -> None:
    """More of them than the sliding window is wide; in the window of uncompressed tokens, and compressed."""
    q, k, v = drawn(60)
    layer = ZipCacheLayer(1.0, salient_bits=8, window=held, sliding_window=5)
    layer.append(*part((k, v), 0, 40))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, -9:] = False
    layer.hide(mask)
    layer.drop_newest(3)
    seen = torch.arange(37).ge(32).expand(2, -1) & mask[:, :37]
    assert torch.equal(layer.token_mask(), seen)
    assert not layer.attend(q[:, :, :1])[0].any()
