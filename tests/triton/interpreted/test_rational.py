# SPDX-License-Identifier: Apache-2.0
"""Rational activations against the reference in float64, within a bound of the roundings that a kernel makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from singlepass._ops import OPS
from singlepass._ops.rational import dropout_threshold
from singlepass.reference import rational as reference
from singlepass.reference.philox import philox4x32, random_halves
from singlepass.triton_kernels.rational import launchers
from singlepass.triton_kernels.rational.functions import are_kept, random_words

from ...tolerances import assert_same_bits, assert_within, ulp

forward, backward = OPS["rational"].on("triton"), OPS["rational_backward"].on("triton")

A, B, C, D = range(4)
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([2**40 + 12345])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors then make several programs of several tiles."""
    monkeypatch.setattr(launchers, "FORWARD_TILE", 256)
    monkeypatch.setattr(launchers, "BACKWARD_TILE", 128)
    monkeypatch.setattr(launchers, "PROGRAMS", 3)


LAYOUTS = {
    "rows": lambda c, dtype: torch.randn(2, 7, c, dtype=dtype),
    "planes": lambda c, dtype: torch.randn(2, c, 5, 3, dtype=dtype),
    "channels_last": lambda c, dtype: torch.randn(2, c, 5, 3, dtype=dtype).to(memory_format=torch.channels_last),
    "chunk": lambda c, dtype: torch.randn(11, 2 * c, dtype=dtype).chunk(2, -1)[1],
    "transposed": lambda c, dtype: torch.randn(c, 19, dtype=dtype).t(),
    "cropped": lambda c, dtype: torch.randn(2, c, 6, 4, dtype=dtype)[:, :, :4],  # planes apart from each other
    "gaps": lambda c, dtype: torch.randn(5, c, 8, dtype=dtype)[:, :, ::2],  # strides of no view: it is copied
}


@dataclass(frozen=True)
class Case:
    form: int = A
    dtype: torch.dtype = FLOAT32
    layout: str = "rows"
    channels: int = 24
    groups: tuple[int, int] = (1, 3)
    degrees: tuple[int, int] = (5, 4)
    tables: torch.dtype = FLOAT32
    bias: bool = False
    gate: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        flags = [key for key in ("bias", "gate", "dropout") if getattr(self, key)]
        parts = ["ABCD"[self.form], self.dtype, self.layout, self.channels, self.groups, self.degrees, *flags]
        return "-".join(map(str, parts)).replace("torch.", "").replace(" ", "")

    def arguments(self) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
        """A gradient, the inputs and the options."""
        torch.manual_seed(0)
        x = LAYOUTS[self.layout](self.channels, self.dtype)
        channel_dim = -1 if self.layout == "rows" else 1
        inputs = [
            x,
            torch.randn(self.groups[0], self.degrees[0] + 1).to(self.tables),
            torch.randn(self.groups[1], self.degrees[1] + (self.form == C)).to(self.tables),
            torch.randn(self.channels).to(self.tables) if self.bias else None,
            torch.randn(x.shape, dtype=self.dtype) if self.gate else None,
        ]
        options = {"form": self.form, "channel_dim": channel_dim, "dropout": self.dropout, "seed": SEED}
        return torch.randn(x.shape, dtype=self.dtype), inputs, options


_DEGREES = [(5, 4), (3, 2), (7, 6), (1, 1)]
_GROUPS = [(24, (1, 3)), (24, (8, 1)), (21, (3, 3)), (5, (1, 1)), (15, (1, 3))]
_FLAGS = [{}, {"bias": True}, {"gate": True}, {"dropout": 0.3}, {"bias": True, "gate": True, "dropout": 0.3}]


