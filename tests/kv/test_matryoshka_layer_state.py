# SPDX-License-Identifier: Apache-2.0
"""The low-rank layer's cache: saving, other batches, dropped tokens, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from singlepass.kv import Codec, MatryoshkaLayer

from ..tolerances import assert_same_bits
from .layers import assert_same, drawn, part
from .matryoshka import bases, made


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


def test_wrong_numbers_and_beams_change_nothing() -> None:
    _, k, v = drawn(20)
    layer = made()
    layer.append(k, v)
    before = layer.state_dict()
    for call in (
        lambda: layer.select_sequences([2]),
        lambda: layer.select_sequences([]),
        lambda: layer.repeat_sequences(0),
        lambda: layer.drop_newest(0.5),
    ):
        with pytest.raises(ValueError, match="MatryoshkaLayer: expected"):
            call()
        assert_same(layer.state_dict(), before)
    with pytest.raises(ValueError, match="expected at least one sequence and one head"):
        made().append(k[:0], v[:0])


@pytest.mark.parametrize("bits", [None, (4, 2)], ids=str)
def test_saved_tensors_on_several_devices_are_refused(bits: Any) -> None:
    _, k, v = drawn(20)
    layer, other = made(bits=bits), made(bits=bits)
    layer.append(k, v)
    saved = layer.state_dict()
    saved["like"] = saved["like"][0].to("meta"), saved["like"][1]
    with pytest.raises(ValueError, match="load_state_dict: expected"):
        other.load_state_dict(saved)
    if bits is None:
        saved = layer.state_dict()
        saved["groups"][0]["v"] = saved["groups"][0]["v"].to("meta")
        with pytest.raises(ValueError, match="load_state_dict: expected"):
            other.load_state_dict(saved)
    assert other.length == 0
