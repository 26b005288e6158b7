# SPDX-License-Identifier: Apache-2.0
"""The low-rank layer against float64: any ranks, any shapes, with bits and without, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singlepass._check import recorded
from singlepass.kv import Codec, MatryoshkaLayer
from singlepass.reference.kv import rotated

from ..tolerances import assert_same_bits
from .inputs import generator
from .layers import assert_same, dense, drawn, part
from .test_projection import turns


def bases(heads: int, width: int, seed: int = 0) -> Tensor:
    """Orthogonal matrices of so many heads."""
    return torch.linalg.qr(torch.randn(heads, width, width, generator=generator(seed), dtype=torch.float64)).Q.float()


def made(
    heads: int = 2, width: int = 32, value_width: int | None = None, ranks: tuple[Any, Any] = (16, 32), **options: Any
) -> MatryoshkaLayer:
    keys, values = bases(heads, width), bases(heads, value_width or width, 1)
    return MatryoshkaLayer(keys, values, key_ranks=ranks[0], value_ranks=ranks[1], **options)


def truncated(x: Tensor, matrices: Tensor, ranks: Any) -> Tensor:
    """What a cache keeps of x (batch, heads, tokens, channels), float64."""
    kept = torch.arange(x.shape[3]) < torch.as_tensor(ranks).expand(x.shape[1])[:, None]
    u = matrices.double() * kept[:, None]
    return x.double() @ u @ u.mT


def check(out: Tensor, want: np.ndarray, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Within roundings of as many additions as products of vectors and sums over tokens have, where a logit's error is
    one of its weight, and what is turned by a basis is rounded once more."""
    additions = 2 * q.shape[3] + v.shape[3] + k.shape[2] + 16
    logit = float(q.double().norm(dim=3).max() * k.double().norm(dim=3).max()) * q.shape[3] ** -0.5
    bound = additions * torch.finfo(q.dtype).eps * (1 + logit) * float(v.double().norm(dim=3).max())
    assert np.abs(out.double().numpy() - want).max() < bound


RANKS = {
    "uniform": (16, 32),
    "full": (32, 32),
    "ragged": ([16, 32, 16, 32], [16, 16, 32, 16]),
    "low-beside-full": ([16, 32, 32, 32], [32, 32, 16, 32]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("ranks", list(RANKS))
def test_attention_is_that_of_what_is_kept(ranks: str, group: int, dtype: torch.dtype) -> None:
    q, k, v = drawn(40, heads=4, group=group, dtype=dtype)
    layer = made(4, ranks=RANKS[ranks])
    layer.prefill(*part((q, k, v), 0, 30))
    layer.append(*part((k, v), 30, 40))
    kept = truncated(k, bases(4, 32), RANKS[ranks][0]), truncated(v, bases(4, 32, 1), RANKS[ranks][1])
    for queries in (1, 10):
        newest = q[:, :, 40 - queries :]
        check(layer.attend(newest), dense(newest, *kept), newest, k, v)
    for got, want in zip(layer.dequantize(), kept, strict=True):
        error = (got.double() - want).abs().max()
        assert error < 8 * torch.finfo(dtype).eps * float(want.norm(dim=3).max()), error


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 64), (256, 256), (16, 48)])
def test_head_dims(width: int, value_width: int) -> None:
    q, k, v = drawn(30, width=width, value_width=value_width)
    ranks = ([16, width], [value_width, 16])
    layer = made(width=width, value_width=value_width, ranks=ranks)
    layer.append(k, v)
    kept = truncated(k, bases(2, width), ranks[0]), truncated(v, bases(2, value_width, 1), ranks[1])
    check(layer.attend(q), dense(q, *kept), q, k, v)


