# SPDX-License-Identifier: Apache-2.0
"""The KV cache's kernels against the truth of ``tests/kv``: codes bit for bit, sums within float32's bounds.

These are a few of the cases there. All of them run in the interpreter too, in half an hour:
``TRITON_INTERPRET=1 python -m pytest tests/kv/test_{functional,attention,saliency,projection}.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from singlepass.kv import dequantize
from singlepass.triton_kernels.kv import launchers as kv

from ...kv import test_projection as projection
from ...kv import test_saliency as saliency
from ...kv import test_step as step
from ...kv.inputs import NAN, Part, attention, check_bounds, check_codes, generator, quantized, restored, tokens
from ...kv.test_attention import CODECS, RAGGED, alone
from ...simt.bounded import Bounded
from ...tolerances import assert_same_bits

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
STARTS, COUNTS = (0, 16, 32, 33, 41), ((16, 16, 1, 8), (16, 3, 0, 1))


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks then make several tiles, and segments several splits of several blocks."""
    monkeypatch.setattr(kv, "TILE_SIZE", 1024)
    monkeypatch.setattr(kv, "CODEC_TILE_SIZE", 512)
    monkeypatch.setattr(kv, "SPLITS", 2)


@pytest.mark.parametrize(
    ("bits", "width", "dtype", "options"),
    [
        (4, 64, BFLOAT16, {"axis": "channel"}),
        (2, 48, FLOAT32, {"axis": "channel"}),
        (8, 80, FLOAT16, {"axis": "channel"}),
        (4, 80, FLOAT32, {"axis": "token", "separable": True}),
        (2, 128, BFLOAT16, {"axis": "token", "separable": True}),
        (8, 16, FLOAT16, {"axis": "token"}),
        (2, 96, FLOAT32, {"axis": "token", "group": 32}),
        (4, 48, FLOAT16, {"axis": "token", "group": 16, "separable": True}),
    ],
    ids=str,
)
def test_codes(bits: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Of tokens of an index and of all, some with NaN, an infinity or what float16 has not."""
    x = tokens((2, 2, 60, width), dtype)
    x[0, 0, 3, 4], x[0, 1, 20, 7], x[1, 0, 33, 15] = NAN, float("inf"), 6.6e4
    x[1, 1, 5], x[1, 1, :, 2] = 0.0, -1.5
    order = torch.stack([torch.randperm(60, generator=generator(i)) for i in range(4)])
    for index in (None, order.view(2, 2, 60)[..., :41].int().contiguous()):
        q = quantized(x, index, STARTS, COUNTS, bits=bits, **options, backend="triton")
        want = check_codes(q, x, index)
        if index is None:
            back = dequantize(q, dtype, backend="triton")
            assert torch.equal(back.isnan(), torch.from_numpy(want.poisoned))
            shown = want.held[..., None] & ~want.poisoned
            bound = restored(q).x
            bound = Bounded(np.where(shown, bound.value, 0.0), np.where(shown, bound.error, 0.0))
            check_bounds(torch.where(back.isnan(), 0.0, back), bound, "restored")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": BFLOAT16, "parts": (Part(4, (0, 40, 57)), Part(2, (0, 40, 43)))},
        {"dtype": FLOAT16, "queries": 3, "group": 3, "parts": (RAGGED,)},
        {"parts": (Part(8, (0, 20)), Part(4, (0, 16, 32)), Part(2, (0, 33, 34))), "width": 80, "value_width": 112},
        {"dtype": BFLOAT16, "group": 16, "heads": 1, "parts": (RAGGED, Part(2, (0, 40), ((0,), (39,))))},
        {**CODECS["kivi"], "parts": (Part(2, (0, 40, 57)),), "dtype": FLOAT16},
        {**CODECS["token and head"], "parts": (RAGGED,), "queries": 2},
        {**CODECS["groups"], "parts": (Part(4, (0, 16, 32)),), "width": 48},
        {"parts": ()},
        {"parts": (Part(4, (0,)), Part(2, (0, 8, 10), ((0, 0), (0, 0)))), "window": ((0, 0), (5, 5))},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_attention(options: dict[str, Any]) -> None:
    attention(**options).check("triton")


def test_sinks_a_cap_and_first_slots() -> None:
    case = attention((RAGGED, Part(2, (0, 40), ((0,), (39,)))), queries=2, layout="offset")
    case.softcap, case.scale = 0.5, 0.7
    case.sinks = torch.randn(8, generator=generator()) * 4.0
    case.first = torch.randint(0, 40, (2, 2, 2), dtype=torch.int32, generator=generator())
    case.check("triton")


def test_logits_that_jump_and_coefficients_of_every_size() -> None:
    """What multiplies codes is split in two parts of 16 bits, of which none may overflow or vanish."""
    for size in (1e-4, 1.0, 1e3):
        case = attention((Part(8, (0, 64, 96)), Part(4, (0, 50))), batch=1, window=((0, 12),))
        for keys, values in case.segments:
            keys.scales.mul_(size)
            values.scales.mul_(1e-4 if size == 1.0 else 1.0)
        case.window_k *= size
        case.q *= torch.logspace(-6, 1, 64) / size
        case.check("triton", str(size))


def test_poison_that_is_seen_shows() -> None:
    case = attention((RAGGED,))
    case.segments[0][0].scales[1, 0, 0, 0, 5] = NAN
    out, lse = case.call("triton")
    assert bool(out[1, :4].isnan().all())
    assert bool(lse[1, :4].isnan().all())
    assert not bool(out[0].isnan().any() | out[1, 4:].isnan().any())


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    case = attention((RAGGED,), queries=2)
    results = case.call("triton")
    for b in range(2):
        for whole, own in zip(results, alone(case, b).call("triton"), strict=True):
            assert_same_bits(own, whole[b : b + 1])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"dtype": BFLOAT16, "group": 3, "layout": "transposed"}, {"softcap": 0.5, "scale": 3.0}),
        ({"dtype": FLOAT16, "width": 80, "group": 1}, {"mask": True}),
        ({"width": 16, "layout": "offset"}, {"mask": True, "lse": True}),
    ],
    ids=str,
)
def test_saliency(shape: dict[str, Any], options: dict[str, Any]) -> None:
    q, k, positions = saliency.inputs(**shape)
    options = dict(options)
    if options.pop("mask", False):
        options["mask"] = torch.rand(2, 37, generator=generator()) > 0.3
    if options.pop("lse", False):
        options["lse"] = torch.full(q.shape[:3], 9.0)
    saliency.check("triton", q, k, positions, **options)


@pytest.mark.parametrize(("dtype", "layout"), [(FLOAT32, "transposed"), (BFLOAT16, "contiguous"), (FLOAT16, "offset")])
def test_projection(dtype: torch.dtype, layout: str) -> None:
    k, v = tokens((2, 8, 37, 64), dtype, layout), tokens((2, 8, 37, 48), dtype, layout, seed=5)
    its = [projection.bases(64), projection.bases(48, seed=7)]
    projection.check("triton", [k, v], its, projection.turns(k, 48, batch=2))


def test_new_tokens() -> None:
    """Stored, attended to, and their queries copied."""
    for dtype, queries in ((BFLOAT16, 1), (FLOAT32, 3)):
        step.check(attention((RAGGED,), dtype=dtype, queries=queries), "triton")


def test_other_tokens_are_refused() -> None:
    case = attention((RAGGED,), queries=2, window=((0, 5), (0, 12)))
    k, v = (x[:, :, :2].clone() for x in (case.window_k, case.window_v))
    changed = [(k[:, :, :1], v), (k, v[:, :1]), (k.bfloat16(), v), (k, v[..., :32])]
    for pair in changed:
        with pytest.raises(ValueError, match=r"kv_step_: expected tokens \(2, 2, 2, 64\)"):
            step.step(case, *pair, "triton")
