# SPDX-License-Identifier: Apache-2.0
"""Quantising, packing and the way back: bit for bit as the contract says, and within half a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from singlepass.kv import Quantized
from singlepass.kv._functional import quantize_into
from singlepass.reference import kv as reference

from ..placed import implementation
from ..simt.bounded import SMALLEST
from ..tolerances import assert_same_bits
from . import truth
from .inputs import (
    NAMES,
    NAN,
    WIDTHS,
    check_bounds,
    check_codes,
    each_backend,
    each_bits,
    each_dtype,
    each_layout,
    exact,
    quantized,
    restored,
    tokens,
)
from .places import dequantize, quantize

INF = float("inf")
# What steps belong to: axis, channels in a group, whether channels are divided first.
CODECS = {
    "channel": ("channel", None, False),
    "token": ("token", None, False),
    "group": ("token", 16, False),
    "separable": ("token", None, True),
    "separable group": ("token", 16, True),
}
each_codec = pytest.mark.parametrize("codec", CODECS)


def made(x: Tensor, bits: int, codec: str, block: int | None, backend: str) -> Quantized:
    axis, group, separable = CODECS[codec]
    options = {"group": group, "channel_separable": separable} if axis == "token" else {}
    return quantize(x, bits, axis=axis, block=block, backend=backend, **options)


def check_half_a_step(q: Quantized, x: Tensor) -> None:
    """|x - x^| <= c * step / 2, for x to 65504. What float32 may be off: the quotient, of at most 2^bits - 1 steps, by
    two roundings, and x / c likewise; the step by the rounding of its quotient, absolutely where that is subnormal."""
    found = restored(q)
    width, slots = q.head_dim, q.codes.shape[2]
    step = np.zeros(found.x.value.shape)
    c = np.ones_like(step)
    for i in range(q.counts.shape[2]):
        place = slice(int(q.starts[i]), int(q.starts[i + 1]))
        if q.axis == "channel":
            step[:, :, place] = exact(q.scales)[:, :, i, :1]
        if q.channels is not None:
            c[:, :, place] = exact(q.channels)[:, :, i, None]
    if q.axis == "token":
        step = np.repeat(exact(q.scales)[:, :, :, 0].astype(np.float64), width // q.scales.shape[4], -1)
    value = exact(x.float()).astype(np.float64)
    assert slots == value.shape[2]
    levels = 2**q.bits - 1
    slack = 4.0 * truth.HALF_ULP * (levels * c * step + np.abs(value)) + levels * SMALLEST
    off = np.abs(value - found.x.value)
    assert bool((off <= c * step / 2 + slack).all()), float((off - c * step / 2).max())


@each_backend
@each_bits
@each_codec
@each_dtype
def test_against_float64(backend: str, bits: int, codec: str, dtype: torch.dtype) -> None:
    """Codes against the same arithmetic in NumPy, and what comes back against float64."""
    x = tokens((2, 3, 75, 64), dtype)
    q = made(x, bits, codec, 32, backend)
    assert q.starts.tolist() == [0, 32, 64, 75]
    assert q.counts.tolist() == [[[32, 32, 11]] * 3] * 2
    check_codes(q, x)
    check_half_a_step(q, x)
    for to in NAMES:
        check_bounds(dequantize(q, to, backend=backend), restored(q).x, f"{to}")


@each_backend
@each_bits
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend: str, bits: int, width: int) -> None:
    x = tokens((1, 2, 37, width))
    for codec in CODECS:
        q = made(x, bits, codec, 16, backend)
        assert q.head_dim == width
        check_codes(q, x)
        check_bounds(dequantize(q, backend=backend), restored(q).x, codec)


@each_backend
@each_layout
def test_layouts(backend: str, layout: str) -> None:
    for dtype in NAMES:
        x = tokens((2, 3, 21, 32), dtype, layout)
        for codec in CODECS:
            q = made(x, 4, codec, 8, backend)
            check_codes(q, x)
            dense = made(x.contiguous(), 4, codec, 8, backend)
            assert_same_bits(q.codes, dense.codes)


@each_backend
def test_channels_apart(backend: str) -> None:
    """The public function copies what the op does not take."""
    x = tokens((2, 3, 32, 21)).transpose(2, 3)
    gaps = tokens((2, 3, 21, 64))[..., ::2]
    for given in (x, gaps):
        assert given.stride(-1) != 1
        check_codes(quantize(given, 2, backend=backend), given)


@each_backend
@each_codec
@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 300])
def test_lengths(backend: str, codec: str, length: int) -> None:
    x = tokens((2, 2, length, 16))
    for block in (None, 128, *((1,) if length < 200 else ())):
        q = made(x, 2, codec, block, backend)
        blocks = 1 if length else 0
        assert q.counts.shape == (2, 2, -(-length // block) if block else blocks)
        assert int(q.counts[0, 0].sum()) == length == int(q.starts[-1])
        check_codes(q, x)
        check_bounds(dequantize(q, backend=backend), restored(q).x, codec)


@each_backend
@each_bits
@each_codec
def test_gathered_tokens_and_blocks_that_are_not_full(backend: str, bits: int, codec: str) -> None:
    """Each head has tokens of its own; sequences differ in how many; and the way back puts tokens in their places."""
    axis, group, separable = CODECS[codec]
    x = tokens((3, 2, 60, 48), torch.bfloat16)
    order = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    index = order.view(3, 2, 60)[..., :41].int().contiguous()
    starts, counts = (0, 16, 32, 33, 41), ((16, 16, 1, 8), (16, 3, 0, 0), (0, 0, 1, 7))
    options = {"bits": bits, "axis": axis, "group": group, "separable": separable, "backend": backend}
    q = quantized(x, index, starts, counts, **options)
    want = check_codes(q, x, index)
    for out in (torch.full((3, 2, 60, 48), 5.0), tokens((3, 2, 60, 48), torch.float16, "transposed")):
        expected, error = exact(out).astype(np.float64), np.zeros(out.shape)
        bound = restored(q).x
        for b, h, slot in np.argwhere(want.held):
            token = int(index[b, h, slot])
            expected[b, h, token], error[b, h, token] = bound.value[b, h, slot], bound.error[b, h, slot]
        before = out.clone()
        parts = (q.codes, q.scales, q.channels, index, q.starts, q.counts)
        implementation("kv_dequantize_", backend)(*parts, out, bits=bits, axis=int(axis == "token"))
        check_bounds(out, truth.Bounded(expected, error), codec)
        untouched = torch.from_numpy(error == 0).all(3) & torch.from_numpy(expected == exact(before)).all(3)
        assert_same_bits(out[untouched], before[untouched])


@each_backend
@each_codec
def test_into_strided_places(backend: str, codec: str) -> None:
    """dequantize_ writes through any strides, and nothing between them."""
    q = made(tokens((2, 3, 40, 32)), 4, codec, 16, backend)
    memory = torch.full((2, 44, 4, 40), 7.0)
    out = memory[:, 2:42, :3, 4:36].transpose(1, 2)
    parts = (q.codes, q.scales, q.channels, None, q.starts, q.counts)
    implementation("kv_dequantize_", backend)(*parts, out, bits=4, axis=int(q.axis == "token"))
    assert_same_bits(out.contiguous(), dequantize(q, backend=backend))
    out.fill_(7.0)
    assert bool((memory == 7.0).all())


@each_backend
@each_bits
@each_codec
def test_constants_come_back(backend: str, bits: int, codec: str) -> None:
    """Zeros, constants that float16 has, and ones that it has not: those, to within its rounding."""
    for value in (0.0, -0.0, 1.0, -3.5, 65504.0, -65504.0, 2.0**-24, 0.1, -1e-3, 1e-12):
        x = torch.full((1, 2, 9, 32), value)
        q = made(x, bits, codec, 4, backend)
        check_codes(q, x)
        check_half_a_step(q, x)
        if "separable" not in codec and float(torch.tensor(value).half()) == value:
            assert bool((dequantize(q, backend=backend) == value).all())
        if value == 0.0:
            assert not bool(dequantize(q, backend=backend).any())


@each_backend
@each_bits
@each_codec
def test_constant_channels_and_tokens(backend: str, bits: int, codec: str) -> None:
    x = tokens((1, 2, 40, 32))
    x[:, :, :, 5] = 2.0
    x[:, :, :, 6] = 0.0
    x[:, :, 7] = -0.25
    x[:, :, 8] = 0.0
    q = made(x, bits, codec, 16, backend)
    check_codes(q, x)
    check_half_a_step(q, x)
    back = dequantize(q, backend=backend)
    if codec == "channel":
        assert bool((back[:, :, 16:, 5] == 2.0).all())
    elif "separable" not in codec:
        assert bool((back[:, :, 7] == -0.25).all())
    if codec != "channel":
        assert not bool(back[:, :, 8].any())


@each_backend
@each_bits
@each_codec
@pytest.mark.parametrize("size", [1e-45, 3e-42, 1e-38, 6e-8, 1e-6, 300.0, 6e4])
def test_sizes(backend: str, bits: int, codec: str, size: float) -> None:
    """Subnormals of float32 and of float16, and the largest."""
    x = (tokens((1, 2, 33, 32)) / 10.0).clamp(-1.0, 1.0) * size
    q = made(x, bits, codec, 16, backend)
    check_codes(q, x)
    check_half_a_step(q, x)
    check_bounds(dequantize(q, backend=backend), restored(q).x, codec)


@each_backend
@each_bits
@each_codec
def test_what_is_beyond_65504_counts_as_that(backend: str, bits: int, codec: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens((1, 2, 33, 32), dtype)
        x[0, 0, 3, 4], x[0, 1, 20, 7], x[0, 1, 21, 7] = 1e30, -3e38, 65535.0
        q = made(x, bits, codec, 16, backend)
        check_codes(q, x)
        clamped = x.float().clamp(-65504.0, 65504.0)
        check_half_a_step(q, clamped)
        assert_same_bits(q.codes, made(clamped, bits, codec, 16, backend).codes)


@each_backend
@each_bits
@each_codec
@each_dtype
def test_poison_stays_in_its_group(backend: str, bits: int, codec: str, dtype: torch.dtype) -> None:
    x = tokens((2, 2, 33, 32), dtype)
    for (b, h, t, d), bad in (((0, 0, 3, 4), NAN), ((0, 1, 20, 17), INF), ((1, 0, 32, 31), -INF), ((1, 1, 5, 0), NAN)):
        x[b, h, t, d] = bad
    q = made(x, bits, codec, 16, backend)
    want = check_codes(q, x)
    for to in NAMES:
        back = dequantize(q, to, backend=backend)
        assert torch.equal(back.isnan(), torch.from_numpy(want.poisoned)), "poisoned are exactly the groups"
        check_bounds(torch.where(back.isnan(), 0.0, back), _without_nan(restored(q).x), codec)
    clean = torch.where(x.isfinite(), x, 0.0)
    others = torch.from_numpy(~want.poisoned)
    expected = dequantize(made(clean, bits, codec, 16, backend))
    assert torch.equal(dequantize(q)[others], expected[others]), "the other groups know nothing of it"


@each_backend
@each_bits
@pytest.mark.parametrize("group", [16, 4, 1])
def test_no_bit_of_a_nan_gets_into_codes(backend: str, bits: int, group: int) -> None:
    """A NaN's lower bits may be anything; those that CUDA and x86 make by themselves are all ones and all zeros."""
    for bad in (0x7FFFFFFF, -1, 0x7F800001, -0x400000):
        x = tokens((1, 1, 5, 16), torch.float32)
        x[0, 0, 2, 3] = torch.tensor(bad, dtype=torch.int32).view(torch.float32)
        marked = x.clone()
        marked[0, 0, 2, 3] = NAN
        by_token = (quantize(t, bits, axis="token", group=group, backend=backend).codes for t in (x, marked))
        by_channel = (quantize(t, bits, axis="channel", backend=backend).codes for t in (x, marked))
        for pair in (by_token, by_channel):
            assert_same_bits(*pair)