@pytest.mark.parametrize("bits", [None, (4, 2)])
@pytest.mark.parametrize("ranks", ["uniform", "ragged"])
def test_rotary_embeddings_within(ranks: str, bits: Any) -> None:
    """Keys and queries rotated on the way are what those rotated before are, but for the rounding of one."""
    q, k, v = drawn(40, heads=4, dtype=torch.float32)
    rotary = turns(k, 24)
    first, last = ([t[:, part] for t in rotary] for part in (slice(0, 30), slice(30, 40)))
    within, before = (made(4, ranks=RANKS[ranks], bits=bits, window=16) for _ in range(2))
    turned = [rotated(x, *rotary) for x in (q, k)]
    within.store(turned[0][:, :, :30], *part((k, v), 0, 30), rotary=first)
    within.append(*part((k, v), 30, 40), rotary=last)
    before.store(*part((*turned, v), 0, 30))
    before.append(*part((turned[1], v), 30, 40))
    outs = within.attend(q[:, :, 30:], rotary=last), before.attend(turned[0][:, :, 30:])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4 if bits is None else 2e-2)
    assert_same(within.dequantize()[1], before.dequantize()[1])
    with pytest.raises(ValueError, match=r"rotary \(1 or 2, 1, up to 32 channels\)"):
        within.append(*part((k, v), 0, 1), rotary=rotary)
    assert within.length == 40


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_new_tokens_are_written_where_they_stay(bits: Any) -> None:
    """One op projects and stores them, as long as the window has room."""
    _, k, v = drawn(20)
    layer = made(bits=bits, window=16)
    layer.append(*part((k, v), 0, 10))
    layer.append(*part((k, v), 10, 11))  # which makes room for more
    room = [t.data_ptr() for t in layer.tensors()]
    with recorded() as ran, torch.profiler.profile() as profile:
        layer.append(*part((k, v), 11, 12))
    assert ran == {("kv_project_", "native")}
    assert [t.data_ptr() for t in layer.tensors()] == room
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["singlepass::kv_project_"] == 1
    assert not {"aten::copy_", "aten::matmul", "aten::empty"} & set(counts)


def test_more_ranks_keep_more() -> None:
    _, k, v = drawn(50, width=64)
    errors = []
    for rank in (16, 32, 48, 64):
        layer = made(width=64, ranks=(rank, rank))
        layer.append(k, v)
        errors.append([float((got - x).norm()) for got, x in zip(layer.dequantize(), (k, v), strict=True)])
    assert all(a > b for more, less in itertools.pairwise(errors) for a, b in zip(more, less, strict=True))
    assert max(errors[-1]) < 1e-4


@pytest.mark.parametrize("prefill", ["full", "truncated"])
@pytest.mark.parametrize("bits", [None, 8, (4, 2)])
def test_what_a_prompt_attends_to(prefill: str, bits: Any) -> None:
    q, k, v = drawn(60, heads=2)
    layer = made(ranks=([16, 32], 16), prefill=prefill, bits=bits)
    kept = truncated(k, bases(2, 32), [16, 32]), truncated(v, bases(2, 32, 1), 16)
    seen = (k, v) if prefill == "full" else kept
    first = part((q, k, v), 0, 40)
    check(layer.prefill(*first), dense(first[0], *part(seen, 0, 40)), *first)
    before = layer.dequantize()
    later = part((q, k, v), 40, 60)
    out = layer.prefill(*later)
    keys, values = (torch.cat((x, y[:, :, 40:]), 2) for x, y in zip(before, seen, strict=True))
    check(out, dense(later[0], keys, values), later[0], keys, values)


@pytest.mark.parametrize("ranks", ["uniform", "ragged"])
@pytest.mark.parametrize("codec", [Codec.zipcache(16), Codec.per_token_head(rotate=True)], ids=["zipcache", "rotated"])
@pytest.mark.parametrize("bits", [8, 4, (4, 2), (8, 4)], ids=str)
def test_bits(bits: Any, codec: Codec, ranks: str) -> None:
    """Attention is that over what is kept, after every step; the codes are close to what was projected."""
    q, k, v = drawn(90, heads=4)
    layer = made(4, ranks=RANKS[ranks], bits=bits, codec=codec, window=16)
    layer.prefill(*part((q, k, v), 0, 50))
    for i in range(50, 90):
        layer.append(*part((k, v), i, i + 1))
        newest = q[:, :, i : i + 1]
        check(layer.attend(newest), dense(newest, *layer.dequantize()), newest, *part((k, v), 0, i + 1))
    wanted = truncated(k, bases(4, 32), RANKS[ranks][0]), truncated(v, bases(4, 32, 1), RANKS[ranks][1])
    allowed = {8: 0.01, 4: 0.12, (4, 2): 0.5, (8, 4): 0.12}[bits]  # steps of 1/255, 1/15 and 1/3 of a range
    for got, want in zip(layer.dequantize(), wanted, strict=True):
        assert (got - want).norm() < allowed * want.norm()
    assert layer.window_length == (90 - 50) % 16


