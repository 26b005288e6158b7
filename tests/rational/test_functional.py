# SPDX-License-Identifier: Apache-2.0
"""The rational function in PyTorch: values, gradients, layouts, dtypes, randomness, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from singlepass.functional import rational
from singlepass.reference import rational as reference

from ..tolerances import assert_same_bits
from .golden import FILE as GOLDEN
from .inputs import LAYOUTS, NAMES, Place, check, each_kernel, make

FORMS = "ABCD"
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_kernel
@each_layout
@each_form
@each_dtype
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_against_float64(place: Place, layout: str, form: str, dtype: torch.dtype, fused: bool) -> None:
    inputs = make(layout, form, dtype, fused=fused, device=place.device)
    results = inputs.results(place.backend)
    check(results, inputs.bounds(), place.backend)
    assert results[0].stride() == results[1].stride() == torch.empty_like(inputs.x).stride()


@each_layout
@each_form
def test_the_reference_is_within_the_same_bounds(layout: str, form: str) -> None:
    inputs = make(layout, form, fused=True)
    check(inputs.results("eager"), inputs.bounds(), "eager")


@each_kernel
@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (8, 8), (1, 24), (24, 24), (3, 3), (1, 6)], ids=str)
@pytest.mark.parametrize("degrees", [(5, 4), (1, 1), (3, 2), (2, 5), (7, 6)], ids=str)
def test_groups_and_degrees(place: Place, rows: tuple[int, int], degrees: tuple[int, int]) -> None:
    for layout in ("rows", "planes"):
        inputs = make(layout, "B", rows=rows, degrees=degrees, device=place.device)
        check(inputs.results(place.backend), inputs.bounds(), f"{place.backend} {layout}")


@each_kernel
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 7), (33, 3), (129, 3), (768, 8), (1000, 8), (96, 32)])
def test_channel_counts(place: Place, channels: int, groups: int) -> None:
    for layout in ("rows", "planes", "channels_last"):
        inputs = make(layout, channels=channels, rows=(1, groups), fused=True, device=place.device)
        check(inputs.results(place.backend), inputs.bounds(), f"{place.backend} {layout}")


@each_kernel
@each_dtype
def test_coefficients_have_their_own_dtype(place: Place, dtype: torch.dtype) -> None:
    for tables in NAMES:
        inputs = make("rows", "A", dtype, tables=tables, fused=True, device=place.device)
        results = inputs.results(place.backend)
        assert [t.dtype for t in results] == [dtype, dtype, tables, tables, tables, dtype]
        check(results, inputs.bounds(), f"{place.backend} {tables}")


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda c: f"{c['form']}{len(c['numerator']) - 1}")
def test_values_of_rational_activations(case: dict[str, Any]) -> None:
    """D is B in eval."""

    def tensor(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(case[name], dtype=dtype)

    x, grad = tensor("x"), tensor("grad")
    a, b = (tensor(name).unsqueeze(0).requires_grad_() for name in ("numerator", "denominator"))
    x.requires_grad_()
    y = rational(x, a, b, form=case["form"], training=False)
    grads = torch.autograd.grad(y, (x, a, b), grad)
    for got, name in zip((y, *grads), ("y", "grad_x", "grad_numerator", "grad_denominator"), strict=True):
        torch.testing.assert_close(got.detach().flatten(), tensor(name), rtol=1e-11, atol=1e-11)


@each_form
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradcheck(form: str, fused: bool) -> None:
    inputs = make("planes", form, fused=fused, channels=4, rows=(1, 2))
    leaves = [t.detach().double().requires_grad_() for t in inputs.leaves]

    def call(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        options = {"form": form, "channel_dim": 1, "dropout": inputs.dropout, "seed": 5}
        return rational(x, a, b, bias=bias, gate=gate, **options)

    assert torch.autograd.gradcheck(call, leaves)


@each_kernel
def test_derivatives_of_absolute_values_at_zero_are_one(place: Place) -> None:
    """As in KAT's kernels: coefficients of the denominator that start at zero get a gradient."""
    x = torch.tensor([0.0, -0.0, 2.0, -2.0], device=place.device, requires_grad=True)
    a = torch.tensor([[0.5, 1.0]], device=place.device)
    b = torch.zeros(1, 2, device=place.device, requires_grad=True)
    y = rational(x, a, b, channel_dim=0, backend=place.backend)
    (grad_b,) = torch.autograd.grad(y.sum(), b)
    torch.testing.assert_close(grad_b.cpu(), torch.tensor([[-2 * 2.5 + 2 * 1.5, -4 * 2.5 + 4 * 1.5]]))
    ones = torch.ones(1, 2, device=place.device)
    for results in (
        rational(x, a, ones, channel_dim=0, backend=place.backend),
        reference.rational(x, a, ones, None, None, form=0, channel_dim=0),
    ):
        (grad_x,) = torch.autograd.grad(results.sum(), x)
        torch.testing.assert_close(grad_x[:2].cpu(), torch.tensor([0.5, 0.5]))