def _cases() -> list[Case]:
    """Every form in every dtype, and in every layout with a bias and all; the rest takes turns."""
    cases = []
    for k in range(24):
        channels, groups = _GROUPS[k % 5]
        dtype, layout = (FLOAT32, BFLOAT16, FLOAT16)[k // 4 % 3], [*LAYOUTS][k % 7]
        degrees, flags = _DEGREES[(k + k // 4) % 4], _FLAGS[(k + k // 5) % 5]
        cases.append(Case(k % 4, dtype, layout, channels, groups, degrees, (FLOAT32, BFLOAT16)[k % 2], **flags))
    everything = {"bias": True, "gate": True, "dropout": 0.3}
    for k, layout in enumerate(LAYOUTS):
        cases.append(Case(k % 4, FLOAT32, layout, 24, (1, 3), **everything))
        cases.append(Case((k + 1) % 4, (BFLOAT16, FLOAT16)[k % 2], layout, 15, (3, 1), tables=FLOAT16, bias=k % 2 == 0))
    return cases


CASES = _cases()


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


class Bounds:
    """How far float32 results may be from the truth, where the truth is what float64 gives.

    u is the unit roundoff of float32. Every operation errs by u of its result: S stands for the sum of the absolute
    values of a polynomial's terms.

    * Degree k by Horner's rule: 2k roundings if nothing is fused, and k of x + bias, which moves the i-th term by i u;
      form D's factors are 4 roundings. So P is within (3m + 4) u S_P, and Q, with two more, within (3n + 6) u S_Q. The
      derivatives run along, each step on a rounded value: twice as many.
    * A reciprocal or a quotient: 4 u, which is 2 ulp.
    * Where the polynomial between the bars is within its error of zero, its sign may be either.
    * A sum has at most 20 tiles in a lane, then a tree of the 128 lanes, then float64: 28 u of the absolute sum.
    """

    SUM = 28

    def __init__(self, case: Case, grad: Tensor, inputs: list[Tensor | None], options: dict[str, Any]) -> None:
        x, a, b, bias, gate = map(double, inputs)
        u = torch.finfo(FLOAT32).eps / 2 * 1.001  # with a margin for products of errors
        channel_dim = options["channel_dim"] % x.dim()
        z = x if bias is None else x + reference._along(bias, x, channel_dim)
        self.z, self.channel_dim, self.groups = z, channel_dim, (len(a), len(b))
        size, (m, n) = z.abs(), case.degrees
        most = 1.0 + reference.NOISE if case.form == D else 1.0
        terms_a = [most * c.abs() for c in reference._per_channel(a, x, channel_dim)]
        terms_b = [most * c.abs() for c in reference._per_channel(b, x, channel_dim)]
        constant = reference.C_OFFSET if case.form == C else 1.0
        if case.form != C:
            terms_b = [torch.zeros_like(terms_b[0]), *terms_b]
        sum_p, sum_q = reference._horner(terms_a, size), constant + reference._horner(terms_b, size)
        slope_p = reference._horner([k * c for k, c in enumerate(terms_a)][1:], size)
        slope_q = reference._horner([k * c for k, c in enumerate(terms_b)][1:], size)

        plain = {**options, "dropout": 0.0}
        one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        r = reference.rational(x, one, b, bias, None, **plain)
        if case.form == D:  # which makes noise of the one too
            r = r / reference._noise(SEED, 1, reference._offsets(x), 1, torch.float64)[0]
        f = reference.rational(x, a, b, bias, None, **plain)
        size_f = f.abs()
        err_p, err_q = (3 * m + 4) * u * sum_p, (3 * n + 6) * u * sum_q
        err_f = err_p * r + (err_q * r + 4 * u) * size_f
        kept, scale = torch.ones_like(x), 1.0
        threshold = dropout_threshold(case.dropout)
        if threshold > 0:
            kept, scale = reference._kept(SEED, reference._offsets(x), threshold), 65536.0 / (65536.0 - threshold)
        factor = kept * scale * (1.0 if gate is None else gate.abs())
        self.y = factor * (err_f + 4 * u * size_f)

        size_g = grad.double().abs()
        g = size_g * factor * r
        err_g = err_q * r + 9 * u  # relative
        flips = torch.zeros_like(z) if case.form == A else (1.0 / r - constant <= err_q).double() * 2.0
        slope = slope_p + size_f * slope_q
        err_slope = 2 * (3 * m + 4) * u * slope_p + size_f * slope_q * (2 * (3 * n + 6) * u + flips)
        err_x = g * (err_slope + err_f * slope_q + (err_g + 3 * u) * slope)
        self.x = err_x
        self.gate = size_g * kept * scale * (err_f + 4 * u * size_f)
        self.bias = self._by_channel(err_x + self.SUM * u * g * slope)
        err_h = size_f * (err_g + flips + 5 * u) + err_f  # of f g' over g'
        first = 0 if case.form == C else 1
        self.a = self._by_group(len(a), [(g * size**k, err_g + (2 * k + self.SUM) * u) for k in range(m + 1)])
        self.b = self._by_group(
            len(b), [(g * size**k, err_h + size_f * (2 * k + self.SUM) * u) for k in range(first, n + 1)]
        )

    def _by_channel(self, v: Tensor) -> Tensor:
        return v.movedim(self.channel_dim, 0).flatten(1).sum(1)

    def _by_group(self, count: int, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        sums = [self._by_channel(size * error) for size, error in terms]
        return torch.stack(sums, 1).unflatten(0, (count, -1)).sum(1)


def assert_rounded(actual: Tensor, truth: Tensor, error: Tensor, label: str) -> None:
    """Within the error, then rounded to nearest."""
    assert_within(actual, truth, error + 0.5 * ulp(truth.abs() + error, actual.dtype), label)


def check(case: Case, to_device: Callable[[Tensor | None], Tensor | None]) -> None:
    grad, inputs, options = case.arguments()
    bounds = Bounds(case, grad, inputs, options)
    moved = [to_device(t) for t in inputs]
    on_device = options | {"seed": to_device(SEED)}
    y, like_x = forward(*moved, **on_device), torch.empty_like(moved[0])
    assert y.dtype == like_x.dtype
    assert y.stride() == like_x.stride()
    assert_rounded(y.cpu(), reference.rational(*map(double, inputs), **options), bounds.y, "y")
    truth = reference.rational_backward(grad.double(), *map(double, inputs), **options)
    results = backward(to_device(grad), *moved, **on_device)
    for name, result, expected, like in zip(("x", "a", "b", "bias", "gate"), results, truth, inputs, strict=True):
        if like is None:
            assert result.shape == (0,)
            continue
        assert result.dtype == like.dtype
        assert_rounded(result.cpu(), expected, getattr(bounds, name), name)
    assert results[0].stride() == y.stride()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_roundings(case: Case) -> None:
    check(case, lambda t: t)


@pytest.mark.parametrize("case", [case for case in CASES if case.dropout], ids=str)
def test_dropout_of_the_same_elements(case: Case) -> None:
    _, inputs, options = case.arguments()
    y, expected = forward(*inputs, **options), reference.rational(*inputs, **options)
    assert torch.equal(y == 0.0, expected == 0.0)


def test_dropout_depends_on_the_seed() -> None:
    _, inputs, options = Case(dropout=0.5).arguments()
    zeros = []
    for seed in (torch.tensor(-3), torch.tensor([2**63 - 1]), torch.tensor([0])):
        options["seed"] = seed
        zeros.append(forward(*inputs, **options) == 0.0)
        assert torch.equal(zeros[-1], reference.rational(*inputs, **options) == 0.0)
        assert 0.4 < zeros[-1].double().mean() < 0.6
    assert not torch.equal(zeros[0], zeros[1])


@triton.jit
def kept_kernel(p_kept, a_first, threshold, dropout: tl.constexpr, block: tl.constexpr):
    first = tl.load(a_first) + tl.zeros((1, 1), tl.int64)
    kept = are_kept(tl.full((), 7, tl.uint64), first, threshold, dropout, 1, block)
    tl.store(p_kept + tl.arange(0, block)[None, :], kept.to(tl.int32))


@triton.jit
def words_kernel(p_words, p_counter, block: tl.constexpr):
    i = tl.arange(0, block)
    words = random_words(tl.full((), 7, tl.uint64), tl.load(p_counter + i), 2)
    for k in tl.static_range(4):
        tl.store(p_words + k * block + i, words[k].to(tl.int64))


def test_random_bits() -> None:
    kept, one = torch.empty(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    expected = (random_halves(7, 0, 72, torch.device("cpu")) >= 20000).int()
    for first, dropout in ((0, "blocks"), (8, "blocks"), (0, "elements"), (3, "elements")):
        kept_kernel[(1,)](kept, one + first, 20000, dropout, 64)
        assert torch.equal(kept, expected[first : first + 64])
    counter = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 3, 2**33, 5, 6])
    words = torch.empty(4, 8, dtype=torch.int64)
    words_kernel[(1,)](words, counter, 8)
    assert torch.equal(words, torch.stack(philox4x32(7, counter, 2)))


@pytest.mark.parametrize("form", [A, B, C, D])
def test_infinities_and_nans(form: int) -> None:
    grad, inputs, options = Case(form).arguments()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e9, -1e9, 1e-40, 0.0, -0.0])
    ordinary = backward(grad, *inputs, **options)[0]
    inputs[0].view(-1)[:20:2] = special
    y, expected = forward(*inputs, **options), reference.rational(*inputs, **options)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[y.isinf()], expected[y.isinf()])
    results = backward(grad, *inputs, **options)
    assert_same_bits(results[0].view(-1)[20:], ordinary.view(-1)[20:])
    assert results[0].view(-1)[0].isnan()
    assert results[1].isnan().any()


