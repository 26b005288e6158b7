# SPDX-License-Identifier: Apache-2.0
"""Attention over codes, against float64 over the very tokens that the codes stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singlepass.kv import Quantized

from ..tolerances import assert_same_bits
from .inputs import (
    LAYOUTS,
    NAN,
    WIDTHS,
    Attention,
    Part,
    attention,
    check_bounds,
    each_backend,
    each_dtype,
    each_layout,
    generator,
    restored,
    tokens,
)
from .places import decode_attention, quantize

RAGGED = Part(4, (0, 16, 32, 48, 50), ((16, 16, 16, 2), (16, 3, 0, 1)))
MIXES = {
    "8": (Part(8, (0, 40, 57)),),
    "4": (Part(4, (0, 40, 57)),),
    "2": (Part(2, (0, 40, 57)),),
    "8, 4 and 2": (Part(8, (0, 20)), Part(4, (0, 16, 32)), Part(2, (0, 33, 34))),
    "ragged": (RAGGED, Part(2, (0, 40), ((0,), (39,)))),
    "one token": (Part(4, (0, 1)),),
    "a token for each": (Part(4, (0, 1), ((1,), (0,))), Part(2, (0, 1), ((0,), (1,)))),
    "no slots": (Part(4, (0,)), Part(2, (0, 3))),
    "no tokens": (Part(2, (0, 8, 10), ((0, 0), (0, 0))),),
    "none": (),
}
CODECS: dict[str, dict[str, Any]] = {
    "zipcache": {},
    "kivi": {"separable": False, "value_group": 32},
    "token and head": {"key_axis": "token", "separable": False},
    "groups": {"key_axis": "token", "key_group": 16, "value_group": 16},
}


@each_backend
@each_dtype
@pytest.mark.parametrize("codec", CODECS)
def test_against_float64(backend: str, dtype: torch.dtype, codec: str) -> None:
    for queries in (1, 3):
        attention(dtype=dtype, queries=queries, **CODECS[codec]).check(backend, codec)


@each_backend
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("codec", CODECS)
def test_segments(backend: str, mix: str, codec: str) -> None:
    attention(MIXES[mix], **CODECS[codec]).check(backend, mix)


@each_backend
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend: str, width: int) -> None:
    """Values may be wider or narrower than keys."""
    for value_width in (width, 32, 112):
        attention(width=width, value_width=value_width).check(backend, f"{value_width}")
        attention(width=width, value_width=value_width, **CODECS["groups"]).check(backend, f"{value_width} groups")


@each_backend
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 12, 16])
def test_groups_of_query_heads(backend: str, group: int) -> None:
    for queries in (1, 2):
        attention(group=group, heads=2, queries=queries).check(backend)


@each_backend
@pytest.mark.parametrize("queries", [1, 2, 5, pytest.param(12, marks=pytest.mark.slow("kernels run lane by lane"))])
def test_windows(backend: str, queries: int) -> None:
    """Anywhere, of any length; the last queries' own tokens are its last, and earlier ones see less."""
    windows = ((0, 0), (5, 5), (12, 12), (0, 12), (3, 4), (11, 12), (0, 1), (4, 9), (9, 4))
    for parts in ((RAGGED,), ()):
        ragged = [dataclasses.replace(p, counts=(p.counts * 5)[: len(windows)]) for p in parts if p.counts]
        attention(ragged, batch=len(windows), window=windows, queries=queries).check(backend)
    attention(slots=0, window=((0, 0),), queries=queries).check(backend, "no slots")


@each_backend
def test_a_row_that_sees_nothing(backend: str) -> None:
    for slots in (0, 7):
        case = attention((Part(4, (0, 3), ((0,), (0,))),), slots=slots, window=((0, 0),), queries=2)
        out, lse = case.check(backend)
        assert not bool(out.any())
        assert bool(lse.isneginf().all())


@each_backend
def test_queries_see_no_later_tokens(backend: str) -> None:
    """Other tokens after a query's own leave its bits as they are."""
    case = attention(queries=4, window=((0, 12), (1, 9)))
    out, lse = case.call(backend)
    for b, end in ((0, 12), (1, 9)):
        case.window_k[b, :, end - 2 : end] += 1.0
        case.window_v[b, :, end - 2 : end] = -3e4
    changed, sums = case.call(backend)
    assert_same_bits(changed[:, :, :2], out[:, :, :2])
    assert_same_bits(sums[:, :, :2], lse[:, :, :2])
    assert not bool((changed[:, :, 2:] == out[:, :, 2:]).any())


