# SPDX-License-Identifier: Apache-2.0
"""One layer's cache: windows, prompts, padding, saliency, sliding windows, rotation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from singlepass.kv import Codec, ZipCacheLayer
from singlepass.kv._prompt import rotate
from singlepass.kv._selection import probe_count, probe_positions
from singlepass.kv._store import PADDING, REGULAR, SALIENT

from ..tolerances import assert_same_bits
from .inputs import NAMES, each_cpu_backend, each_dtype, generator
from .layers import assert_same, check_attend, dense, drawn, kinds, part, stream

CODECS: dict[str, Callable[[], Codec]] = {
    "zipcache": lambda: Codec.zipcache(16),
    "finer regular blocks": lambda: Codec(block=16, regular_block=6),
    "paper": lambda: Codec.zipcache(None),
    "kivi": lambda: Codec.kivi(16),
    "token and head": Codec.per_token_head,
    "rotated": lambda: Codec.per_token_head(rotate=True),
}
each_codec = pytest.mark.parametrize("codec", CODECS)


@each_cpu_backend
@each_codec
@each_dtype
def test_single_appends_are_one_append(backend: str, codec: str, dtype: torch.dtype) -> None:
    q, k, v = drawn(70, dtype=dtype)
    layers = [ZipCacheLayer(codec=CODECS[codec](), window=16, backend=backend) for _ in range(4)]
    for layer, prompt, sizes in zip(layers, (0, 0, 20, 20), ((1,), (70,), (1,), (7, 16, 25)), strict=True):
        if prompt:
            layer.prefill(*part((q, k, v), 0, prompt))
        i, at = 0, prompt
        while at < 70:
            layer.append(*part((k, v), at, at + sizes[i % len(sizes)]))
            i, at = i + 1, at + sizes[i % len(sizes)]
        assert layer.length == 70
    assert_same(layers[0].state_dict(), layers[1].state_dict())
    assert_same(layers[2].state_dict(), layers[3].state_dict())


@each_codec
def test_what_is_compressed_never_changes(codec: str) -> None:
    q, k, v = drawn(150)
    layer = ZipCacheLayer(codec=CODECS[codec](), window=20)
    layer.prefill(*part((q, k, v), 0, 50))
    before, old = layer.state_dict()["segments"], layer.dequantize()
    stream(layer, *part((q, k, v), 50, 150))
    after, new = layer.state_dict()["segments"], layer.dequantize()
    for kind, tensors in before.items():
        for name, tensor in tensors.items():
            assert_same_bits(after[kind][name][tuple(slice(0, n) for n in tensor.shape)], tensor, name)
    for a, b in zip(old, new, strict=True):
        assert_same_bits(b[:, :, :50], a)


@each_cpu_backend
@pytest.mark.parametrize(
    ("window", "length", "left"),
    [
        (1, 1, 1),
        (1, 7, 1),
        (100, 99, 99),
        (100, 100, 100),
        (100, 101, 1),
        (100, 201, 1),
        (128, 128, 128),
        (128, 129, 1),
    ],
)
def test_window_edges(backend: str, window: int, length: int, left: int) -> None:
    """A full window stays until the next token comes."""
    q, k, v = drawn(length)
    layer = ZipCacheLayer(window=window, backend=backend)
    layer.append(k, v)
    assert (layer.length, layer.window_length) == (length, left)
    assert kinds(layer).shape[2] == length - left
    for restored, given in zip(layer.dequantize(), (k, v), strict=True):
        assert_same_bits(restored[:, :, length - left :], given[:, :, length - left :])
    check_attend(layer, q[:, :, -1:])
    if left > 2:
        check_attend(layer, q[:, :, -3:])


@each_cpu_backend
@each_codec
@pytest.mark.parametrize("bits", [(4, 2), (8, 4), (8, 2), (4, 4)], ids=str)
def test_attention_is_over_what_dequantize_gives(backend: str, codec: str, bits: tuple[int, int]) -> None:
    q, k, v = drawn(90, value_width=64)
    options = {"salient_bits": bits[0], "regular_bits": bits[1], "codec": CODECS[codec](), "backend": backend}
    layer = ZipCacheLayer(window=16, **options)
    layer.prefill(*part((q, k, v), 0, 40))
    stream(layer, *part((q, k, v), 40, 90))
    if codec != "rotated":
        check_attend(layer, q[:, :, -2:])
        return
    # Rotated back and forth in float32, 32 products in each sum: 2^-24 * 32 of numbers around one, some times.
    want = dense(q[:, :, -2:], *layer.dequantize())
    np.testing.assert_allclose(layer.attend(q[:, :, -2:]).numpy(), want, rtol=0.0, atol=1e-5)


@each_cpu_backend
@each_dtype
def test_nothing_and_one_token(backend: str, dtype: torch.dtype) -> None:
    q, k, v = drawn(1, dtype=dtype)
    layer = ZipCacheLayer(backend=backend)
    empty = layer.state_dict()
    for call in (lambda: layer.attend(q), layer.dequantize):
        with pytest.raises(ValueError, match="got an empty cache"):
            call()
    assert_same(layer.state_dict(), empty)
    layer.append(k[:, :, :0], v[:, :, :0])
    assert (layer.length, layer.nbytes) == (0, 0)
    assert not bool(layer.attend(q).any())
    assert layer.dequantize()[0].shape == (2, 2, 0, 32)
    assert layer.prefill(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 4, 0, 32)
    assert layer.length == 0
    out = layer.prefill(q, k, v)
    assert (layer.length, layer.window_length) == (1, 0)
    assert out.dtype == dtype
    assert_same_bits(out, v.repeat_interleave(2, 1))
    other = ZipCacheLayer(backend=backend)
    other.append(k, v)
    torch.testing.assert_close(other.attend(q), v.repeat_interleave(2, 1), rtol=1e-6, atol=0.0)


def test_a_prompt_sees_itself_uncompressed_and_what_was_before_as_it_is_stored() -> None:
    """scaled_dot_product_attention in float32: some hundred roundings of numbers around one."""
    q, k, v = drawn(70, width=48)
    layer = ZipCacheLayer(window=16)
    first = layer.prefill(*part((q, k, v), 0, 40))
    np.testing.assert_allclose(first.numpy(), dense(*part((q, k, v), 0, 40)), rtol=0.0, atol=1e-5)
    layer.append(*part((k, v), 40, 45))
    old = layer.dequantize()
    keys, values = (torch.cat((a, b[:, :, 45:]), 2) for a, b in zip(old, (k, v), strict=True))
    second = layer.prefill(*part((q, k, v), 45, 70))
    np.testing.assert_allclose(second.numpy(), dense(q[:, :, 45:], keys, values), rtol=0.0, atol=1e-5)
    assert (layer.length, layer.window_length) == (70, 0)
    check_attend(layer, q[:, :, -1:])


@each_cpu_backend
@pytest.mark.parametrize("codec", ["zipcache", "token and head"])
def test_left_padding_is_as_if_it_were_not_there(backend: str, codec: str) -> None:
    """All tokens are probes, so that the padded draw the same."""
    lengths, longest = (50, 37, 1), 50
    q, k, v = drawn(longest + 30, batch=3)
    options = {"codec": CODECS[codec](), "window": 12, "recent_probes": 1.0, "backend": backend}
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths])
    for x in (q, k, v):
        x[:, :, :longest][~mask[:, None].expand(-1, x.shape[1], -1)] = 1e3
    together = ZipCacheLayer(**options)
    prompt = together.prefill(*part((q, k, v), 0, longest), mask)
    later = stream(together, *part((q, k, v), longest, longest + 30))
    keys, values = together.dequantize()
    assert not bool(prompt[~mask[:, None].expand(-1, 4, -1)].any())
    assert bool((kinds(together)[:, 0, :longest] == PADDING).eq(~mask).all())
    for b, n in enumerate(lengths):
        own = tuple(t[b : b + 1] for t in (q, k, v))
        alone = ZipCacheLayer(**options)
        begin = longest - n
        out = alone.prefill(*part(own, begin, longest))
        torch.testing.assert_close(prompt[b : b + 1, :, begin:], out, rtol=0.0, atol=1e-5)
        for got, want in zip(later, stream(alone, *part(own, longest, longest + 30)), strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=0.0, atol=1e-5)
        for got, want in zip((keys, values), alone.dequantize(), strict=True):
            assert_same_bits(got[b : b + 1, :, begin:], want)
            assert not bool(got[b, :, :begin].any())
        for size in (1, 12, 35, 60):
            got = together.attend(q[:, :, -1:], sliding_window=size)[b : b + 1]
            torch.testing.assert_close(got, alone.attend(own[0][:, :, -1:], sliding_window=size), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 5, 50, 99])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
def test_counts_of_salient_tokens(length: int, ratio: float) -> None:
    layer = ZipCacheLayer(ratio, codec=Codec.zipcache(16))
    layer.prefill(*drawn(length))
    want = {SALIENT: int(length * ratio + 0.5)}
    want[REGULAR] = length - want[SALIENT]
    for kind, count in want.items():
        assert bool(((kinds(layer) == kind).sum(2) == count).all())
        assert (kind in layer._held.compressed.segments) == (count > 0)
        if count:
            segment = layer._held.compressed.segments[kind]
            assert (segment.slots, segment.bits) == (count, 4 if kind == SALIENT else 2)
            assert int(segment.keys.counts[0, 0].sum()) == count


def test_each_kind_has_blocks_of_its_own() -> None:
    q, k, v = drawn(100)
    layer = ZipCacheLayer(0.5, codec=Codec(block=32, regular_block=8), window=40)
    layer.prefill(*part((q, k, v), 0, 60))
    stream(layer, *part((q, k, v), 60, 100))
    layer.append(*part((k, v), 0, 1))
    starts = {kind: segment.keys.starts.tolist() for kind, segment in layer._held.compressed.segments.items()}
    assert starts == {SALIENT: [0, 30, 50], REGULAR: [0, 8, 16, 24, 30, 38, 46, 50]}


def test_finer_regular_blocks_bring_regular_tokens_closer() -> None:
    """Keys that drift as tokens go by, as position embeddings have them; salient tokens' bits stay what they were."""
    q, k, v = drawn(400)
    k = k * 0.1 + torch.linspace(-3.0, 3.0, 400)[:, None]
    layers = [ZipCacheLayer(codec=Codec(regular_block=size)) for size in (128, 16)]
    off = []
    for layer in layers:
        layer.prefill(q, k, v)
        regular = kinds(layer) == REGULAR
        errors = [(found - x).square()[regular] for found, x in zip(layer.dequantize(), (k, v), strict=True)]
        off.append([error.mean() for error in errors])
    assert off[1][0] < 0.3 * off[0][0]
    assert off[1][1] < off[0][1]
    assert_same(*(layer._held.compressed.segments[SALIENT].state() for layer in layers))