def _without_nan(bound: truth.Bounded) -> truth.Bounded:
    good = ~np.isnan(bound.value)
    return truth.Bounded(np.where(good, bound.value, 0.0), np.where(good, bound.error, 0.0))


@each_bits
def test_packing(bits: int) -> None:
    for width in WIDTHS:
        codes = torch.randint(2**bits, (3, 5, width), generator=torch.Generator().manual_seed(width))
        packed = reference.pack(codes, bits)
        assert packed.shape == (3, 5, width * bits // 8)
        np.testing.assert_array_equal(truth.unpack(packed.numpy(), bits), codes.numpy())
        np.testing.assert_array_equal(reference.unpack(packed, bits).numpy(), codes.numpy())


@each_backend
@each_bits
def test_the_op_packs_in_planes(backend: str, bits: int) -> None:
    """Whole codes come back from a token that has all of them: with a step of 1 a value is its code."""
    x = torch.arange(2.0**bits).repeat(256 // 2**bits)[:256].view(1, 1, 1, 256)
    q = quantize(x, bits, axis="token", backend=backend)
    assert q.scales.flatten().tolist() == [1.0, 0.0]
    per_byte, bytes_ = 8 // bits, 256 * bits // 8
    for w in range(bytes_):
        want = sum(int(x[0, 0, 0, p * bytes_ + w]) << (p * bits) for p in range(per_byte))
        assert int(q.codes[0, 0, 0, w]) == want
    assert_same_bits(dequantize(q, backend=backend), x)


@each_backend
@each_codec
def test_more_bits_are_closer(backend: str, codec: str) -> None:
    x = tokens((2, 2, 100, 64))
    off = [float((dequantize(made(x, bits, codec, 32, backend)) - x).square().mean()) for bits in (2, 4, 8)]
    assert off[0] > 9 * off[1] > 81 * off[2]  # steps shrink by 5 and by 17


def test_codecs_in_the_papers_order() -> None:
    """Keys have outlying channels, values tokens of many sizes and a few large channels."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 8, 1024, 128, generator=generator)
    k[..., [5, 17, 40, 99]] += torch.tensor([6.0, -9.0, 12.0, 15.0])
    v = torch.randn(1, 8, 1024, 128, generator=generator) * torch.randn(1, 8, 1024, 1, generator=generator).exp()
    v[..., [3, 50, 77]] *= 8.0

    def off(x: Tensor, codec: str) -> float:
        return float((dequantize(made(x, 4, codec, 128, "eager")) - x).square().mean())

    assert off(k, "channel") < off(k, "separable") < off(k, "token")
    assert off(v, "separable") < 0.5 * min(off(v, "token"), off(v, "channel"))


@pytest.mark.serial
@pytest.mark.slow("threads of the emulated kernels wait for each other where others run")
@each_backend
def test_threads_and_repetitions_give_the_same_bits(backend: str, each_thread_count: tuple[int, ...]) -> None:
    x = tokens((2, 3, 300, 64))
    found = []
    for count in each_thread_count:
        torch.set_num_threads(count)
        found += [made(x, 4, codec, 128, backend) for codec in ("channel", "separable")]
    for a, b in ((found[0], found[2]), (found[1], found[3]), (found[0], found[4]), (found[1], found[5])):
        assert_same_bits(a.codes, b.codes)
        assert_same_bits(a.scales, b.scales)
        assert_same_bits(dequantize(a, backend=backend), dequantize(b, backend=backend))


def test_float64_runs_in_eager() -> None:
    x = tokens((1, 2, 20, 32), torch.float64)
    q = quantize(x, 4, axis="token", channel_separable=True)
    check_codes(q, x)
    back = dequantize(q, torch.float64)
    assert back.dtype == torch.float64
    torch.testing.assert_close(back.numpy(), restored(q).x.value, rtol=1e-15, atol=0.0)


def test_slots_and_an_index_beyond_the_tokens_are_refused() -> None:
    x = tokens((1, 2, 40, 32))
    q = quantize(x, 4, block=16)
    before = q.codes.clone()
    with pytest.raises(RuntimeError, match="kv_quantize_: expected tokens 0 to 38; got 39"):
        quantize_into(x[:, :, :39] + 1.0, None, q, "native")
    index = torch.arange(40, dtype=torch.int32).expand(1, 2, 40).contiguous()
    for beyond in (40, -1):
        index[0, 1, 17] = beyond
        with pytest.raises(RuntimeError, match=f"kv_quantize_: expected tokens 0 to 39; got {beyond}"):
            quantize_into(x + 1.0, index, q, "native")
    assert_same_bits(q.codes, before)


def test_what_quantized_tokens_look_like() -> None:
    q = quantize(tokens((1, 2, 40, 32)), 4, axis="token", block=16)
    assert repr(q) == f"Quantized((1, 2, 40, 32), bits=4, axis='token', blocks=3, nbytes={q.nbytes})"


def test_sizes_that_are_no_whole_numbers_and_gradients_are_refused() -> None:
    x = tokens((1, 1, 4, 32))
    for options, text in (
        ({"block": 1.5}, "a block of at least one token; got 1.5"),
        ({"axis": "token", "group": 16.0}, "a group that divides 32 channels; got 16.0"),
    ):
        with pytest.raises(ValueError, match=f"quantize: expected {text}"):
            quantize(x, 4, **options)
    with pytest.raises(ValueError, match="quantize: expected x that needs no gradient"):
        quantize(x.clone().requires_grad_(), 4)