@each_backend
@pytest.mark.parametrize("codec", CODECS)
def test_first(backend: str, codec: str) -> None:
    case = attention(MIXES["ragged"], heads=3, **CODECS[codec])
    case.first = torch.randint(0, 52, (2, 2, 3), dtype=torch.int32, generator=generator())
    case.first[0, 0], case.first[1, 1] = torch.tensor([0, 16, 31]), torch.tensor([0, 38, 39])
    case.check(backend)
    case.first.zero_()
    out, lse = case.call(backend)
    case.first = None
    for a, b in zip(case.call(backend), (out, lse), strict=True):
        assert_same_bits(a, b)


@each_backend
@pytest.mark.parametrize("softcap", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("scale", [None, 0.02, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_sinks_scale_and_cap(backend: str, softcap: float, scale: float | None, sinks: bool) -> None:
    case = attention(queries=2)
    case.softcap, case.scale = softcap, scale
    case.sinks = torch.randn(8, generator=generator()) * 4.0 if sinks else None
    case.check(backend)


@each_backend
def test_a_sink_alone_takes_everything(backend: str) -> None:
    case = attention((), window=((3, 3), (0, 1)))
    case.sinks = torch.linspace(-3.0, 3.0, 8)
    out, lse = case.call(backend)
    assert not bool(out[0].any())
    torch.testing.assert_close(lse[0, :, 0], case.sinks)


@each_backend
@each_layout
@each_dtype
def test_layouts(backend: str, layout: str, dtype: torch.dtype) -> None:
    """Of queries and of the window."""
    window = ((0, 12), (0, 7)) if layout in ("expanded", "one token") else ((2, 9), (0, 12))
    case = attention(layout=layout, dtype=dtype, window=window, queries=2)
    case.q = tokens((2, 8, 2, 64), dtype, layout, seed=77)
    assert layout not in LAYOUTS or case.q.stride(-1) == 1
    case.check(backend, layout)


@each_backend
def test_dtypes_of_queries_and_window_may_differ(backend: str) -> None:
    case = attention(dtype=torch.bfloat16)
    case.q = case.q.float()
    case.check(backend)


@each_backend
def test_poison_that_is_seen_shows(backend: str) -> None:
    """A token that came in with a NaN is not silently left out."""
    case = attention((RAGGED,))
    keys, _ = case.segments[0]
    keys.scales[1, 0, 0, 0, 5] = NAN
    out, lse = case.call(backend)
    assert bool(out[1, :4].isnan().all())
    assert bool(lse[1, :4].isnan().all())
    assert not bool(out[0].isnan().any())
    assert not bool(out[1, 4:].isnan().any())


@each_backend
def test_weights_of_very_different_size(backend: str) -> None:
    """Logits that grow, fall, and jump by hundreds: the largest takes over again and again."""
    for seed in range(3):
        case = attention((Part(8, (0, 64, 128, 192)), Part(4, (0, 100))), batch=1, window=((0, 12),), seed=seed)
        case.scale = 4.0
        case.q = case.q.sign()
        case.check(backend)


@each_backend
def test_one_token_is_its_value(backend: str) -> None:
    case = attention((Part(4, (0, 1)),), window=((0, 0),))
    out, lse = case.check(backend)
    values = restored(case.segments[0][1]).x.value[:, :, 0].repeat(4, 1)
    np.testing.assert_allclose(out[:, :, 0].numpy(), values, rtol=1e-6)
    assert bool(lse.isfinite().all())


@each_backend
def test_all_weights_alike(backend: str) -> None:
    """Queries of zeros: the mean of the values, and the logarithm of their number."""
    case = attention((RAGGED,), window=((0, 12), (12, 12)))
    case.q.zero_()
    _, lse = case.check(backend)
    seen = torch.tensor([[50.0, 20.0], [20.0, 50.0]]) + torch.tensor([[12.0], [0.0]])  # of each head, and in the window
    torch.testing.assert_close(lse[:, :, 0].exp(), seen.repeat_interleave(4, 1), rtol=1e-5, atol=0.0)


def long() -> Attention:
    """Sequences of several thousand tokens and of a few, as many as kernels split among threads."""
    starts = tuple(range(0, 1281, 128))
    counts = ((128,) * 10, (128, 128, 77) + (0,) * 7, (1,) * 10, (0,) * 10)
    parts = (Part(4, starts, counts), Part(2, (0, 500, 900), ((500, 400), (0, 3), (0, 0), (500, 0))))
    window = ((0, 100), (5, 100), (99, 100), (0, 1))
    return attention(parts, batch=4, group=3, window=window, slots=100)


def alone(case: Attention, b: int) -> Attention:
    """One sequence of a batch."""

    def part(q: Quantized) -> Quantized:
        channels = None if q.channels is None else q.channels[b : b + 1]
        tensors = {"codes": q.codes[b : b + 1], "scales": q.scales[b : b + 1], "counts": q.counts[b : b + 1]}
        return dataclasses.replace(q, channels=channels, **tensors)

    segments = [(part(keys), part(values)) for keys, values in case.segments]
    tensors = (case.window_k, case.window_v, case.window)
    return Attention(case.q[b : b + 1], segments, *(t[b : b + 1] for t in tensors))


def with_room(q: Quantized, slots: int = 200, blocks: int = 9) -> Quantized:
    """The same tokens with room for others behind them, which is full of nonsense."""

    def grown(t: Tensor, more: int, filler: float) -> Tensor:
        return torch.cat((t, t.new_full((*t.shape[:2], more, *t.shape[3:]), filler)), 2)

    scales = grown(q.scales, blocks if q.axis == "channel" else slots, NAN)
    channels = None if q.channels is None else grown(q.channels, blocks, NAN)
    starts = torch.cat((q.starts, q.starts[-1:].expand(blocks)))
    return Quantized(grown(q.codes, slots, 0xCD), scales, channels, starts, grown(q.counts, blocks, 0), q.bits, q.axis)


@each_backend
@pytest.mark.parametrize("codec", CODECS)
def test_room_for_more_changes_nothing(backend: str, codec: str) -> None:
    for mix in ("ragged", "8, 4 and 2", "no slots"):
        case = attention(MIXES[mix], **CODECS[codec])
        segments = [(with_room(keys), with_room(values)) for keys, values in case.segments]
        out, lse = dataclasses.replace(case, segments=segments).call(backend)
        expected, sums = case.truth(backend)
        check_bounds(out, expected, mix)
        check_bounds(lse, sums, mix)
        if backend == "native":  # the CPU's, whose splits begin at fixed slots
            for a, b in zip((out, lse), case.call(backend), strict=True):
                assert_same_bits(a, b)


@each_backend
def test_long_sequences(backend: str) -> None:
    long().check(backend)


def test_a_sequence_knows_nothing_of_the_others() -> None:
    case = long()
    out, lse = case.call("native")
    for b in range(4):
        for whole, own in zip((out, lse), alone(case, b).call("native"), strict=True):
            assert_same_bits(own, whole[b : b + 1], f"sequence {b}")


@pytest.mark.serial
def test_the_same_bits_on_any_number_of_threads(each_thread_count: tuple[int, ...]) -> None:
    case, found = long(), []
    for count in each_thread_count:
        torch.set_num_threads(count)
        found += [case.call("native"), alone(case, 0).call("native")]
    for i, (out, lse) in enumerate(found):
        assert_same_bits(out, found[i % 2][0])
        assert_same_bits(lse, found[i % 2][1])


@each_backend
def test_the_order_of_blocks_hardly_matters(backend: str) -> None:
    """Sums in another order: both within their bounds, which have the same middle."""
    k, v = tokens((1, 2, 96, 64)), tokens((1, 2, 96, 64), seed=4)
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        picked = torch.cat([torch.arange(32 * i, 32 * i + 32) for i in order])
        keys = quantize(k[:, :, picked], 4, block=32)
        values = quantize(v[:, :, picked], 4, axis="token", block=32, channel_separable=True)
        case = attention((), batch=1, window=((0, 12),))
        case.segments = [(keys, values)]
        results.append((case.check(backend), case.truth(backend)))
    (first, (bound, _)), (second, (other, _)) = results
    np.testing.assert_allclose(bound.value, other.value, rtol=1e-12, atol=1e-15)
    assert bool(((first[0] - second[0]).abs().numpy() <= bound.stored("float32").error * 2).all())


@each_backend
def test_tokens_seen_in_pieces_add_up(backend: str) -> None:
    """Halves, each with its logarithm of the sum, merge to the whole: what lse is for."""
    case = attention((Part(4, (0, 40)), Part(2, (0, 30))))
    out, lse = case.call(backend)
    parts = [dataclasses.replace(case, segments=case.segments[:1], window=case.window * 0)]
    parts.append(dataclasses.replace(case, segments=case.segments[1:]))
    (a, a_sum), (b, b_sum) = (p.call(backend) for p in parts)
    torch.testing.assert_close(torch.logaddexp(a_sum, b_sum), lse, rtol=1e-5, atol=1e-5)
    merged = a * (a_sum - lse).exp()[..., None] + b * (b_sum - lse).exp()[..., None]
    torch.testing.assert_close(merged, out, rtol=1e-4, atol=1e-5)


def test_float64_runs_in_eager() -> None:
    case = attention()
    case.q, case.window_k, case.window_v = (t.double() for t in (case.q, case.window_k, case.window_v))
    out, _ = case.call("eager")
    np.testing.assert_allclose(out.numpy(), case.truth()[0].value, rtol=1e-11, atol=1e-13)


def _other(q: Quantized, **changes: Tensor | int | str) -> Quantized:
    return dataclasses.replace(q, **changes)


def test_errors() -> None:
    case = attention()
    (keys, values), second = case.segments
    for changes, text in (
        ({"q": case.q[:, :7]}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"q": case.q[..., :48]}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"q": case.q[:1]}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"q": case.q[0]}, r"q \(batch, heads, tokens, channels\)"),
        ({"q": case.q.long()}, r"a floating-point q; got torch.int64"),
        ({"window_k": case.window_k[..., :40]}, r"window_k of 16, 32, ..., 512 channels; got 40"),
        ({"window_v": case.window_v[:, :1]}, r"window_v \(2, 2, 12\) of torch.float32, as window_k"),
        ({"window_v": case.window_v[:, :, :5]}, r"window_v \(2, 2, 12\) of torch.float32, as window_k"),
        ({"window_v": case.window_v.half()}, r"window_v \(2, 2, 12\) of torch.float32, as window_k"),
        ({"window": case.window.long()}, r"int32 window of shape \(2, 2\) on cpu"),
        ({"window": case.window[:1]}, r"int32 window of shape \(2, 2\) on cpu; got \(1, 2\)"),
        ({"sinks": torch.zeros(2)}, r"float32 sinks of shape \(8,\) on cpu; got \(2,\)"),
        ({"sinks": torch.zeros(8).half()}, r"float32 sinks of shape \(8,\)"),
        ({"first": torch.zeros(1, 2, 2, dtype=torch.int32)}, r"int32 first of shape \(2, 2, 2\)"),
        ({"q": torch.zeros(2, 8, 13, 64)}, "at most 12 queries, as the window has slots; got 13"),
        ({"softcap": -1.0}, "softcap >= 0; got -1.0"),
        ({"softcap": NAN}, "softcap >= 0; got nan"),
        ({"softcap": "1"}, "softcap >= 0; got '1'"),
        ({"scale": NAN}, "scale as a number, or None; got nan"),
        ({"scale": "1"}, "scale as a number, or None; got '1'"),
        ({"segments": [(keys, keys)]}, 'values of axis "token"; got channel'),
        ({"segments": [(keys, second[1])]}, "values of 4 bits, as keys; got 2"),
        ({"segments": [(keys, values), (values, values)]}, "keys of one axis"),
        ({"segments": [(_other(keys, codes=keys.codes[:1]), values)]}, r"keys \(2, 2, 57, 64\), as the window's"),
        ({"segments": [(keys, _other(values, codes=values.codes[..., :16]))]}, r"values \(2, 2, 57, 64\)"),
        ({"segments": [(keys, _other(values, codes=values.codes[:, :, :9]))]}, r"values \(2, 2, 57, 64\)"),
        (
            {"segments": [(keys, _other(values, counts=values.counts[:, :, :0]))]},
            r"values in \d blocks, as keys; got 0",
        ),
    ):
        with pytest.raises(ValueError, match=f"decode_attention: expected {text}"):
            dataclasses.replace(case, **changes).call("eager")
    with pytest.raises(ValueError, match="backend among native, triton, eager"):
        case.call("cuda")
    with pytest.raises(RuntimeError, match=r"kernels take float32, bfloat16 and float16, not torch\.float64"):
        dataclasses.replace(case, q=case.q.double()).call("native")