def test_tokens_without_queries_are_salient() -> None:
    """Nothing is known of them."""
    _, k, v = drawn(40)
    layer = ZipCacheLayer(window=16)
    layer.append(k, v)
    assert bool((kinds(layer) == SALIENT).all())


@each_cpu_backend
@pytest.mark.parametrize("normalization", ["probe_nnz", "causal_nnz"])
def test_tokens_that_all_look_at_are_salient(backend: str, normalization: str) -> None:
    """Planted tokens, others in each head, of a prompt and of a window."""
    q, k, v = drawn(140, heads=3)
    planted = torch.stack([torch.randperm(40, generator=generator(i))[:4].sort().values for i in range(6)]).view(
        2, 3, 4
    )
    target = torch.nn.functional.normalize(q.unflatten(1, (3, 2)).mean((2, 3)), dim=-1) * 20.0
    q = q * 0.3 + target.repeat_interleave(2, 1)[:, :, None] * 0.2
    for begin in (0, 100):
        place = (planted + begin)[..., None].expand(-1, -1, -1, 32)
        k.scatter_(2, place, target[:, :, None].expand(-1, -1, 4, -1).contiguous())
    layer = ZipCacheLayer(0.1, window=40, normalization=normalization, backend=backend)
    layer.prefill(*part((q, k, v), 0, 100))
    stream(layer, *part((q, k, v), 100, 140))
    layer.append(*part((k, v), 0, 1))
    found = kinds(layer)
    for begin, length, salient in ((0, 100, 10), (100, 40, 4)):
        piece = found[:, :, begin : begin + length]
        assert bool(((piece == SALIENT).sum(2) == salient).all())
        assert bool((piece.gather(2, planted) == SALIENT).all())


