# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels and launchers on the CPU, and the C++ engine, against rational functions in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest

from ..rational.truth import Problem, Truth, truth
from .arrays import DTYPES, Array, assert_same_bits, decode, encode
from .bounded import Bounded

FORMS = "ABCD"
GAP = 8  # elements between rows that nothing may touch
SENTINEL = 77.0


@dataclass(frozen=True)
class Case:
    form: str = "A"
    dtype: str = "float32"
    outer: int = 5
    channels: int = 48
    inner: int = 1
    rows: tuple[int, int] = (1, 3)
    degrees: tuple[int, int] = (5, 4)
    bias: bool = False
    gate: bool = False
    threshold: int = 0
    gap: int = GAP
    misalignment: int = 0
    scale: float = 2.0

    def __str__(self) -> str:
        flags = [name for name in ("bias", "gate", "threshold") if getattr(self, name)]
        shape = f"{self.outer}x{self.channels}x{self.inner}"
        parts = [self.form, self.dtype, shape, *self.rows, *self.degrees, *flags, self.misalignment or ""]
        return "-".join(str(part) for part in parts if part != "")


class Run:
    """One case with its arrays, on an engine."""

    def __init__(self, core: ModuleType, case: Case, seed: int = 0) -> None:
        self.core, self.case = core, case
        rng = np.random.default_rng(seed)
        pitch = case.channels * case.inner + case.gap
        self.sentinel = encode(np.full((case.outer, pitch), SENTINEL), case.dtype)

        def tensor(scale: float = 1.0) -> Array:
            return encode(scale * rng.standard_normal((case.outer, pitch)), case.dtype)

        m, n = case.degrees
        self.x, self.grad = tensor(case.scale), tensor()
        self.a = encode(rng.standard_normal((case.rows[0], m + 1)), "float32")
        self.b = encode(rng.standard_normal((case.rows[1], n + (case.form == "C"))), "float32")
        self.bias = encode(rng.standard_normal(case.channels), "float32") if case.bias else None
        self.gate = tensor() if case.gate else None

    def options(self, device: str, threads: int = 64, items: int = 2, blocks: int = 6, **changes: int) -> object:
        case = self.case
        place = {"threads": threads, "items": items, "blocks": blocks, "partial_bytes": 1 << 20, "workers": 2}
        return self.core.RationalOptions(
            device,
            form=FORMS.index(case.form),
            channels=case.channels,
            inner=case.inner,
            dropout_threshold=case.threshold,
            seed=12345678901234,
            misalignment=case.misalignment,
            **(place | changes),
        )

    def forward(self, options: object) -> Array:
        y = self.core.rational(self.x, self.a, self.b, self.bias, self.gate, self.sentinel, options)
        return self._without_gap(y)

    def backward(self, options: object) -> list[Array]:
        grads = self.core.rational_backward(
            self.grad, self.x, self.a, self.b, self.bias, self.gate, self.sentinel, options
        )
        return [self._without_gap(grad) if grad.shape == self.sentinel.shape else grad for grad in grads]

    def _without_gap(self, array: Array) -> Array:
        used = self.case.channels * self.case.inner
        assert_same_bits([array[:, used:]], [self.sentinel[:, used:]])
        return np.ascontiguousarray(array[:, :used]).reshape(self.case.outer, self.case.channels, self.case.inner)

    def truth(self) -> Truth:
        def exact(array: Array | None) -> np.ndarray | None:
            if array is None or array.shape != self.sentinel.shape:
                return None if array is None else decode(array)
            used = self.case.channels * self.case.inner
            return decode(array[:, :used]).reshape(self.case.outer, self.case.channels, self.case.inner)

        a, b = decode(self.a), decode(self.b)
        x, grad, gate, bias = map(exact, (self.x, self.grad, self.gate, self.bias))
        return truth(Problem(self.case.form, x, a, b, bias, gate, grad, self.case.threshold, 12345678901234))


def check(array: Array, expected: Bounded, dtype: str, label: str) -> None:
    bound = expected.stored(dtype)
    off = np.abs(decode(array).reshape(bound.value.shape) - bound.value)
    wrong = np.flatnonzero(~(off <= bound.error))
    assert wrong.size == 0, f"{label}: {wrong.size} of {off.size} off, the first at {wrong[0]}"