@each_kernel
@each_dtype
def test_large_and_not_finite_values(place: Place, dtype: torch.dtype) -> None:
    for form in FORMS[:3]:
        inputs = make("rows", form, dtype, device=place.device, requires_grad=False)
        inputs.x.mul_(3000.0)
        inputs.x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")], device=place.device)
        y, eager = inputs.call(place.backend), inputs.call("eager")
        truth = reference.rational(
            inputs.x.double(),
            inputs.numerator.double(),
            inputs.denominator.double(),
            None,
            None,
            form=FORMS.index(form),
            channel_dim=-1,
        )
        assert torch.equal(y.isnan(), eager.isnan())
        limit = torch.finfo(dtype).max
        assert bool((y.isfinite() | y.isnan() | (truth.abs() > limit)).all())


@each_kernel
@each_layout
def test_dropout_is_reproducible_and_unbiased(place: Place, layout: str) -> None:
    inputs = make(layout, fused=True, device=place.device, requires_grad=False)
    assert_same_bits(inputs.call(place.backend), inputs.call(place.backend))
    zeros = inputs.call(place.backend) == 0
    assert torch.equal(zeros, inputs.call("eager") == 0)
    assert not bool((inputs.call(place.backend, training=False) == 0).any())


@each_kernel
def test_random_numbers(place: Place) -> None:
    x = torch.ones(200_000, 8, device=place.device)
    a, b = torch.tensor([[0.0, 1.0]], device=place.device), torch.zeros(1, 1, device=place.device)
    torch.manual_seed(0)
    first = rational(x, a, b, dropout=0.25, backend=place.backend)
    second = rational(x, a, b, dropout=0.25, backend=place.backend)
    assert not torch.equal(first, second), "every call draws its own"
    torch.manual_seed(0)
    assert_same_bits(first, rational(x, a, b, dropout=0.25, backend=place.backend))
    count, deviation = x.numel(), (x.numel() * 0.25 * 0.75) ** 0.5
    assert abs(int((first == 0).sum()) - 0.25 * count) < 5 * deviation
    assert first.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    noisy = rational(x, a, b, form="D", backend=place.backend)
    assert 0.8999999 <= float(noisy.min()) < 0.901
    assert 1.099 < float(noisy.max()) < 1.1
    assert abs(float(noisy.double().mean()) - 1.0) < 5 * 0.0577 / count**0.5  # a uniform number's deviation


@each_kernel
@pytest.mark.slow("twenty million elements in float64")
def test_coefficient_gradients_over_many_elements(place: Place) -> None:
    """Sums of as many terms of one sign are exact but for their own rounding, and what those of terms have in common:
    float32 sums of long runs would be off by hundreds of units."""
    n, generator = 20_000_000, torch.Generator().manual_seed(0)
    x, grad, a, b = (torch.rand(*shape, generator=generator) for shape in ((n, 1), (n, 1), (1, 6), (1, 4)))
    truth = [torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)]
    for part, g in zip(x.split(1_000_000), grad.split(1_000_000), strict=True):
        options = {"form": 0, "channel_dim": -1}
        found = reference.rational_backward(g.double(), part.double(), a.double(), b.double(), None, None, **options)
        truth = [t + f for t, f in zip(truth, found[1:3], strict=True)]
    inputs = [t.to(place.device).requires_grad_() for t in (x, a, b)]
    y = rational(*inputs, backend=place.backend)
    for ours, exact in zip(torch.autograd.grad(y, inputs, grad.to(place.device))[1:], truth, strict=True):
        units = (ours.detach().double().cpu() / exact - 1.0).abs() * 2.0**24
        assert float(units.max()) < 4.0


@each_kernel
def test_the_same_bits_twice(place: Place) -> None:
    inputs = make("rows", channels=768, fused=True, device=place.device)
    for first, second in zip(inputs.results(place.backend), inputs.results(place.backend), strict=True):
        assert_same_bits(first, second)


