# SPDX-License-Identifier: Apache-2.0
"""New tokens and their attention in one op: the same bits as one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass.kv import Codec, MatryoshkaLayer, ZipCacheLayer

from ..placed import implementation
from ..tolerances import assert_same_bits
from .inputs import NAN, Attention, Part, attention, each_backend, each_dtype, each_layout, tokens
from .layers import drawn, part

Layer = ZipCacheLayer | MatryoshkaLayer


def step(case: Attention, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The op's own results; what it writes is in the case's window."""
    segments: list[Tensor] = []
    for keys, values in case.segments:
        channels = values.scales.new_empty(0) if values.channels is None else values.channels
        segments += [keys.codes, keys.scales, values.codes, values.scales, channels, keys.starts, keys.counts]
    scale = case.q.shape[3] ** -0.5 if case.scale is None else case.scale
    axis = int(bool(case.segments) and case.segments[0][0].axis == "token")
    options: dict[str, Any] = {"bits": [keys.bits for keys, _ in case.segments], "key_axis": axis}
    held = segments, case.window_k, case.window_v, case.window, case.sinks, case.first
    run = implementation("kv_step_", backend)
    out: tuple[Tensor, Tensor, Tensor] = run(case.q, k, v, *held, **options, scale=scale, softcap=case.softcap)
    return out


def check(case: Attention, backend: str, layout: str = "contiguous") -> None:
    """Against storing first, then attending; the latter is compared with float64 on the way."""
    queries, dtype = case.q.shape[2], case.window_k.dtype
    new = []
    for i, held in enumerate((case.window_k, case.window_v)):
        new.append(tokens((*held.shape[:2], queries, held.shape[3]), dtype, layout, seed=300 + i))
        for b, (_, end) in enumerate(case.window.tolist()):
            held[b, :, end - queries : end] = NAN  # whatever stood there is not read
    before = [held.clone() for held in (case.window_k, case.window_v)]
    found = step(case, *new, backend)
    for held, was, its in zip((case.window_k, case.window_v), before, new, strict=True):
        for b, (_, end) in enumerate(case.window.tolist()):
            was[b, :, end - queries : end] = its[b]
        assert_same_bits(held, was, "the window")
    expected = case.check(backend)
    for a, b in zip(found, (*expected, case.q), strict=True):
        assert_same_bits(a, b)
    assert found[2].is_contiguous()
    assert found[2].data_ptr() != case.q.data_ptr()


@each_backend
@each_dtype
def test_against_float64(backend: str, dtype: torch.dtype) -> None:
    for queries in (1, 3):
        check(attention(dtype=dtype, queries=queries, window=((2, 9), (0, 12))), backend)


@each_backend
@each_layout
def test_layouts(backend: str, layout: str) -> None:
    """Of the new tokens; the queries stand amid others."""
    case = attention(queries=2, dtype=torch.bfloat16, window=((1, 5), (0, 12)))
    wide = torch.randn(2, 2, 8, 64 + 3).to(torch.bfloat16).transpose(1, 2)[..., 1:65]
    case.q = wide
    check(case, backend, layout)


@each_backend
def test_windows_of_several_splits_and_tiles(backend: str) -> None:
    """New tokens on both sides of where a window is cut, more rows than a tile has, values of several tiles."""
    case = attention((), group=3, heads=1, queries=4, slots=140, window=((0, 130), (100, 140)), value_width=144)
    case.sinks, case.softcap = torch.randn(3), 5.0
    check(case, backend)


@each_backend
def test_the_first_tokens(backend: str) -> None:
    check(attention((), queries=1, slots=1, window=((0, 1),), batch=1), backend)
    case = attention((Part(4, (0, 16)),), queries=2, slots=4, window=((0, 2), (2, 4)))
    case.first = torch.full((1, 2, 2), 5, dtype=torch.int32)
    check(case, backend)


def test_what_does_not_fit_is_refused() -> None:
    case = attention(queries=2, window=((0, 5), (0, 12)))
    k, v = (x[:, :, :2].clone() for x in (case.window_k, case.window_v))
    before = case.window_k.clone(), case.window_v.clone()
    changed: list[tuple[Tensor, Tensor]] = [(k[:, :, :1], v), (k, v[:, :1]), (k.bfloat16(), v), (k, v[..., :32])]
    for pair in changed:
        with pytest.raises(RuntimeError, match=r"kv_step_: expected .*token"):
            step(case, *pair, "native")
    for held, was in zip((case.window_k, case.window_v), before, strict=True):
        assert_same_bits(held, was)