def check_all(run: Run, options: object) -> None:
    expected = run.truth()
    check(run.forward(options), expected.y, run.case.dtype, "y")
    grads = run.backward(options)
    assert len(grads) == len(expected.grads)
    for i, (grad, bound) in enumerate(zip(grads, expected.grads, strict=True)):
        like_x = grad.ndim == 3
        check(grad, bound, run.case.dtype if like_x else "float32", f"gradient {i}")


SHAPES = [
    {"outer": 5, "channels": 48, "inner": 1, "rows": (1, 3)},  # vectors, several groups in a block
    {"outer": 70, "channels": 8, "inner": 1, "rows": (1, 1)},  # one vector per row
    {"outer": 3, "channels": 1280, "inner": 1, "rows": (2, 1)},  # groups wider than a block
    {"outer": 7, "channels": 33, "inner": 1, "rows": (3, 3)},  # odd: no vectors
    {"outer": 4, "channels": 6, "inner": 1, "rows": (1, 6)},  # a group per channel
    {"outer": 2, "channels": 6, "inner": 40, "rows": (3, 1)},  # planes of vectors
    {"outer": 3, "channels": 4, "inner": 49, "rows": (1, 2)},  # odd planes
    {"outer": 1, "channels": 1, "inner": 1, "rows": (1, 1)},
]
each_device = pytest.mark.parametrize("device", ["simt", "cpu"])


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, list(shape.values())[:3])))
def test_values_and_gradients(core: ModuleType, device: str, dtype: str, form: str, shape: dict) -> None:
    for fused in ({}, {"bias": True, "gate": True, "threshold": 20000}):
        run = Run(core, Case(form, dtype, **shape, **fused))
        check_all(run, run.options(device))


@each_device
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (2, 5), (7, 6)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_other_degrees(core: ModuleType, device: str, form: str, degrees: tuple[int, int]) -> None:
    for shape in (SHAPES[0], SHAPES[6]):
        run = Run(core, Case(form, **shape, degrees=degrees))
        check_all(run, run.options(device))


@each_device
@pytest.mark.parametrize("fused", ["bias", "gate", "threshold"])
def test_each_fusion_alone(core: ModuleType, device: str, fused: str) -> None:
    for shape in (SHAPES[0], SHAPES[5]):
        for dtype in ("float32", "bfloat16"):
            run = Run(core, Case("B", dtype, **shape, **{fused: 30000 if fused == "threshold" else True}))
            check_all(run, run.options(device))