@pytest.mark.serial
def test_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 4000, 24)
    inputs = [x.requires_grad_(), torch.randn(1, 6).requires_grad_(), torch.randn(8, 4).requires_grad_()]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = rational(*inputs, backend="native")
            results.append([y.detach(), *torch.autograd.grad(y, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@each_kernel
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (2, 24, 0)], ids=str)
def test_empty(place: Place, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=place.device, requires_grad=True)
    a, b = (torch.ones(1, 6), torch.ones(8, 4))
    a, b = (t.to(place.device).requires_grad_() for t in (a, b))
    y = rational(x, a, b, channel_dim=shape.index(24), backend=place.backend)
    assert y.shape == x.shape
    for grad in torch.autograd.grad(y.sum(), (x, a, b)):
        assert not bool(grad.any())


@each_kernel
def test_gradients_laid_out_differently(place: Place) -> None:
    """sum() gives an expanded gradient, a transposed product a transposed one."""
    inputs = make("planes", device=place.device)
    contiguous = inputs.results(place.backend)
    inputs.grad = inputs.grad.to(memory_format=torch.channels_last)
    for a, b in zip(contiguous, inputs.results(place.backend), strict=True):
        assert_same_bits(a, b)
    inputs.grad = torch.ones_like(inputs.grad)
    dense = inputs.results(place.backend)
    inputs.grad = torch.ones((), device=place.device).expand(inputs.grad.shape)
    for a, b in zip(dense, inputs.results(place.backend), strict=True):
        assert_same_bits(a, b)


def test_only_what_is_needed_has_a_gradient() -> None:
    inputs = make(requires_grad=False)
    inputs.denominator.requires_grad_()
    y = inputs.call("native")
    y.backward(inputs.grad)
    assert inputs.denominator.grad is not None
    assert inputs.x.grad is None
    assert inputs.numerator.grad is None


def test_nothing_but_the_inputs_is_saved() -> None:
    inputs = make(fused=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        inputs.call("native")
    own = {t.data_ptr() for t in inputs.leaves}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 1, "the seed"


def test_autocast_changes_nothing() -> None:
    for dtype in NAMES:
        inputs = make(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            inside = inputs.results("native")
        for a, b in zip(inside, inputs.results("native"), strict=True):
            assert_same_bits(a, b)


def test_double_backward_of_kernels_is_refused() -> None:
    """Also where the incoming gradient is a constant, and x depends on what is differentiated for."""
    for grad in (make().grad, make().grad.requires_grad_()):
        inputs = make()
        (first,) = torch.autograd.grad(inputs.call("native"), inputs.x, grad, create_graph=True)
        with pytest.raises(RuntimeError, match="rational: expected to be differentiated once"):
            first.square().sum().backward()
    scale = torch.ones(24, requires_grad=True)
    inputs = make(requires_grad=False)
    inputs.x = inputs.x * scale
    (first,) = torch.autograd.grad(inputs.call("native").sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="rational: expected to be differentiated once"):
        first.square().sum().backward()


def test_forward_mode_is_refused() -> None:
    """Kernels know nothing of tangents: they would be lost without a word."""
    x, a, b = torch.randn(3, 24), torch.randn(1, 6), torch.randn(8, 4)
    refused = pytest.raises(
        RuntimeError, match="rational: expected plain tensors and reverse mode for kernels; got a t"
    )
    with refused:
        torch.func.jvp(lambda x: rational(x, a, b, backend="native"), (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with refused:
            rational(x, a, b, gate=dual, backend="native")
        leaf = x.clone().requires_grad_()
        y = rational(leaf, a, b, backend="native")
        with refused:
            torch.autograd.grad(y, leaf, dual)
    _, tangent = torch.func.jvp(lambda x: rational(x, a, b, backend="eager"), (x,), (torch.ones_like(x),))
    (grad,) = torch.autograd.grad(rational(leaf, a, b, backend="eager").sum(), leaf)
    torch.testing.assert_close(tangent, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["x", "numerator", "denominator", "bias", "gate"])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_inputs_changed_before_backward_are_noticed(backend: str, name: str) -> None:
    inputs = make(fused=True, requires_grad=False)
    scale = torch.ones((), requires_grad=True)
    changed = getattr(inputs, name)
    inputs.x = inputs.x * scale
    y = inputs.call(backend)
    with torch.no_grad():
        (inputs.x if name == "x" else changed).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_kernel
def test_a_gate_that_is_x(place: Place) -> None:
    inputs = make(device=place.device)
    (x, a, b), options = inputs.leaves, {"form": inputs.form, "channel_dim": inputs.channel_dim}
    y = rational(x, a, b, gate=x, backend=place.backend, **options)
    (grad,) = torch.autograd.grad(y, x, inputs.grad)
    other = x.detach().clone().requires_grad_()
    apart = rational(x, a, b, gate=other, backend=place.backend, **options)
    assert_same_bits(y.detach(), apart.detach())
    assert_same_bits(grad, sum(torch.autograd.grad(apart, (x, other), inputs.grad)))


def _call(**changes: Any) -> Tensor:
    options: dict[str, Any] = {
        "x": torch.randn(2, 24),
        "numerator": torch.randn(1, 6),
        "denominator": torch.randn(8, 4),
    }
    options |= changes
    return rational(options.pop("x"), options.pop("numerator"), options.pop("denominator"), **options)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"form": "E"}, "expected form A, B, C or D; got 'E'"),
        ({"form": "AB"}, "expected form A, B, C or D"),
        ({"form": None}, "expected form A, B, C or D; got None"),
        ({"x": [1.0]}, "x as a dense tensor; got list"),
        ({"x": torch.ones(2, 24).to_sparse()}, "x as a dense tensor; got torch.sparse_coo"),
        ({"numerator": None}, "numerator as a dense tensor; got NoneType"),
        ({"denominator": [[1.0]]}, "denominator as a dense tensor; got list"),
        ({"bias": 1.0}, "bias as a dense tensor; got float"),
        ({"gate": "x"}, "gate as a dense tensor; got str"),
        ({"channel_dim": None}, "channel_dim among x's 2 dimensions; got None"),
        ({"channel_dim": 1.0}, "channel_dim among x's 2 dimensions; got 1.0"),
        ({"x": torch.ones(2, 24, dtype=torch.int64)}, "a floating-point x"),
        ({"x": torch.ones(2, 24, dtype=torch.complex64)}, "a floating-point x"),
        ({"x": torch.ones(())}, "channel_dim among x's 0 dimensions"),
        ({"channel_dim": 2}, "channel_dim among x's 2 dimensions; got 2"),
        ({"channel_dim": -3}, "channel_dim among x's 2 dimensions; got -3"),
        ({"numerator": torch.randn(6)}, r"numerator of shape \(groups, 2 to 8\); got \(6,\)"),
        ({"numerator": torch.randn(1, 9)}, r"numerator of shape \(groups, 2 to 8\); got \(1, 9\)"),
        ({"denominator": torch.randn(8, 7)}, r"denominator of shape \(groups, 1 to 6\); got \(8, 7\)"),
        ({"denominator": torch.randn(8, 8), "form": "C"}, r"denominator of shape \(groups, 2 to 7\) for form C"),
        ({"numerator": torch.randn(4, 6)}, "as many groups in numerator and denominator"),
        ({"numerator": torch.randn(0, 6)}, "as many groups"),
        ({"denominator": torch.randn(5, 4)}, "a number of groups that divides x's 24 channels; got 5"),
        ({"denominator": torch.ones(8, 4, dtype=torch.int32)}, "a floating-point denominator"),
        ({"denominator": torch.randn(8, 4, device="meta")}, "denominator on cpu, as x; got meta"),
        ({"bias": torch.randn(8)}, r"bias of shape \(24,\), one per channel; got \(8,\)"),
        ({"gate": torch.randn(2, 23)}, r"gate as x, \(2, 24\) of torch.float32 on cpu"),
        ({"gate": torch.randn(2, 24).half()}, "gate as x"),
        ({"dropout": 1.0}, "0 <= dropout < 1; got 1.0"),
        ({"dropout": -0.1}, "0 <= dropout < 1"),
        ({"dropout": float("nan")}, "0 <= dropout < 1"),
        ({"dropout": None}, "0 <= dropout < 1; got None"),
        ({"dropout": "half"}, "0 <= dropout < 1; got half"),
        ({"dropout": 0.5, "seed": 2**63}, "seed as one int64; got 9223372036854775808"),
        ({"dropout": 0.5, "seed": 1.5}, r"seed as one int64 on cpu; got 1\.5"),
        ({"dropout": 0.5, "seed": torch.tensor([1, 2])}, "seed as one int64 on cpu"),
        ({"backend": "cuda"}, "backend among native, triton, eager; got 'cuda'"),
    ],
)
def test_errors(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _call(**changes)


def test_an_explicit_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"kernels take float32, bfloat16 and float16, not torch\.float64"):
        _call(x=torch.randn(2, 24, dtype=torch.float64), backend="native")
    assert _call(x=torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64
