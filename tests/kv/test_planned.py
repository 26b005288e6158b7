# SPDX-License-Identifier: Apache-2.0
"""Planned steps: what other steps give, with lengths on the device, and never the same memory for other things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counting.host import COPIES, HostOps
from singlepass.kv import MatryoshkaLayer, ZipCacheLayer

from ..tolerances import assert_same_bits
from .layers import assert_same, drawn, part, stream
from .test_matryoshka_layer import made
from .test_reserved import LAYERS, Layer, addresses, each_layer


def planned(layer: Layer, q: Tensor, k: Tensor, v: Tensor, tokens: int = 1) -> list[Tensor]:
    """As stream, so many tokens at a time."""
    outs = []
    for i in range(0, k.shape[2], tokens):
        with layer.planned(tokens):
            layer.append(*part((k, v), i, i + tokens))
            outs.append(layer.attend(q[:, :, i : i + tokens]))
    return outs


def whole(layer: Layer) -> bool:
    """Whether it keeps the dtype of tokens, to which PyTorch's attention attends in steps that are not planned."""
    return isinstance(layer, MatryoshkaLayer) and layer.bits is None


@each_layer
def test_they_give_what_other_steps_give(name: str) -> None:
    q, k, v = drawn(120)
    layer, other = LAYERS[name](max_tokens=120), LAYERS[name]()
    for its in (layer, other):
        its.prefill(*part((q, k, v), 0, 30))
        stream(its, *part((q, k, v), 30, 35))  # into the window
    held = addresses(layer)
    for a, b in zip(planned(layer, *part((q, k, v), 35, 110)), stream(other, *part((q, k, v), 35, 110)), strict=True):
        if whole(layer):
            torch.testing.assert_close(a, b)
        else:
            assert_same_bits(a, b)
    assert held <= addresses(layer), "the rows of probes came with the first step"
    for its in (layer, other):
        stream(its, *part((q, k, v), 110, 120))
    assert layer.length == other.length == 120
    for a, b in zip(layer.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("tokens", [2, 3, 16])
def test_several_tokens(tokens: int) -> None:
    q, k, v = drawn(240)
    layers = [ZipCacheLayer(max_tokens=240, window=48), ZipCacheLayer(window=48)]
    for its in layers:
        its.prefill(*part((q, k, v), 0, 96))
    new = part((q, k, v), 96, 240)
    outs = planned(layers[0], *new, tokens=tokens)
    for i, out in zip(range(0, 144, tokens), outs, strict=True):
        layers[1].append(*part(new[1:], i, i + tokens))
        assert_same_bits(out, layers[1].attend(new[0][:, :, i : i + tokens]))
    for a, b in zip(*(its.dequantize() for its in layers), strict=True):
        assert_same_bits(a, b)


@each_layer
def test_tokens_are_removed_and_sequences_change_between_them(name: str) -> None:
    q, k, v = drawn(100)
    layer, other = LAYERS[name](max_tokens=100), LAYERS[name]()
    for its, run in ((layer, planned), (other, stream)):
        its.prefill(*part((q, k, v), 0, 30))
        run(its, *part((q, k, v), 30, 40))
        its.drop_newest(3)
        its.select_sequences([1, 0])
        run(its, *part((q, k, v), 40, 70))
        its.repeat_sequences(2)
        run(its, *(x.repeat_interleave(2, 0) for x in part((q, k, v), 70, 100)))
    for a, b in zip(layer.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a, b)


@each_layer
def test_padding_before_them(name: str) -> None:
    q, k, v = drawn(100)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    layer, other = LAYERS[name](max_tokens=100), LAYERS[name]()
    for its in (layer, other):
        its.prefill(*part((q, k, v), 0, 40), mask)
    for a, b in zip(planned(layer, *part((q, k, v), 40, 100)), stream(other, *part((q, k, v), 40, 100)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(layer.token_mask(), other.token_mask())


def test_padding_in_the_window_is_compressed_before_and_elsewhere_refused() -> None:
    q, k, v = drawn(60)
    shown = torch.tensor([[True], [False]])
    compressed, kept = ZipCacheLayer(max_tokens=60), made(max_tokens=60)
    for layer in (compressed, kept):
        layer.prefill(*part((q, k, v), 0, 20))
        layer.append(*part((k, v), 20, 21), shown)
    planned(compressed, *part((q, k, v), 21, 30))
    assert compressed.window_length == 9
    with pytest.raises(ValueError, match=r"MatryoshkaLayer\.planned: expected sequences without padding after their"):
        planned(kept, *part((q, k, v), 21, 22))
    assert (kept.length, kept._planned) == (21, 0)


class EndedEarlyError(Exception):
    """What ends a step."""


def end_early(layer: Layer, new: tuple[Tensor, ...] | None) -> None:
    """A step that fails, after it has added tokens or before."""
    with layer.planned():
        if new is not None:
            layer.append(*new)
        raise EndedEarlyError


@each_layer
@pytest.mark.parametrize("appended", [False, True])
def test_a_step_that_fails_was_none(name: str, appended: bool) -> None:
    q, k, v = drawn(60)
    layer, other = LAYERS[name](max_tokens=60), LAYERS[name](max_tokens=60)
    for its in (layer, other):
        its.prefill(*part((q, k, v), 0, 20))
        planned(its, *part((q, k, v), 20, 30))
    with pytest.raises(EndedEarlyError):
        end_early(layer, part((k, v), 50, 51) if appended else None)
    for a, b in zip(*(planned(its, *part((q, k, v), 30, 60)) for its in (layer, other)), strict=True):
        assert_same_bits(a, b)


@each_layer
def test_they_read_and_move_nothing_of_the_host(name: str) -> None:
    """Besides, what they call does not change from step to step, but where the window is compressed before."""
    q, k, v = drawn(80)
    layer = LAYERS[name](max_tokens=80)
    layer.prefill(*part((q, k, v), 0, 30))
    planned(layer, *part((q, k, v), 30, 31))
    calls, places = [], []
    for i in range(31, 80):
        with layer.planned(), HostOps() as ops:
            layer.append(*part((k, v), i, i + 1))
            layer.attend(q[:, :, i : i + 1])
        assert ops.count(*COPIES) == 0
        calls.append((ops.aten, ops.own))
        places.append(addresses(layer))
    assert calls == calls[:1] * len(calls)
    assert places == places[:1] * len(places)


def test_ends_behind_padding_are_read_once() -> None:
    """Where ranks differ, attention needs to know where tokens begin and end."""
    q, k, v = drawn(60)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    for options in ({"ranks": (16, 32)}, {"softcap": 5.0}):
        layer = made(**options)
        layer.prefill(*part((q, k, v), 0, 40), mask)
        stream(layer, *part((q, k, v), 40, 41))
        with HostOps():  # which raises where values are read
            stream(layer, *part((q, k, v), 41, 60))


# What is refused


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=message)


@each_layer
def test_what_can_not_be_planned(name: str) -> None:
    q, k, v = drawn(40)
    layer = LAYERS[name](max_tokens=40)
    where = r"(ZipCacheLayer|MatryoshkaLayer)\.planned: expected "
    with raises("expected cached tokens; got an empty cache"), layer.planned():
        pass
    layer.prefill(*part((q, k, v), 0, 35))
    for tokens in (0, 17, 1.0, True):
        with raises(where + "1 to 16 tokens; got"), layer.planned(tokens):
            pass
    with raises(where + "at most 40 tokens; got 41"), layer.planned(6):
        pass
    grows = LAYERS[name]()
    grows.prefill(*part((q, k, v), 0, 35))
    with raises(where + "a cache with max_tokens; got one that grows"), grows.planned():
        pass
    assert layer.length == grows.length == 35


def test_a_window_too_small_and_a_cache_that_saw_no_queries() -> None:
    q, k, v = drawn(20)
    layer = ZipCacheLayer(max_tokens=40, window=4)
    layer.store(None, *part((k, v), 0, 20))
    with raises("expected a cache that has seen queries, as many heads of them; got none"), layer.planned():
        pass
    layer.prefill(*part((q, k, v), 0, 1))
    with raises("expected at most the window's 4 tokens; got 5"), layer.planned(5):
        pass
    assert layer.length == 21


def test_room_that_would_have_to_grow() -> None:
    """Tokens without queries count as salient, for which there is no room."""
    q, k, v = drawn(100)
    layer = ZipCacheLayer(0.1, max_tokens=100, window=16)
    layer.prefill(*part((q, k, v), 0, 40))
    layer.append(*part((k, v), 40, 56))
    before = layer.state_dict()
    with raises("expected tokens that fit in the room for max_tokens=100; got more blocks"), layer.planned():
        pass
    assert layer.length == 56
    assert torch.equal(layer.state_dict()["window_k"], before["window_k"])


@each_layer
def test_what_has_no_place_in_a_step(name: str) -> None:
    q, k, v = drawn(40)
    layer = LAYERS[name](max_tokens=40)
    layer.prefill(*part((q, k, v), 0, 20))
    saved = layer.state_dict()
    with raises("expected the 1 tokens that were planned; got 2"), layer.planned():
        layer.append(*part((k, v), 20, 22))
    with raises("expected a planned step of tokens alone; got a mask"), layer.planned():
        layer.append(*part((k, v), 20, 21), torch.ones(2, 1, dtype=torch.bool))
    with raises("expected the 1 tokens that were planned; got 2"), layer.planned():
        layer.append(*part((k, v), 20, 21))
        layer.attend(q[:, :, 20:22])
    calls: list[Callable[[], object]] = [
        lambda: layer.prefill(*part((q, k, v), 20, 22)),
        lambda: layer.store(*part((q, k, v), 20, 22)),
        lambda: layer.hide(torch.ones(2, 21, dtype=torch.bool)),
        lambda: layer.make_room(1),
        lambda: layer.drop_newest(1),
        lambda: layer.select_sequences([0]),
        lambda: layer.repeat_sequences(2),
        lambda: end_early(layer, None),  # a step within a step
        layer.reset,
        layer.dequantize,
        layer.token_mask,
        layer.state_dict,
        lambda: layer.load_state_dict(saved),
    ]
    for call in calls:
        with raises("Layer: expected append and attend alone within a planned step; got"), layer.planned():
            call()
    assert layer.length == 20


# Under torch.compile


class Attention(nn.Module):
    """Heads of 32 channels, 4 of queries and 2 of keys, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n) for n in (128, 64, 64))
        self.out = nn.Linear(128, 32)
        self.norm = nn.LayerNorm(32)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(p(x).unflatten(2, (-1, 32)).transpose(1, 2) for p in (self.q, self.k, self.v))

    def forward(self, x: Tensor, cache: Layer) -> Tensor:
        q, k, v = self.heads(x)
        cache.append(k, v)
        return self.norm(x + self.out(cache.attend(q).transpose(1, 2).flatten(2)))


COMPILED = {
    "ZipCacheLayer": lambda: ZipCacheLayer(max_tokens=400),
    "low rank": lambda: made(max_tokens=400),
    "ragged ranks, 4 and 2 bits": lambda: made(ranks=([16, 32], 32), bits=(4, 2), max_tokens=400),
}


@pytest.mark.slow("300 steps, and compiling")
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("name", COMPILED)
def test_300_tokens_and_two_compressions_are_compiled_once(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, layers = Attention().eval(), [COMPILED[name]() for _ in range(2)]
    x, results = torch.randn(2, 341, 32), []
    step = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for layer, run in zip(layers, (step, model), strict=True):
            layer.prefill(*model.heads(x[:, :40]))
            outs, flushed, last = [], 0, 0
            for i in range(40, 341):
                new = x[:, i : i + 1].contiguous()
                stance = "default" if i == 40 else "fail_on_recompile"  # it is compiled at first
                with layer.planned(), torch.compiler.set_stance(stance):
                    outs.append(run(new, layer))
                flushed, last = flushed + (layer.window_length < last), layer.window_length
            assert flushed == (0 if whole(layer) else 2)
            results.append(torch.cat(outs, 1))
    if compiler == "eager":
        assert_same_bits(*results)
    else:
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)  # codes may differ by one
    torch._dynamo.reset()


@pytest.mark.parametrize(("window", "random_probes"), [(128, 0.0), (7, 0.05)])
def test_all_probes_are_the_newest(window: int, random_probes: float) -> None:
    """There are no random places: each of the newest queries has a row of its own all the same."""
    q, k, v = drawn(150)
    options: dict[str, Any] = {"window": window, "random_probes": random_probes, "recent_probes": 0.3}
    layers = [ZipCacheLayer(max_tokens=200, **options), ZipCacheLayer(**options)]
    for its in layers:
        its.prefill(*part((q, k, v), 0, 10))
    planned(layers[0], *part((q, k, v), 10, 150), tokens=2)
    for i in range(10, 150, 2):
        layers[1].make_room(2)
        layers[1].append(*part((k, v), i, i + 2))
        layers[1].attend(q[:, :, i : i + 2])
    assert_same(*(its.state_dict()["segments"] for its in layers))


@each_layer
@pytest.mark.parametrize("times", [0, 2])
def test_tokens_that_do_not_come_or_come_twice(name: str, times: int) -> None:
    """As where a loop ends within a step: the host has counted what the device has not."""
    q, k, v = drawn(60)
    layer, other = LAYERS[name](max_tokens=60), LAYERS[name](max_tokens=60)
    for its in (layer, other):
        its.prefill(*part((q, k, v), 0, 30))
        planned(its, *part((q, k, v), 30, 33))

    def step() -> None:
        with layer.planned():
            for _ in range(times):
                layer.append(*part((k, v), 33, 34))
                layer.attend(q[:, :, 33:34])

    with pytest.raises(ValueError, match=f"planned: expected the 1 tokens that were planned; got {times}"):
        step()
    assert layer.length == 33
    for a, b in zip(*(planned(its, *part((q, k, v), 33, 60)) for its in (layer, other)), strict=True):
        assert_same_bits(a, b)
    assert_same(layer.state_dict(), other.state_dict())