@pytest.mark.parametrize("form", [A, B, C])
def test_derivatives_of_absolute_values_at_zero(form: int) -> None:
    grad, inputs, options = Case(form, bias=True, layout="planes").arguments()
    for t in (inputs[0], inputs[2], inputs[3]):
        t.zero_()
    results = backward(grad, *inputs, **options)
    expected = reference.rational_backward(grad, *inputs, **options)
    for result, e in zip(results[:4], expected, strict=False):
        torch.testing.assert_close(result, e, rtol=1e-5, atol=1e-5)
    if form == C:
        assert results[2].any()


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_the_same_bits_again(layout: str) -> None:
    grad, inputs, options = Case(C, layout=layout, bias=True, gate=True, dropout=0.3).arguments()
    y, results = forward(*inputs, **options), backward(grad, *inputs, **options)
    for again, first in zip(backward(grad, *inputs, **options), results, strict=True):
        assert_same_bits(again, first)
    x = inputs[0]
    inputs[0] = torch.empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)  # no vector is aligned
    assert_same_bits(forward(*inputs, **options), y)
    assert_same_bits(backward(grad, *inputs, **options)[0], results[0])


@pytest.mark.parametrize("shape", [(0, 24), (2, 24, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    _, inputs, options = Case(bias=True).arguments()
    x = torch.empty(shape)
    options["channel_dim"] = 1
    assert forward(x, *inputs[1:], **options).shape == shape
    results = backward(x, x, *inputs[1:4], x, **options)
    assert results[0].shape == results[4].shape == shape
    for result, like in zip(results[1:4], inputs[1:4], strict=True):
        assert_same_bits(result, torch.zeros_like(like))


def test_no_dimensions_but_channels_and_one_channel() -> None:
    for shape, channel_dim, groups in (((24,), 0, 3), ((4, 1, 9), 1, 1), ((1, 24, 1), -2, 3), ((1, 1), 0, 1)):
        _, inputs, options = Case(groups=(1, groups)).arguments()
        for bias in (None, torch.randn(shape[channel_dim])):
            arguments = [torch.randn(shape), *inputs[1:3], bias, None]
            options["channel_dim"] = channel_dim
            grad = torch.randn(shape)
            expected = reference.rational_backward(grad, *arguments, **options)
            torch.testing.assert_close(forward(*arguments, **options), reference.rational(*arguments, **options))
            for result, e in zip(backward(grad, *arguments, **options), expected, strict=True):
                torch.testing.assert_close(result, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "contract"),
    [
        ({"x": torch.zeros(2, 7, 24, dtype=torch.float64)}, "float32, bfloat16 or float16 tensors"),
        ({"a": torch.zeros(2, 6)}, "groups that divide the 24 channels, and as many in both tables or one"),
        ({"b": torch.zeros(5, 4)}, "groups that divide the 24 channels"),
        ({"a": torch.zeros(6)}, "numerator and denominator of two dimensions"),
        ({"a": torch.zeros(1, 9)}, "a contiguous numerator of 2 to 8 columns"),
        ({"b": torch.zeros(4, 3).t()}, "a contiguous denominator of 1 to 6 columns"),
        ({"bias": torch.zeros(23)}, "a contiguous bias of 24 numbers"),
        ({"gate": torch.zeros(2, 7, 23)}, "gate of x's shape and dtype"),
        ({"gate": torch.zeros(2, 7, 24, dtype=BFLOAT16)}, "gate of x's shape and dtype"),
        ({"form": 4}, "form 0 to 3"),
        ({"channel_dim": 3}, "channel_dim among x's 3 dimensions"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
        ({"form": D, "seed": None}, "a seed of one int64"),
        ({"dropout": 0.5, "seed": torch.zeros(1)}, "a seed of one int64"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], contract: str) -> None:
    grad, inputs, options = Case().arguments()
    named = dict(zip(("x", "a", "b", "bias", "gate"), inputs, strict=True))
    inputs = [change.get(name, t) for name, t in named.items()]
    options |= {key: value for key, value in change.items() if key not in named}
    with pytest.raises(ValueError, match=f"^rational: expected {contract}"):
        forward(*inputs, **options)
    with pytest.raises(ValueError, match=f"^rational_backward: expected {contract}"):
        backward(grad, *inputs, **options)


def test_refusal_of_a_gradient() -> None:
    grad, inputs, options = Case().arguments()
    with pytest.raises(ValueError, match=r"^rational_backward: expected grad of x's shape and dtype"):
        backward(grad[:1], *inputs, **options)
