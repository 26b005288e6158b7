# SPDX-License-Identifier: Apache-2.0
"""The low-rank layer with a sliding window: what is seen, what is not held any more, and what can be removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..tolerances import assert_same_bits
from .layers import assert_same, dense, drawn, part
from .test_matryoshka_layer import bases, check, made, truncated

RANKS = ([16, 32], 16)
each_bits = pytest.mark.parametrize("bits", [None, 8], ids=str)


def kept(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return truncated(k, bases(2, 32), RANKS[0]), truncated(v, bases(2, 32, 1), RANKS[1])


@pytest.mark.parametrize("sliding", [1, 10, 33, 64])
@pytest.mark.parametrize("start", [0, 5, 90])
def test_token_by_token(sliding: int, start: int) -> None:
    """After no prompt, a short one and a long one, exactly the newest tokens are seen."""
    q, k, v = drawn(200)
    layer = made(ranks=RANKS, window=8, sliding_window=sliding)
    layer.prefill(*part((q, k, v), 0, start))
    for i in range(start, 200):
        layer.append(*part((k, v), i, i + 1))
        if i % 7 == 0:
            newest, so_far = q[:, :, i : i + 1], part(kept(k, v), 0, i + 1)
            check(layer.attend(newest), dense(newest, *so_far, oldest=i + 1 - sliding), newest, k, v)
    seen = (torch.arange(200) >= 200 - sliding).expand(2, -1)
    assert torch.equal(layer.token_mask(), seen)
    for x, want in zip(layer.dequantize(), kept(k, v), strict=True):
        assert torch.equal(x.abs().amax((1, 3)) > 0, seen)
        torch.testing.assert_close(x[:, :, 200 - sliding :].double(), want[:, :, 200 - sliding :], rtol=0.0, atol=1e-5)


@each_bits
def test_memory_does_not_grow(bits: Any) -> None:
    """It stays that of the tokens that are seen and a third more, and of a window."""
    q, k, v = drawn(1500, batch=1)
    layer = made(ranks=RANKS, bits=bits, window=16, sliding_window=128)
    layer.prefill(*part((q, k, v), 0, 300))
    layer.append(*part((k, v), 300, 301))
    sizes = []
    for i in range(301, 1500):
        layer.append(*part((k, v), i, i + 1))
        sizes.append(layer.nbytes)
    assert (layer.length, layer.token_mask().shape) == (1500, (1, 1500))
    if bits is None:
        row = 4 * (16 + 32 + 16 + 16)
        assert row * 128 < max(sizes) < row * (128 + 33) * 1.6  # room grows by half
    assert max(sizes[600:]) <= 1.1 * max(sizes[:600])


@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize("queries", [1, 6])
def test_softcap_and_sinks(queries: int, softcap: float, with_sinks: bool) -> None:
    q, k, v = drawn(80)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    layer = made(ranks=RANKS, softcap=softcap, window=8, sliding_window=24)
    layer.store(None, *part((k, v), 0, 60))
    layer.append(*part((k, v), 60, 80))
    keys, values = (x.repeat_interleave(2, 1) for x in kept(k, v))
    logits = q[:, :, 80 - queries :].double() @ keys.mT * 32**-0.5
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    rows, columns = torch.arange(80 - queries, 80)[:, None], torch.arange(80)
    logits = logits.masked_fill((columns > rows) | (columns <= rows - 24), -torch.inf)
    column = torch.full((*logits.shape[:3], 1), -torch.inf).double()
    if sinks is not None:
        column[:] = sinks[:, None, None]
    want = torch.cat((logits, column), 3).softmax(3)[..., :80] @ values
    got = layer.attend(q[:, :, 80 - queries :], sinks=sinks)
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=1e-5)


@each_bits
def test_prompts_after_prompts(bits: Any) -> None:
    """Longer and shorter than the window."""
    q, k, v = drawn(300)
    layer = made(ranks=RANKS, bits=bits, window=16, sliding_window=33, prefill="truncated")
    begin = 0
    for end in (10, 90, 91, 100, 300):
        got = layer.prefill(*part((q, k, v), begin, end))
        so_far = part(kept(k, v), 0, end)
        for i in (begin, (begin + end) // 2, end - 1):
            want = dense(q[:, :, i : i + 1], *part(so_far, 0, i + 1), oldest=i + 1 - 33)
            error = (got[:, :, i - begin : i - begin + 1].double() - torch.from_numpy(want)).abs().max()
            assert error < (1e-5 if bits is None else 0.03)
        begin = end


def test_what_can_be_removed_is_what_leaves_nothing_missing() -> None:
    """After removing as many as are offered, the next token sees all that it would."""
    q, k, v = drawn(150)
    for length in range(30, 150, 7):
        layer = made(ranks=RANKS, window=8, sliding_window=32)
        layer.prefill(*part((q, k, v), 0, 20))
        for i in range(20, length):
            layer.append(*part((k, v), i, i + 1))
        most = layer.window_length
        with pytest.raises(ValueError, match=f"0 to {most} tokens"):
            layer.drop_newest(most + 1)
        layer.drop_newest(most)
        left = length - most
        layer.append(*part((k, v), left, left + 1))
        newest, so_far = q[:, :, left : left + 1], part(kept(k, v), 0, left + 1)
        check(layer.attend(newest), dense(newest, *so_far, oldest=left + 1 - 32), newest, k, v)


def test_room_for_tokens_to_be_removed_again() -> None:
    _, k, v = drawn(150)
    layer = made(ranks=RANKS, window=8, sliding_window=32)
    for i in range(20):
        layer.append(*part((k, v), 7 * i, 7 * i + 2))
        layer.make_room(5)
        for j in range(5):
            layer.append(*part((k, v), 7 * i + 2 + j, 7 * i + 3 + j))
        assert layer.window_length >= 5


def test_padding_that_ends_and_is_saved() -> None:
    tensors = drawn(160, batch=3)
    mask = torch.arange(50) >= torch.tensor([[0], [20], [45]])
    options: dict[str, Any] = {"ranks": RANKS, "window": 8, "sliding_window": 40}
    layer, other = made(**options), made(**options)
    layer.prefill(*part(tensors, 0, 50), mask)
    for i in range(50, 160):
        q, k, v = part(tensors, i, i + 1)
        layer.append(k, v, torch.tensor([[True], [True], [i < 70]]))
        got = layer.attend(q)
        if i % 10 == 0:
            want = dense(q, *layer.dequantize(), None, i + 1 - 40, layer.token_mask())
            torch.testing.assert_close(got[:2].double(), torch.from_numpy(want)[:2], rtol=1e-4, atol=1e-5)
    before = layer.attend(tensors[0][:, :, 159:])
    layer.hide(layer.token_mask())  # nothing more
    assert_same_bits(layer.attend(tensors[0][:, :, 159:]), before)
    saved = layer.state_dict()
    other.load_state_dict(saved)
    assert_same(other.state_dict(), saved)
    assert_same_bits(other.attend(tensors[0][:, :, 159:]), before)
    with pytest.raises(ValueError, match=r"the options \{[^,]*\}; got \{[^,]*\}\. Load it into a cache made with"):
        made(ranks=RANKS, window=8).load_state_dict(saved)
    for wrong in (-1, 1.5, None):
        groups = [group | {"forgotten": wrong} for group in saved["groups"]]
        with pytest.raises(ValueError, match="a number of forgotten tokens"):
            other.load_state_dict(saved | {"groups": groups})
        assert_same(other.state_dict(), saved)
    for wrong in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="sliding_window as a whole number, 1 or more, or None"):
            made(sliding_window=wrong)


@each_bits
def test_hidden_tokens_do_not_come_back_when_newer_ones_are_removed(bits: Any) -> None:
    """Nor for a query that is not the newest."""
    q, k, v = drawn(40)
    layer = made(ranks=RANKS, bits=bits, window=40, sliding_window=5)
    layer.append(*part((k, v), 0, 40))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, -9:] = False
    layer.hide(mask)
    if bits is None:
        assert not layer.attend(q[:, :, :3])[0].any()
    layer.drop_newest(3)
    assert torch.equal(layer.token_mask(), torch.arange(37).ge(32).expand(2, -1) & mask[:, :37])
    assert not layer.attend(q[:, :, :1])[0].any()