def test_small_tensors_may_be_strided() -> None:
    case = attention()
    case.sinks, case.first = torch.randn(8, generator=generator(5)), torch.ones(2, 2, 2, dtype=torch.int32)
    want = case.call("native")
    for strided in (lambda t: torch.stack((t, t), -1)[..., 0], lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        its = {name: strided(getattr(case, name)) for name in ("window", "sinks", "first")}
        for got, part in zip(dataclasses.replace(case, **its).call("native"), want, strict=True):
            assert_same_bits(got, part)


@pytest.mark.parametrize("name", ["q", "window_k", "window_v", "sinks"])
def test_gradients_are_refused(name: str) -> None:
    case = attention()
    case.sinks = torch.zeros(8)
    changed = dataclasses.replace(case, **{name: getattr(case, name).clone().requires_grad_()})
    with pytest.raises(ValueError, match=f"decode_attention: expected {name} that needs no gradient"):
        changed.call("native")
    with torch.no_grad():
        changed.call("native")


def test_factors_of_other_blocks_are_refused() -> None:
    k = tokens((1, 2, 40, 32))
    keys, values = quantize(k, 4, block=20), quantize(k, 4, axis="token", block=30, channel_separable=True)
    window = torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"values whose blocks start at \[0, 20, 40\], as keys; got \[0, 30, 40\]"):
        decode_attention(k[:, :, :1], [(keys, values)], k[:, :, :1], k[:, :, :1], window)
