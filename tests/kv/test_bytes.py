# SPDX-License-Identifier: Apache-2.0
"""What a cache takes, as the table of bytes says and by hand, and what growing costs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass.kv import Codec, ZipCacheLayer, _segment, cache_nbytes

from ..tolerances import assert_same_bits
from .layers import drawn, part, stream
from .test_layer import CODECS

NAMED = {
    "zipcache": Codec.zipcache(),
    "one size of blocks": Codec(block=64, regular_block=64),
    "regular blocks alone": Codec(block=None, regular_block=8),
    "one block": Codec.zipcache(None),
    "kivi": Codec.kivi(16),
    "per token and head": Codec.per_token_head(),
}


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("tokens", [1, 129, 300])
def test_a_prompt_takes_what_the_table_says(tokens: int, name: str, ratio: float) -> None:
    q, k, v = drawn(tokens, batch=2, heads=3)
    options = {"salient_ratio": ratio, "salient_bits": 8, "regular_bits": 4, "codec": NAMED[name]}
    layer = ZipCacheLayer(**options)
    layer.prefill(q, k, v)
    assert cache_nbytes(tokens, batch=2, heads=3, head_dim=k.shape[3], **options) == layer.nbytes


def tensors_in(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that can be reached from an object, whatever its classes are."""
    if id(x) in seen or isinstance(x, type):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from (t for part in x.values() for t in tensors_in(part, seen))
    elif isinstance(x, (list, tuple, set, deque)):
        yield from (t for part in x for t in tensors_in(part, seen))
    elif hasattr(x, "__dict__") and not isinstance(x, torch.Generator):
        yield from tensors_in(vars(x), seen)


def behind(x: Any) -> int:
    """Bytes of all memory behind those tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(x, set())}
    return sum(storages.values())


def hand_count(codec: Codec, heads: int, width: int, salient: int, regular: int, window: int, bits: int = 16) -> int:
    """Bytes of one sequence: codes, float16 steps and minima, factors, starts and counts, kinds, and the window."""
    total = heads * -(-(salient + regular) // 4) + heads * window * 2 * width * bits // 8
    for tokens, code, block in ((salient, 4, codec.block), (regular, 2, codec.regular_block)):
        if not tokens:
            continue
        blocks = -(-tokens // block) if block else 1
        per_head = tokens * 2 * width * code // 8
        per_head += 4 * (
            blocks * width if codec.key_axis == "channel" else tokens * width // (codec.key_group or width)
        )
        per_head += 4 * tokens * width // (codec.value_group or width)
        per_head += 2 * blocks * width if codec.channel_separable else 0
        total += heads * (per_head + 4 * blocks) + 4 * (blocks + 1)
    return total


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_bytes(codec: str, ratio: float) -> None:
    q, k, v = drawn(80, batch=1, heads=3, dtype=torch.bfloat16)
    layer = ZipCacheLayer(ratio, codec=CODECS[codec](), window=16)
    layer.prefill(*part((q, k, v), 0, 71))
    layer.append(*part((k, v), 71, 80))
    salient = int(71 * ratio + 0.5)
    assert layer.nbytes == hand_count(layer.codec, 3, 32, salient, 71 - salient, 9) == behind(layer)
    layer.append(*part((k, v), 0, 1))  # room for as much as a quarter more is made
    most = int(9 * _segment.GROWTH) + 1
    assert layer.nbytes == hand_count(layer.codec, 3, 32, salient, 71 - salient, most) == behind(layer)


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [
        (Codec.zipcache(None), 106.4, 107.5),
        (Codec(regular_block=128), 112.4, 113.5),
        (Codec(), 119.5, 120.5),
        (Codec(regular_block=16), 129.2, 130.2),
    ],
)
def test_bytes_of_a_long_prompt(codec: Codec, least: float, most: float) -> None:
    """A token and head of 128 channels: 102.4 in codes at 60% of 4 bits, 4 of the value's step, 1/4 of what it is; of
    a block of 128 or 16, 512 of keys' steps and 256 of factors."""
    q, k, v = drawn(2560, batch=1, heads=1, group=1, width=128, dtype=torch.bfloat16)
    layer = ZipCacheLayer(codec=codec, max_probes=8)
    layer.prefill(q, k, v)
    assert least < layer.nbytes / 2560 < most


