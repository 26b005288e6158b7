# SPDX-License-Identifier: Apache-2.0
"""One layer's cache: saving, other batches, dropped tokens, and calls that fail."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from singlepass.kv import Codec, ZipCacheLayer
from singlepass.kv._store import REGULAR

from ..tolerances import assert_same_bits
from .inputs import each_dtype
from .layers import assert_same, drawn, kinds, part, stream
from .test_layer import CODECS, each_codec

TENSORS = drawn(90)


def made(codec: str = "zipcache", dtype: torch.dtype = torch.float32, **options: Any) -> ZipCacheLayer:
    """With a prompt of 30 tokens, of which the second sequence has 25, a compressed window, and half of another."""
    layer = ZipCacheLayer(**({"window": 16, "codec": CODECS[codec]()} | options))
    tensors = tuple(t.to(dtype) for t in TENSORS)
    mask = torch.arange(30) >= torch.tensor([[0], [5]])
    layer.prefill(*part(tensors, 0, 30), mask)
    stream(layer, *part(tensors, 30, 55))
    return layer


def go_on(layer: ZipCacheLayer, index: tuple[int, ...] = (0, 1), begin: int = 55) -> list[Tensor]:
    tensors = tuple(t[list(index)].to(layer.dequantize()[0].dtype) for t in TENSORS)
    outs = stream(layer, *part(tensors, begin, 90))
    return [*outs, *layer.dequantize()]


@each_codec
@each_dtype
def test_state_dict_round_trip(codec: str, dtype: torch.dtype) -> None:
    """Through a file that holds plain data alone, bit for bit, and on from there."""
    layer = made(codec, dtype)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = ZipCacheLayer(window=16, codec=CODECS[codec]())
    other.append(*drawn(3, batch=1)[1:])  # is replaced
    other.load_state_dict(saved)
    assert_same(other.state_dict(), layer.state_dict())
    assert other.nbytes <= layer.nbytes, "room made ahead is not saved"
    for a, b in zip(go_on(layer), go_on(other), strict=True):
        assert_same_bits(a, b)
    assert_same(other.state_dict(), layer.state_dict())


def test_state_dict_of_an_empty_layer_and_copies() -> None:
    empty, layer = ZipCacheLayer(window=16, codec=CODECS["zipcache"]()), made()
    saved = layer.state_dict()
    kept = copy.deepcopy(saved)
    go_on(layer)
    assert_same(saved, kept)
    layer.load_state_dict(empty.state_dict())
    assert layer.length == 0
    assert_same(layer.state_dict(), empty.state_dict())
    layer.load_state_dict(saved)
    go_on(layer)
    assert_same(saved, kept)
    layer.reset()
    assert_same(layer.state_dict(), empty.state_dict())


Change = Callable[[Any], Any]
CORRUPTIONS: list[tuple[tuple[Any, ...], Change]] = [
    *(
        ((key,), lambda _: None)
        for key in ("options", "length", "due", "generator", "window_k", "window_v", "segments")
    ),
    *(((key,), lambda _: "x") for key in ("options", "length", "window_length", "due", "queries", "kinds")),
    *(((key,), lambda t: t[..., :-1]) for key in ("generator", "window_k", "window_v", "kinds")),
    *(((key,), lambda t: t[:, :-1]) for key in ("window_k", "kinds")),
    *((("length",), lambda n, by=by: n + by) for by in (-60, -1, 1, 4)),
    *((("window_length",), lambda n, by=by: n + by) for by in (-60, -1, 1, 16)),
    (("length",), float),
    (("window_length",), torch.tensor),
    (("window_k",), lambda t: t.double()),
    (("window_k",), lambda t: t[:, :, :-1]),
    (("due",), lambda _: [16]),
    (("due",), lambda _: ["a"]),
    (("due",), lambda _: [3, 2]),
    (("queries",), lambda t: [*t, t[0]]),
    (("queries",), lambda t: [t[0][:2], *t[1:]]),
    *((("queries",), lambda t, i=i: [([i], *t[0][1:]), *t[1:]]) for i in (-1, 9, 8.0)),
    *((("queries",), lambda t, x=x: [(t[0][0], x, t[0][2]), *t[1:]]) for x in (None, torch.zeros(2, 3, 1, 32))),
    (("queries",), lambda t: [(t[0][0], t[0][1][:, :, :0], t[0][2]), *t[1:]]),
    (("queries",), lambda t: [(*t[0][:2], t[0][2].double()), *t[1:]]),
    (("queries",), lambda t: [(*t[0][:2], t[0][2][:1]), *t[1:]]),
    (("generator",), lambda t: t * 0),
    (("kinds",), lambda t: t * 0),
    (("kinds",), lambda t: torch.cat((t, t), 2)),
    (("kinds",), lambda t: t[1:]),
    (("options", "window"), lambda _: 17),
    (("options", "salient_bits"), lambda _: 8),
    (("options", "codec", "block"), lambda _: 32),
    (("options", "codec", "regular_block"), lambda _: 8),
    (("options", "codec"), lambda codec: {name: value for name, value in codec.items() if name != "regular_block"}),
    (("options",), lambda t: t | {"more": 1}),
    (("segments",), lambda t: t | {2: t[0]}),
    (("segments",), lambda t: {0: t[0]}),
    (("segments",), lambda t: {0: t[1], 1: t[0]}),
    (("segments",), lambda t: {str(key): value for key, value in t.items()}),
    *((("segments", 0), lambda t, other=other: other) for other in (None, 3, [])),
    (("segments", 0), lambda t: {name: value for name, value in t.items() if name != "counts"}),
    *((("segments", 1, name), lambda t: t[..., :-1]) for name in ("key_codes", "key_scales", "value_codes", "starts")),
    *((("segments", 0, name), lambda t: t[:1]) for name in ("key_codes", "value_scales", "value_channels", "counts")),
    *((("segments", 0, name), lambda t: t.float()) for name in ("key_codes", "value_scales", "value_channels")),
    *((("segments", 0, name), lambda t: t.tolist()) for name in ("key_codes", "counts")),
    *((("segments", 1, "starts"), change) for change in (lambda t: t + 1, lambda t: t.flip(0), lambda t: t[:0])),
    *((("segments", 1, "counts"), lambda t, by=by: t + by) for by in (-1, 1, 1000)),
]


@pytest.mark.parametrize("number", range(len(CORRUPTIONS)))
def test_what_no_such_layer_saved_is_refused(number: int) -> None:
    path, change = CORRUPTIONS[number]
    saved = made().state_dict()
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]])
    layer = ZipCacheLayer(window=16, codec=CODECS["zipcache"]())
    layer.append(*drawn(20, batch=1)[1:])
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"^ZipCacheLayer(\.load_state_dict)?: expected .*; got .*\. [A-Z].*\.$"):
        layer.load_state_dict(saved)
    assert_same(layer.state_dict(), before)


def test_saved_things_that_are_no_caches() -> None:
    layer = made()
    before = layer.state_dict()
    missing = {key: value for key, value in before.items() if key != "due"}
    for foreign in (None, 3, [], {}, {"a": 1}, missing, before | {"more": 1}):
        with pytest.raises(ValueError, match="expected a saved cache; got"):
            layer.load_state_dict(foreign)
    assert_same(layer.state_dict(), before)


@each_codec
def test_beams(codec: str) -> None:
    """Chosen, repeated and reordered sequences are those sequences, then and later."""
    index = torch.tensor([1, 1, 0])
    layer, chosen, repeated = made(codec), made(codec), made(codec)
    chosen.select_sequences(index)
    repeated.repeat_sequences(2)
    outs, chosen_outs, repeated_outs = go_on(layer), go_on(chosen, (1, 1, 0)), go_on(repeated, (0, 0, 1, 1))
    for a, b, c in zip(outs, chosen_outs, repeated_outs, strict=True):  # some hundred roundings of numbers around one
        torch.testing.assert_close(b, a[index], rtol=0.0, atol=1e-5)
        torch.testing.assert_close(c, a.repeat_interleave(2, 0), rtol=0.0, atol=1e-5)
    for a, b, c in zip(outs[-2:], chosen_outs[-2:], repeated_outs[-2:], strict=True):
        assert_same_bits(b, a[index])
        assert_same_bits(c, a.repeat_interleave(2, 0))
    assert chosen.nbytes > 1.4 * layer.nbytes


def test_beams_out_of_range_change_nothing() -> None:
    layer = made()
    before = layer.state_dict()
    for wrong in (torch.tensor([0, 2]), [-1], [], "0", [None]):
        with pytest.raises(ValueError, match="expected numbers of sequences from 0 to 1, a list or an int64 tensor"):
            layer.select_sequences(wrong)
    for times in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"expected 1 or more times; got {times!r}"):
            layer.repeat_sequences(times)
    assert_same(layer.state_dict(), before)


def test_sequences_by_a_list() -> None:
    layer, other = made(), made()
    layer.select_sequences([1, 1, 0])
    other.select_sequences(torch.tensor([1, 1, 0]))
    assert_same(layer.state_dict(), other.state_dict())
    for wrong in ([0.0], [True, False], [[0]]):
        with pytest.raises(ValueError, match=r"^ZipCacheLayer: expected numbers of sequences .* Pass \[0\]"):
            layer.select_sequences(wrong)
    assert_same(layer.state_dict(), other.state_dict())


def test_dropping_the_newest() -> None:
    layer, other = made(), made()
    assert layer.window_length == 9
    stream(layer, *part(TENSORS, 60, 65))  # a draft that is not accepted
    layer.drop_newest(5)
    assert (layer.length, layer.window_length) == (55, 9)
    for a, b in zip(layer.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a, b)
    q = TENSORS[0][:, :, 54:55]
    assert_same_bits(layer.attend(q), other.attend(q))
    layer.drop_newest(0)
    layer.drop_newest(9)
    assert (layer.length, layer.window_length) == (46, 0)
    layer.append(*part(TENSORS[1:], 46, 90))
    assert layer.length == 90


@pytest.mark.parametrize("recent", [0.05, 0.3, 1.0])
def test_dropped_tokens_leave_no_trace(recent: float) -> None:
    """Neither in what probes say, nor later; whether they were tried one by one or together."""
    q, k, v = drawn(60)
    layer, tried = (ZipCacheLayer(window=20, recent_probes=recent, random_probes=0.3) for _ in range(2))
    for each in (layer, tried):
        each.prefill(*part((q, k, v), 0, 20))
    at = 20
    for i in range(6):
        drafts = part((q, k, v), 40 + i, 45 + i)
        if i % 2 and layer.window_length + 5 <= 20:
            tried.append(*drafts[1:])
            tried.attend(drafts[0])
            tried.drop_newest(5)
        for each in (layer, tried):
            stream(each, *part((q, k, v), at, at + 3))
        at += 3
    assert layer.window_length == 18
    for each in (layer, tried):
        each.prefill(*part((q, k, v), at, 60))
    assert bool((kinds(layer)[:, :, 20:38] == REGULAR).any())
    assert_same(tried.state_dict(), layer.state_dict())


@pytest.mark.parametrize("tokens", [-1, 10, 56])
def test_only_uncompressed_tokens_can_be_dropped(tokens: int) -> None:
    layer = made()
    before = layer.state_dict()
    with pytest.raises(ValueError, match="expected 0 to 9 tokens, those that are not compressed yet; got"):
        layer.drop_newest(tokens)
    assert_same(layer.state_dict(), before)


def _calls(layer: ZipCacheLayer) -> list[tuple[Callable[[], object], str]]:
    q, k, v = part(TENSORS, 55, 60)
    half = layer.dequantize()[0].half()
    return [
        (lambda: layer.append(k[:1], v[:1]), r"k of shape \(2, 2, tokens, 32\)"),
        (lambda: layer.append(k[:, :1], v[:, :1]), r"k of shape \(2, 2, tokens, 32\)"),
        (lambda: layer.append(k[..., :16], v[..., :16]), r"k of shape \(2, 2, tokens, 32\)"),
        (lambda: layer.append(k, v[..., :16]), r"v of shape \(2, 2, tokens, 32\)"),
        (lambda: layer.append(k, v[:, :, :3]), r"v for k \(2, 2, 5, 32\)"),
        (lambda: layer.append(k.half(), v), r"v for k \(2, 2, 5, 32\) of torch.float16"),
        (lambda: layer.append(half, half), "torch.float32 on cpu, as cached"),
        (lambda: layer.append(k[0], v[0]), r"k \(batch, heads, tokens, channels\)"),
        (lambda: layer.append(k.int(), v.int()), "a floating-point k"),
        (lambda: layer.append(k[..., :20], v), "k of 16, 32, ..., 512 channels; got 20"),
        (lambda: layer.prefill(q[:, :3], k, v), "a multiple of 2 heads"),
        (lambda: layer.prefill(q[:, :, :3], k, v), "5 queries, one for each token; got 3"),
        (lambda: layer.prefill(q, k, v, torch.ones(2, 4, dtype=torch.bool)), r"a bool mask of shape \(2, 5\)"),
        (lambda: layer.prefill(q, k, v, torch.ones(2, 5)), r"a bool mask of shape \(2, 5\)"),
        (lambda: layer.prefill(q, k, v, sinks=torch.zeros(3)), r"float32 sinks of shape \(4,\)"),
        (lambda: layer.prefill(q, k, v, sinks=torch.zeros(4).double()), "float32 sinks"),
        (lambda: layer.prefill(q[:1], k[:1], v[:1]), r"k of shape \(2, 2, tokens, 32\)"),
        (lambda: layer.attend(q[:, :3]), "a multiple of 2 heads"),
        (lambda: layer.attend(torch.cat((q, q), 2)), "at most 9 queries, whose tokens the window holds; got 10"),
        (lambda: layer.attend(q, sliding_window=0), "a sliding window of at least 1; got 0"),
        (lambda: layer.attend(q[:, :, :1], sinks=torch.zeros(3)), r"float32 sinks of shape \(4,\)"),
    ]


def test_gradients_are_refused() -> None:
    layer = made()
    before = layer.state_dict()
    q, k, v = (t.clone().requires_grad_() for t in part(TENSORS, 55, 60))
    calls = {
        "q": [lambda: layer.attend(q), lambda: layer.prefill(q, k.detach(), v.detach())],
        "k": [lambda: layer.append(k, v.detach()), lambda: layer.prefill(q.detach(), k, v)],
        "v": [lambda: layer.append(k.detach(), v)],
    }
    for name, its in calls.items():
        text = rf"^ZipCacheLayer: expected {name} that needs no gradient; got requires_grad=True\. Call .*no_grad"
        for call in its:
            with pytest.raises(ValueError, match=text):
                call()
            assert_same(layer.state_dict(), before)
    q_plain, k_plain, v_plain = (t.detach() for t in (q, k, v))
    with forward_ad.dual_level():
        dual = {"q": (layer.attend, (forward_ad.make_dual(q_plain, q_plain),))}
        dual["k"] = layer.append, (forward_ad.make_dual(k_plain, k_plain), v_plain)
        dual["v"] = layer.append, (k_plain, forward_ad.make_dual(v_plain, v_plain))
        for name, (method, tensors) in dual.items():
            with pytest.raises(ValueError, match=f"{name} that needs no gradient; got a tangent of forward mode"):
                method(*tensors)
            assert_same(layer.state_dict(), before)
    with torch.no_grad():
        layer.append(k, v)
        assert torch.equal(layer.attend(q), layer.attend(q.detach()))


def test_what_a_layer_looks_like() -> None:
    layer = ZipCacheLayer(salient_ratio=0.5, window=8)
    assert repr(layer) == "ZipCacheLayer(salient_ratio=0.5, bits=(4, 2), tokens=0, uncompressed=0, nbytes=0)"
    _, k, v = part(TENSORS, 0, 11)
    layer.append(k, v[..., :16])
    shapes = "keys=(2, 2, 11, 32), values=(2, 2, 11, 16)"
    want = f"ZipCacheLayer(salient_ratio=0.5, bits=(4, 2), tokens=11, uncompressed=3, {shapes}, nbytes={layer.nbytes})"
    assert repr(layer) == want


def test_calls_that_fail_leave_the_cache_as_it_is() -> None:
    layer = made()
    before = layer.state_dict()
    for call, text in _calls(layer):
        with pytest.raises(ValueError, match=f": expected .*{text}"):
            call()
        assert_same(layer.state_dict(), before)


def test_backends_that_cannot_run_leave_the_cache_empty() -> None:
    """Also where the first window would still have fitted."""
    for backend, dtype in (("triton", torch.float32), ("native", torch.float64)):
        layer = ZipCacheLayer(window=4, backend=backend)
        empty = layer.state_dict()
        q, k, v = (t[:, :, :6].to(dtype) for t in TENSORS)
        for call in (lambda k=k, v=v, layer=layer: layer.append(k, v), lambda q=q, layer=layer: layer.prefill(q, q, q)):
            with pytest.raises(RuntimeError, match="kv_quantize_: expected backend"):
                call()
        assert_same(layer.state_dict(), empty)


@pytest.mark.parametrize(
    "options",
    [
        {"salient_ratio": 1.1},
        {"salient_ratio": -0.1},
        {"salient_ratio": float("nan")},
        {"salient_bits": 3},
        {"regular_bits": 16},
        {"window": 0},
        {"recent_probes": 2.0},
        {"random_probes": -1.0},
        {"max_probes": 0},
        {"normalization": "paper"},
        {"seed": "a"},
        {"scale": "x"},
        {"scale": float("nan")},
        {"backend": "cuda"},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^ZipCacheLayer: expected .*; got .*\. [A-Z0-9].*\.$"):
        ZipCacheLayer(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"key_axis": "head"},
        {"block": 0},
        {"block": 1.5},
        {"regular_block": 0},
        {"regular_block": 2.0},
        {"value_group": -1},
        {"key_group": 16},
    ],
    ids=str,
)
def test_codecs_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Codec: expected .*; got .*\. [A-Z].*\.$"):
        Codec(**options)


def test_codecs_by_name() -> None:
    assert Codec.zipcache() == Codec()
    assert Codec.zipcache(128) == Codec(block=128, regular_block=32)
    blocks = {block: Codec.zipcache(block).regular_block for block in (64, 8, None)}
    assert blocks == {64: 32, 8: 8, None: None}, "never coarser than salient ones"
    for codec in (Codec.kivi(16), Codec.per_token_head()):
        assert codec.regular_block == codec.block


def test_groups_that_do_not_divide_the_channels() -> None:
    layer = ZipCacheLayer(codec=Codec(value_group=24))
    with pytest.raises(ValueError, match="expected a value_group that divides 32 channels; got 24"):
        layer.append(*TENSORS[1:])
    assert layer.length == 0


@pytest.mark.parametrize("wrong", [1.0, 0.5, True, None, "1"], ids=repr)
def test_what_is_no_number_of_tokens_is_not_dropped(wrong: Any) -> None:
    layer = made()
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"expected 0 to .* tokens, those that are not compressed yet"):
        layer.drop_newest(wrong)
    assert_same(layer.state_dict(), before)


def test_a_cache_has_at_least_one_sequence_and_head() -> None:
    _, k, v = drawn(5)
    for some in ((slice(0), slice(None)), (slice(None), slice(0))):
        layer = ZipCacheLayer()
        with pytest.raises(ValueError, match="expected at least one sequence and one head"):
            layer.append(k[some], v[some])
        assert (layer.length, layer.batch) == (0, None)


def test_options_of_numpy_are_saved_as_plain_numbers() -> None:
    options: dict[str, Any] = {"salient_ratio": np.float32(0.5), "recent_probes": np.float64(0.25)}
    layer = ZipCacheLayer(**options)
    layer.append(*drawn(5)[1:])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = ZipCacheLayer(0.5, recent_probes=0.25)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.length == 5


def test_queries_of_another_dtype_or_number_of_heads_are_refused() -> None:
    q, k, v = drawn(20)
    layer = ZipCacheLayer(window=4)
    with pytest.raises(ValueError, match=r"expected q of torch\.float32, as the keys; got torch\.bfloat16"):
        layer.prefill(q.bfloat16(), k, v)
    assert (layer.length, layer.batch) == (0, None)
    stream(layer, *part((q, k, v), 0, 2))
    before = layer.state_dict()
    with pytest.raises(ValueError, match="expected 4 query heads, as before; got 2"):
        layer.attend(q[:, :2, :1])
    assert_same(layer.state_dict(), before)
    stream(layer, *part((q, k, v), 2, 20))