@each_cpu_backend
def test_saliency_of_a_second_prompt(backend: str) -> None:
    """Its probes stand after what is cached, and see that too; against float64."""
    q, k, v = drawn(70)
    layer = ZipCacheLayer(0.5, recent_probes=1.0, backend=backend)
    layer.prefill(*part((q, k, v), 0, 40))
    keys = torch.cat((layer.dequantize()[0], k[:, :, 40:]), 2).double()
    logits = (q[:, :, 40:].unflatten(1, (2, 2)).double() @ keys[:, :, None].mT) * 32**-0.5
    shown = torch.arange(70) <= torch.arange(40, 70)[:, None]
    sums = logits.masked_fill(~shown, -torch.inf).softmax(-1).sum((2, 3))[:, :, 40:]
    best = (sums / torch.arange(30, 0, -1)).topk(15, 2).indices.sort(2).values
    layer.prefill(*part((q, k, v), 40, 70))
    found = (kinds(layer)[:, :, 40:] == SALIENT).nonzero()[:, 2].view(best.shape)
    assert torch.equal(found, best)


@each_cpu_backend
def test_saliency_of_a_window(backend: str) -> None:
    """Sums over the probes, of attention over everything that they see, against float64."""
    q, k, v = drawn(80)
    layer = ZipCacheLayer(window=24, recent_probes=0.2, random_probes=0.3, backend=backend)
    layer.prefill(*part((q, k, v), 0, 56))
    assert len(layer._held.window.probes.due) == 7
    assert max(layer._held.window.probes.due) < 19, "the 5 newest are probes anyway"
    due = sorted(layer._held.window.probes.due | set(range(19, 24)))
    stream(layer, *part((q, k, v), 56, 80))
    keys = layer.dequantize()[0].double()
    logits = (q[:, :, 56:].unflatten(1, (2, 2)).double() @ keys[:, :, None].mT) * 32**-0.5
    shown = torch.arange(80) <= torch.arange(56, 80)[:, None]
    weights = logits.masked_fill(~shown, -torch.inf).softmax(-1)[:, :, :, due, 56:]
    nnz = torch.tensor([sum(p >= j for p in due) for j in range(24)])
    saliency = weights.mean(2).sum(2) / nnz
    found, unseen = layer._held.window.probes.saliency(k[:, :, 56:], None, 5, "probe_nnz", **layer._logits)
    assert [place for queries in layer._held.window.probes.queries for place in queries.places] == due
    torch.testing.assert_close(found.double(), saliency, rtol=1e-4, atol=1e-6)
    assert unseen == 0
    layer.append(*part((k, v), 0, 1))
    best = saliency.topk(int(24 * 0.6 + 0.5), 2).indices.sort(2).values
    salient = (kinds(layer)[:, :, 56:] == SALIENT).nonzero()[:, 2].view(best.shape)
    assert torch.equal(salient, best)