def test_growth_copies_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """131072 tokens that come in windows: bytes copied to grow are a small multiple of those stored, at any length."""
    copied, at = 0, {}
    grow = _segment.grown

    def counted(tensor: Tensor, dim: int, used: int, size: int, **options: Any) -> Tensor:
        nonlocal copied
        larger = grow(tensor, dim, used, size, **options)
        copied += 0 if larger is tensor else tensor.narrow(dim, 0, used).nbytes
        return larger

    monkeypatch.setattr(_segment, "grown", counted)
    _, k, v = drawn(1024, batch=1, heads=1, width=16)
    layer = ZipCacheLayer(salient_bits=2)
    for _ in range(128):
        layer.append(k, v)
        at[layer.length] = copied, layer.nbytes
    assert layer.length == 131072
    for length, (bytes_, held) in at.items():  # held is GROWTH times what is stored at most
        assert bytes_ <= held / (_segment.GROWTH - 1.0), f"{length} tokens"
    other = ZipCacheLayer(salient_bits=2)
    other.append(k, v)
    for a, b in zip(layer.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(a[:, :, -2048:-1024], a[:, :, 1024:2048])
        assert_same_bits(a[:, :, -1024:], torch.cat((a[:, :, :896], b[:, :, -128:]), 2))


@pytest.mark.parametrize("ratio", [0.6, 1.0])
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_told_are_bytes_held(codec: str, ratio: float) -> None:
    """At every token, and whatever is done to a layer."""
    q, k, v = drawn(90, heads=2)
    layer = ZipCacheLayer(ratio, codec=CODECS[codec](), window=16)
    assert layer.nbytes == behind(layer) == 0
    for i in range(45):
        layer.append(*part((k, v), i, i + 1))
        layer.attend(q[:, :, i : i + 1])
        assert layer.nbytes == behind(layer)
        if i < 16:
            most = max(int(i * _segment.GROWTH) + 1, i + 1)
            queries = min(i + 1, 16) * 2 * 4 * (32 + 1) * 4 if ratio < 1.0 else 0  # of all tokens, at most
            assert layer.nbytes <= 2 * 2 * most * 2 * 32 * 4 + queries
    calls = [
        lambda: layer.prefill(*part((q, k, v), 45, 60)),
        lambda: layer.append(*part((k, v), 60, 90)),
        lambda: layer.attend(q[:, :, 86:]),
        lambda: layer.drop_newest(3),
        lambda: layer.repeat_sequences(3),
        lambda: layer.select_sequences([5, 0, 3]),
        lambda: layer.load_state_dict(layer.state_dict()),
        lambda: layer.dequantize(),
    ]
    for call in calls:
        call()
        assert layer.nbytes == behind(layer) > 0
    layer.reset()
    assert layer.nbytes == behind(layer) == 0


def test_room_made_ahead_is_not_repeated() -> None:
    """Beams copy what is in use: a window that was full once has as many places, a sequence chosen from it none."""
    q, k, v = drawn(90)
    layer = ZipCacheLayer(1.0, window=64)
    stream(layer, *part((q, k, v), 0, 70))
    assert layer._held.window.room[0].shape[2] == 64
    layer.repeat_sequences(3)
    assert layer._held.window.room[0].shape[2] == layer.window_length == 6
    fresh = ZipCacheLayer(1.0, window=64)
    fresh.load_state_dict(layer.state_dict())
    assert layer.nbytes == fresh.nbytes
    before = layer.nbytes
    layer.select_sequences([0, 1])
    assert layer.nbytes < 0.4 * before


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_equal_bits_are_counted_as_they_are_stored(ratio: float, bits: int) -> None:
    """Without a second kind of tokens, whatever share would be salient."""
    q, k, v = drawn(100)
    layer = ZipCacheLayer(ratio, salient_bits=bits, regular_bits=bits)
    layer.prefill(q, k, v)
    options: dict[str, Any] = {"salient_ratio": ratio, "salient_bits": bits, "regular_bits": bits}
    assert cache_nbytes(100, batch=2, heads=2, head_dim=32, **options) == layer.nbytes


@pytest.mark.parametrize(
    "wrong",
    [{"batch": -1}, {"heads": 0}, {"heads": 1.5}, {"head_dim": 528}, {"head_dim": 20}, {"tokens": 1.5}],
    ids=str,
)
def test_no_bytes_of_a_cache_that_can_not_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cache_nbytes: expected"):
        cache_nbytes(**({"tokens": 10} | wrong))