@each_device
@pytest.mark.parametrize("misalignment", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(core: ModuleType, device: str, dtype: str, misalignment: int) -> None:
    for shape in (SHAPES[0], SHAPES[5]):
        run = Run(core, Case("A", dtype, **shape, misalignment=misalignment))
        check_all(run, run.options(device))


@each_device
@pytest.mark.parametrize("gap", [0, 1, 4])
def test_rows_with_gaps_of_any_size(core: ModuleType, device: str, gap: int) -> None:
    run = Run(core, Case("C", "bfloat16", **SHAPES[0], gap=gap))
    check_all(run, run.options(device))


@each_device
def test_coefficients_of_16_bits(core: ModuleType, device: str) -> None:
    for dtype in ("bfloat16", "float16"):
        run = Run(core, Case("A", dtype, **SHAPES[0], bias=True))
        run.a, run.b = encode(run.a, dtype), encode(run.b, dtype)
        run.bias = encode(run.bias, dtype)
        expected, options = run.truth(), run.options(device)
        check(run.forward(options), expected.y, dtype, "y")
        for i, (grad, bound) in enumerate(zip(run.backward(options), expected.grads, strict=True)):
            check(grad, bound, dtype, f"gradient {i}")


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_do_not_overflow(core: ModuleType, device: str, dtype: str) -> None:
    for form in "ABC":
        for degrees in ((5, 4), (7, 6)):
            run = Run(core, Case(form, dtype, **SHAPES[0], degrees=degrees, scale=4000.0))
            options = run.options(device)
            y = decode(run.forward(options))
            limit = 65504.0 if dtype == "float16" else np.inf
            assert bool((np.isfinite(y) | (np.abs(run.truth().y.value) > limit)).all())
            expected = run.truth()
            finite = np.isfinite(decode(run.backward(options)[0]))
            assert bool((finite | (np.abs(expected.grads[0].value) > limit)).all())


@each_device
def test_schedules_and_threads_do_not_matter(core: ModuleType, device: str) -> None:
    for shape in (SHAPES[0], SHAPES[1], SHAPES[5]):
        run = Run(core, Case("A", **shape, bias=True, gate=True, threshold=9000))
        results = []
        for seed in range(4):
            core.set_seed(seed)
            options = run.options(device, workers=1 + seed)
            results.append([run.forward(options), *run.backward(options)])
        for other in results[1:]:
            assert_same_bits(results[0], other)


def test_launch_shapes_change_sums_alone(core: ModuleType) -> None:
    for shape in (SHAPES[0], SHAPES[2], SHAPES[5]):
        run = Run(core, Case("B", "bfloat16", **shape))
        elementwise = []
        for threads, items, blocks, partial_bytes in [(32, 1, 1, 1), (64, 2, 6, 1 << 20), (256, 8, 528, 1 << 20)]:
            options = run.options("simt", threads, items, blocks, partial_bytes=partial_bytes)
            check_all(run, options)
            elementwise.append([run.forward(options), run.backward(options)[0]])
        for other in elementwise[1:]:
            assert_same_bits(elementwise[0], other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", [40, 49])
def test_threads_that_go_through_many_planes(core: ModuleType, inner: int, dtype: str) -> None:
    """Some of their steps end one plane later than others."""
    for fused in ({}, {"bias": True, "gate": True, "threshold": 20000}):
        run = Run(core, Case("A", dtype, outer=23, channels=2, inner=inner, rows=(2, 1), **fused))
        check_all(run, run.options("simt", threads=32, blocks=2))


def test_both_engines_drop_the_same_elements(core: ModuleType) -> None:
    """The rest may differ in the last bits: the CPU has fused multiply-adds, the kernels on it have not."""
    total, number = 0, 0
    for form in FORMS:
        for shape in SHAPES:
            run = Run(core, Case(form, "float32", **shape, bias=True, gate=True, threshold=5000))
            simt, cpu = run.options("simt"), run.options("cpu")
            pairs = [(run.forward(simt), run.forward(cpu))]
            gradients = run.backward(simt), run.backward(cpu)
            pairs += [(gradients[0][i], gradients[1][i]) for i in (0, 4)]
            for one, other in pairs:
                dropped = decode(one) == 0.0
                assert np.array_equal(dropped, decode(other) == 0.0)
                total, number = total + dropped.sum(), number + dropped.size
    assert total / number == pytest.approx(5000 / 65536, abs=0.02)


def test_launches(core: ModuleType) -> None:
    run = Run(core, Case(**SHAPES[0], bias=True))
    before = core.launches()
    run.forward(run.options("simt"))
    assert core.launches() - before == 1
    run.backward(run.options("simt"))
    assert core.launches() - before == 3


@each_device
def test_nothing_to_do(core: ModuleType, device: str) -> None:
    for shape in (
        replace(Case(**SHAPES[0]), outer=0),
        Case(channels=0, gap=8, rows=(1, 1)),
        Case(inner=0, rows=(1, 3)),
    ):
        run = Run(core, replace(shape, bias=True))
        assert run.forward(run.options(device)).size == 0
        grads = run.backward(run.options(device))
        assert all(not grad.any() for grad in grads)
        assert grads[1].shape == run.a.shape


@each_device
def test_values_that_are_not_finite(core: ModuleType, device: str) -> None:
    run = Run(core, Case(**SHAPES[0], gap=0))
    clean = decode(run.forward(run.options(device)))
    special = [np.nan, np.inf, -np.inf]
    run.x[0, :3] = special
    y = decode(run.forward(run.options(device)))
    assert bool(np.isnan(y[0, :3]).all())  # inf / inf
    np.testing.assert_array_equal(y.reshape(-1)[3:], clean.reshape(-1)[3:])
    grad_x, grad_a, *_ = map(decode, run.backward(run.options(device)))
    assert bool(np.isnan(grad_x[0, :3]).all())
    assert bool(np.isfinite(grad_x.reshape(-1)[3:]).all())
    assert bool(np.isnan(grad_a).all())