def test_probes() -> None:
    for length, want in ((1, (1, 0)), (10, (1, 0)), (100, (5, 5)), (1000, (50, 50)), (40_000, (256, 256))):
        assert probe_count(length, 0.05, 0.05, 512) == want
        places = probe_positions(length, 0.05, 0.05, 512, generator(1))
        assert places.tolist() == sorted(set(places.tolist()))
        assert places[want[1] :].tolist() == list(range(length - want[0], length))
        assert_same_bits(places, probe_positions(length, 0.05, 0.05, 512, generator(1)))
    assert not torch.equal(*(probe_positions(1000, 0.05, 0.05, 512, generator(seed)) for seed in (1, 2)))
    assert probe_count(8, 0.0, 0.0, 512) == (1, 0), "there is always one"
    assert probe_count(8, 1.0, 1.0, 512) == (8, 0)
    assert probe_count(100, 0.5, 0.5, 3) == (2, 1)


def test_seeds() -> None:
    tensors = drawn(200)
    states = []
    for seed in (1, 1, 2):
        layer = ZipCacheLayer(seed=seed, window=16)
        layer.prefill(*tensors)
        stream(layer, *part(tensors, 0, 40))
        states.append(layer.state_dict())
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["kinds"], states[2]["kinds"])


@each_cpu_backend
@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 26, 27, 40, 75, 76, 500])
def test_sliding_windows(backend: str, size: int) -> None:
    q, k, v = drawn(76)
    layer = ZipCacheLayer(window=16, codec=Codec.zipcache(16), backend=backend)
    layer.prefill(*part((q, k, v), 0, 34))
    stream(layer, *part((q, k, v), 34, 76))
    assert layer.window_length == 10
    check_attend(layer, q[:, :, -1:], sliding_window=size)


