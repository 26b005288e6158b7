# SPDX-License-Identifier: Apache-2.0
"""The low-rank layer against float64: any ranks, any shapes, with bits and without."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from singlepass._check import recorded
from singlepass.kv import Codec
from singlepass.reference.kv import rotated

from ..tolerances import assert_same_bits
from .inputs import generator
from .layers import assert_same, dense, drawn, part
from .matryoshka import RANKS, bases, check, made, truncated
from .test_projection import turns


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