def test_bytes_are_those_of_the_ranks() -> None:
    _, k, v = drawn(64, heads=4, batch=3, dtype=torch.bfloat16)
    ragged, full = made(4, ranks=RANKS["ragged"]), made(4, ranks=(32, 32))
    for layer in (ragged, full):
        layer.append(k, v)
    assert ragged.nbytes == 3 * 64 * 2 * (16 + 32 + 16 + 32 + 16 + 16 + 32 + 16)
    assert full.nbytes == k.nbytes + v.nbytes
    assert (ragged.kept_channels, ragged.all_channels) == (176, 256)
    small = made(4, ranks=(16, 16), bits=(4, 2), window=8)
    small.prefill(k.repeat_interleave(2, 1), k, v)
    assert small.nbytes < full.nbytes / 4


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_padding_ended_sequences_and_a_next_turn(bits: Any) -> None:
    """A batch gives what each of its sequences gives alone."""
    q, k, v = drawn(40, batch=2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False  # on the left
    mask[1, 25:30] = False  # after its end
    layer = made(ranks=([16, 32], 16), bits=bits, window=8)
    layer.prefill(*part((q, k, v), 0, 20), mask[:, :20])
    for i in range(20, 30):
        layer.append(*part((k, v), i, i + 1), mask[:, i : i + 1])
    layer.prefill(*part((q, k, v), 30, 40), mask[:, 30:])
    assert_same_bits(layer.token_mask(), mask)
    assert layer.holds_padding
    out = layer.attend(q[:, :, 39:])
    keys, values = layer.dequantize()
    check(out, dense(q[:, :, 39:], keys, values, mask=mask), q[:, :, 39:], k, v)
    if bits is None:
        alone = made(ranks=([16, 32], 16))
        alone.append(*(x[1:, :, mask[1]] for x in (k, v)))
        want = alone.attend(q[1:, :, 39:]).double().numpy()
        check(out[1:], want, q[1:, :, 39:], k[1:], v[1:])


@pytest.mark.parametrize("ranks", [(16, 16), (16, 32)])
@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_a_sequence_of_padding_alone_gives_zeros(bits: Any, ranks: tuple[int, int]) -> None:
    q, k, v = drawn(20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    layer = made(ranks=ranks, bits=bits)
    out = layer.prefill(q, k, v, mask)
    for its in (out, layer.attend(q[:, :, 19:])):
        assert bool((its[1] == 0).all())
        assert its[0].isfinite().all()
        assert float(its[0].norm()) > 0.1


def test_hidden_tokens_are_not_seen() -> None:
    q, k, v = drawn(20)
    layer = made()
    layer.append(k, v)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 15:] = False
    layer.hide(mask)
    kept = truncated(k, bases(2, 32), 16), truncated(v, bases(2, 32, 1), 32)
    check(layer.attend(q[:, :, 19:]), dense(q[:, :, 19:], *kept, mask=mask), q[:, :, 19:], k, v)
    mask[0, 10] = False
    mask[0, 12] = True
    with pytest.raises(ValueError, match="a mask that hides the newest tokens; got others"):
        layer.hide(mask & (torch.arange(20) != 11))


def test_softcap_and_sinks() -> None:
    q, k, v = drawn(30, heads=2)
    sinks = torch.randn(4, generator=generator(3))
    layer = made(ranks=([32, 16], 32), softcap=2.0, scale=0.3)
    layer.append(k, v)
    kept, v = truncated(k, bases(2, 32), [32, 16]), v.double()
    logits = 2.0 * torch.tanh(0.3 * (q[:, :, 29:].double() @ kept.repeat_interleave(2, 1).mT) / 2.0)
    column = sinks.double().reshape(1, 4, 1, 1).expand(2, 4, 1, 1)
    weights = torch.cat((logits, column), 3).softmax(3)[..., :-1]
    want = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(layer.attend(q[:, :, 29:], sinks=sinks).double(), want, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_batch_and_length(bits: Any) -> None:
    q, k, v = drawn(30, batch=3)
    layer = made(ranks=([16, 32], 16), bits=bits)
    layer.prefill(*part((q, k, v), 0, 20))
    layer.append(*part((k, v), 20, 30))
    before = layer.attend(q[:, :, 29:])
    layer.select_sequences([2, 0])
    assert layer.batch == 2
    torch.testing.assert_close(layer.attend(q[[2, 0], :, 29:]), before[[2, 0]])
    layer.repeat_sequences(2)
    torch.testing.assert_close(layer.attend(q[[2, 2, 0, 0], :, 29:]), before[[2, 2, 0, 0]])
    layer.drop_newest(4)
    assert layer.length == 26
    layer.append(*(x[[2, 2, 0, 0], :, 26:] for x in (k, v)))
    torch.testing.assert_close(layer.attend(q[[2, 2, 0, 0], :, 29:]), before[[2, 2, 0, 0]])
    layer.reset()
    assert (layer.length, layer.nbytes, layer.batch) == (0, 0, None)


@pytest.mark.parametrize("bits", [None, 8, (4, 2)])
def test_saving(bits: Any) -> None:
    q, k, v = drawn(40)
    options: dict[str, Any] = {"ranks": ([16, 32], 16), "bits": bits, "window": 8}
    layer, other = made(**options), made(**options)
    layer.prefill(*part((q, k, v), 0, 25))
    layer.append(*part((k, v), 25, 30))
    saved = layer.state_dict()
    other.load_state_dict(saved)
    for i in range(30, 40):
        outs = []
        for its in (layer, other):
            its.append(*part((k, v), i, i + 1))
            outs.append(its.attend(q[:, :, i : i + 1]))
        assert_same_bits(*outs)
    assert_same(layer.state_dict(), other.state_dict())
    empty = made(**options)
    empty.load_state_dict(made(**options).state_dict())
    assert empty.length == 0
    before = other.state_dict()
    wrong = [
        {},
        saved | {"length": 31},
        saved | {"groups": saved["groups"][:1]},
        saved | {"like": None},
        saved | {"like": (k, v)},
        saved | {"options": saved["options"] | {"bases": "others"}},
        made(**(options | {"ranks": (16, 16)})).state_dict(),
    ]
    for state in wrong:
        with pytest.raises(ValueError, match="load_state_dict: expected"):
            other.load_state_dict(state)
        assert_same(other.state_dict(), before)


def test_it_outlives_inference_mode() -> None:
    q, k, v = drawn(20)
    layer = made()
    with torch.inference_mode():
        layer.prefill(*part((q, k, v), 0, 10))
    layer.append(*part((k, v), 10, 20))
    layer.drop_newest(1)
    assert layer.attend(q[:, :, 18:19]).isfinite().all()


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_nan_in_padding_reaches_no_token(bits: Any) -> None:
    q, k, v = drawn(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :9] = mask[1, 25:] = False
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
    found = []
    for its in ((k, v), dirty):
        layer = made(ranks=([16, 32], 16), bits=bits, window=8)
        outs = [layer.prefill(q[:, :, :20], *part(its, 0, 20), mask[:, :20])]
        for i in range(20, 30):
            layer.append(*part(its, i, i + 1), mask[:, i : i + 1])
            outs.append(layer.attend(q[:, :, i : i + 1]))
        found.append([*outs, *layer.dequantize()])
    for clean, other in zip(*found, strict=True):
        assert_same_bits(other, clean)


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_nothing_and_what_is_left_of_it(bits: Any) -> None:
    """No queries, no tokens, all removed, and saved like that; masks and ranks that the caller changes later."""
    q, k, v = drawn(12)
    ranks = torch.tensor([16, 32])
    layer = made(ranks=(ranks, 16), bits=bits)
    ranks[0] = 32
    assert layer.prefill(*part((q, k, v), 0, 0)).shape == (2, 4, 0, 32)
    layer.append(*part((k, v), 0, 0))
    layer.append(k, v)
    assert layer.attend(q[:, :, :0]).shape == (2, 4, 0, 32)
    layer.token_mask()[:] = False
    assert bool(layer.token_mask().all())
    layer.drop_newest(12)
    other = made(ranks=([16, 32], 16), bits=bits)
    other.load_state_dict(layer.state_dict())
    other.append(k, v)
    assert other.length == 12


def test_copies_outlive_inference_mode() -> None:
    q, k, v = drawn(20)
    layer = made()
    with torch.inference_mode():
        layer.append(*part((k, v), 0, 10))
        layer.append(*part((k, v), 10, 11))
        other = copy.deepcopy(layer)
        other.append(*part((k, v), 11, 12))
    other.append(*part((k, v), 12, 13))
    assert (layer.length, other.length) == (11, 13)
    assert other.attend(q[:, :, 12:13]).isfinite().all()


U = bases(2, 32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"key_ranks": 24}, "2 ranks of keys among 16, 32, ..., 32; got"),
    "rank-0": ({"value_ranks": 0}, "2 ranks of values among"),
    "too-many": ({"key_ranks": [16, 16, 16]}, "2 ranks of keys among"),
    "too-high": ({"value_ranks": 48}, "2 ranks of values among"),
    "no-ranks": ({"key_ranks": 16.0}, "2 ranks of keys among"),
    "skewed": ({"key_bases": U * 1.1}, "orthogonal key_bases; got"),
    "nan": ({"value_bases": U * torch.nan}, "orthogonal value_bases; got"),
    "narrow": ({"key_bases": U[:, :, :16]}, r"key_bases \(heads, channels, channels\)"),
    "no-tensor": ({"key_bases": [1]}, "a tensor key_bases"),
    "per-query-head": ({"value_bases": bases(4, 32)}, "value_bases of 2 heads, as keys; got 4. Pass one for each KV"),
    "bits": ({"bits": 3}, "bits None, 8, 4, 2 or a pair"),
    "bits-order": ({"bits": (2, 4)}, "bits None, 8, 4, 2 or a pair"),
    "prefill": ({"prefill": "all"}, "'full' or 'truncated'"),
    "window": ({"window": 0}, "window as a whole number"),
    "ratio": ({"salient_ratio": 2.0}, "salient_ratio from 0 to 1"),
    "codec": ({"bits": 4, "codec": Codec.kivi(32)}, "a value_group that divides 16 channels"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_options_are_refused(case: str) -> None:
    options, contract = BAD[case]
    good: dict[str, Any] = {"key_bases": U, "value_bases": U, "key_ranks": 16, "value_ranks": 16}
    with pytest.raises(ValueError, match=contract):
        MatryoshkaLayer(**(good | options))


def test_bad_tokens_change_nothing() -> None:
    q, k, v = drawn(20)
    layer = made()
    with pytest.raises(ValueError, match="cached tokens; got an empty cache"):
        layer.attend(q[:, :, :1])
    layer.append(*part((k, v), 0, 10))
    before = layer.state_dict()
    wrong_calls = [
        lambda: layer.append(k[..., :16], v),
        lambda: layer.append(k[:, :1], v[:, :1]),
        lambda: layer.append(k[:1], v[:1]),
        lambda: layer.append(k.double(), v.double()),
        lambda: layer.append(k, v, torch.ones(2, 19, dtype=torch.bool)),
        lambda: layer.append(k.requires_grad_(), v),
        lambda: layer.prefill(q[:, :, 1:], k.detach(), v),
        lambda: layer.prefill(q[:, :3], k.detach(), v),
        lambda: layer.attend(q[:, :, :11]),
        lambda: layer.attend(q[:, :, :1].double()),
        lambda: layer.drop_newest(11),
        lambda: layer.select_sequences([[0]]),
        lambda: layer.hide(torch.ones(2, 9, dtype=torch.bool)),
    ]
    for call in wrong_calls:
        with pytest.raises(ValueError, match="expected"):
            call()
        assert_same(layer.state_dict(), before)
    fresh = made()
    with pytest.raises(ValueError, match=r"k \(batch, 2, tokens, 32\), as the bases"):
        fresh.append(*drawn(5, heads=4)[1:])
    assert fresh.length == 0