def test_rotation() -> None:
    for width in (16, 48, 64, 80, 96, 128, 256, 512):
        for dtype in NAMES:
            x = torch.randn(2, 3, 5, width, generator=generator()).to(dtype)
            turned = rotate(x)
            assert turned.dtype == dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(rotate(turned), x, rtol=4 * eps, atol=16 * eps)
            norms = [t.float().norm(dim=-1) for t in (turned, x)]
            torch.testing.assert_close(*norms, rtol=4 * eps, atol=0.0)


def test_rotation_spreads_outliers() -> None:
    q, k, v = drawn(64, width=64)
    k[..., 5] *= 30.0
    off: dict[bool, Tensor] = {}
    for rotated in (False, True):
        layer = ZipCacheLayer(1.0, codec=Codec.per_token_head(rotate=rotated))
        layer.prefill(q, k, v)
        off[rotated] = (layer.dequantize()[0] - k).square().mean()
    assert off[True] < 0.5 * off[False]


@pytest.mark.parametrize("tokens", [256, 257, 600])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_long_prompts_with_padding_and_after_others(tokens: int, softcap: float) -> None:
    """Where masks are held, queries beyond the first few hundred have theirs too."""
    q, k, v = drawn(tokens + 40, batch=2, width=16)
    mask = torch.arange(tokens) >= torch.tensor([[0], [5]])
    padded, alone = (ZipCacheLayer(salient_ratio=1.0, softcap=softcap) for _ in range(2))
    out = padded.prefill(*part((q, k, v), 0, tokens), mask)
    unpadded = alone.prefill(*part((q[1:], k[1:], v[1:]), 5, tokens))
    torch.testing.assert_close(out[1:, :, 5:], unpadded, rtol=0.0, atol=1e-5)  # hundreds of roundings around one
    again = padded.prefill(*part((q, k, v), 0, tokens), mask)
    assert again.shape == out.shape
    assert padded.length == 2 * tokens