def test_tokens_before_the_window_are_refused() -> None:
    case = attention(queries=3, window=((3, 5), (0, 12)))
    k, v = (x[:, :, :3].clone() for x in (case.window_k, case.window_v))
    with pytest.raises(RuntimeError, match=r"kv_step_: expected a window that ends with the 3 new tokens; got slots 3"):
        step(case, k, v, "native")


# Layers

BASES = torch.linalg.qr(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(5))).Q


def low_rank(**options: Any) -> MatryoshkaLayer:
    return MatryoshkaLayer(BASES, BASES, key_ranks=16, value_ranks=[16, 32], **options)


LAYERS: dict[str, Callable[[], Layer]] = {
    "zipcache": lambda: ZipCacheLayer(window=8),
    "one number of bits": lambda: ZipCacheLayer(1.0, window=8),
    "rotated": lambda: ZipCacheLayer(window=8, codec=Codec(rotate=True)),
    "sliding": lambda: ZipCacheLayer(window=8, sliding_window=11),
    "reserved": lambda: ZipCacheLayer(window=8, max_tokens=100),
    "low rank": low_rank,
    "low rank, sliding": lambda: low_rank(sliding_window=11, window=8),
    "low rank, 4 and 2 bits": lambda: low_rank(bits=(4, 2), window=8),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
def test_a_step_is_append_and_attend(name: str) -> None:
    """Over windows that fill and are compressed, whose saliency comes of the queries laid aside."""
    layer, other = LAYERS[name](), LAYERS[name]()
    q, k, v = drawn(70)
    sizes = [1, 1, 3, 2, 1, 1, 4, 8, 1, 1, 5, 1, 1, 1, 6, 1]
    for each in (layer, other):
        each.prefill(*part((q, k, v), 0, 20))
    begin = 20
    for size in sizes:
        its = part((q, k, v), begin, begin + size)
        found = layer.step(*its)
        if size > 1:
            other.make_room(size)
        other.append(*its[1:])
        assert_same_bits(found, other.attend(its[0]))
        for t in its:
            t.fill_(9.0)  # callers may use their memory again
        begin += size
    assert layer.length == other.length == begin
    for a, b in zip(layer.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a, b)


@each_layer
def test_a_step_can_come_first(name: str) -> None:
    layer, other = LAYERS[name](), LAYERS[name]()
    q, k, v = drawn(2)
    found = layer.step(q, k, v)
    other.append(k, v)
    assert_same_bits(found, other.attend(q))


@each_layer
def test_a_step_in_inference_mode_can_be_changed_later(name: str) -> None:
    layer = LAYERS[name]()
    with torch.inference_mode():
        layer.step(*drawn(2))
    layer.drop_newest(1)
    layer.step(*drawn(3))
    assert layer.length == 4


@each_layer
def test_a_refused_step_changes_nothing(name: str) -> None:
    layer = LAYERS[name]()
    q, k, v = drawn(20)
    layer.prefill(q, k, v)
    before = [t.clone() for t in layer.tensors()]
    one, two = part((q, k, v), 0, 1), part((q, k, v), 0, 2)
    wrong = [
        (two[0], *one[1:]),  # more queries than tokens
        (one[0][:, :3], *one[1:]),  # heads that do not go with the keys'
        (one[0][..., :16], *one[1:]),
        (one[0], one[1].bfloat16(), one[2]),
        (one[0], one[1], one[2][:, :, :0]),
        (one[0].clone().requires_grad_(), *one[1:]),
    ]
    for its in wrong:
        with pytest.raises(ValueError, match="expected"):
            layer.step(*its)
    with pytest.raises(ValueError, match="sinks"):
        layer.step(*one, sinks=torch.zeros(3))
    assert layer.length == 20
    for held, was in zip(layer.tensors(), before, strict=True):
        assert_same_bits(held, was)


@pytest.mark.parametrize("name", ["zipcache", "low rank, 4 and 2 bits"])
def test_more_tokens_than_a_window_are_refused(name: str) -> None:
    layer = LAYERS[name]()
    with pytest.raises(ValueError, match=r"expected .*at most .*8 tokens.*got 9 for 9\. Pass prompts to prefill"):
        layer.step(*drawn(9))
    assert layer.length == 0
