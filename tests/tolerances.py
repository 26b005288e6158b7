# SPDX-License-Identifier: Apache-2.0
"""How far a kernel may be from the truth: one table, one rule, element by element.

    err(kernel, truth) <= k * err(eager, truth) + n ulp

The truth is computed in float64; eager is the reference in the kernel's own dtypes, from the same inputs. An ulp is the
spacing of the tensor's dtype at the truth; for a tensor that is updated in place, at |truth| + |what stood there
before|, which is no less than the update: where the two nearly cancel, nothing is more exact than they were. Eager
itself is held to an error bound derived from the formula, so that being wrong together doesn't help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    k: float
    n: float
    reason: str


_SAME_BITS = Tolerance(1, 0, "products and sums alone, in eager's order: the same bits")
_ROOT = Tolerance(
    2,
    3,
    "the kernel's root is correctly rounded, ATen's vectorised one is not always: an ulp, with which two of the "
    "operations after it may round the other way; k = 2 because luck with roundings is not on one side",
)

TOLERANCES = {
    "adamw_step_": _ROOT,
    "lion_step_": _SAME_BITS,
    "adabelief_step_": _ROOT,
    "adan_step_": _ROOT,
    "diffgrad_step_": Tolerance(2, 3, "as for a root; the friction's denominator is within two ulp"),
    "lamb_step_": Tolerance(2, 3, "as for a root; norms are summed in float64 in another order, and rounded once"),
    "lars_step_": Tolerance(
        2,
        3,
        "norms are summed in another order, those of gradients before or after these are scaled and rounded: the rate "
        "may be rounded the other way, by an ulp of it that is up to two of its product, which is rounded, too",
    ),
    "sgdsai_step_": _SAME_BITS,
    "grad_norm": Tolerance(2, 1, "summed in float64 in another order, then rounded once"),
    "spectral_step_": Tolerance(
        2,
        4,
        "as for a root; the norm is summed in float64 in another order and rounded once, and one more product is",
    ),
    "stream_": Tolerance(1, 0, "values stay what they are"),
}

# For torch.testing.assert_close. Values worked out by hand: numbers around one, and up to ten float32 roundings.
BY_HAND = {"rtol": 2e-6, "atol": 1e-8}


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at float64 values, subnormals included."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs())
    spacing = torch.ldexp(torch.full_like(x, info.eps), exponent - 1)
    return spacing.clamp(min=info.smallest_normal * info.eps)


def assert_close(
    op: str, actual: Tensor, eager: Tensor, truth: Tensor, *, before: Tensor | None = None, label: str = ""
) -> None:
    """Applies the rule to one tensor. ``before``: what the tensor held before an in-place op."""
    assert actual.dtype == eager.dtype, f"{label}: dtype {actual.dtype}, not {eager.dtype}"
    assert actual.shape == truth.shape, f"{label}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    tolerance = TOLERANCES[op]
    truth = truth.cpu()
    magnitude = truth.abs() if before is None else truth.abs() + before.double().cpu().abs()
    off, eager_off = (actual.double().cpu() - truth).abs(), (eager.double().cpu() - truth).abs()
    allowed = tolerance.k * eager_off + tolerance.n * ulp(magnitude, actual.dtype)
    _report(~(off <= allowed), actual, truth, allowed, label or op)


def assert_within(actual: Tensor, truth: Tensor, allowed: Tensor, label: str) -> None:
    """``|actual - truth| <= allowed``, element by element."""
    assert actual.shape == truth.shape, f"{label}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    truth, allowed = truth.cpu(), allowed.cpu()
    _report(~((actual.double().cpu() - truth).abs() <= allowed), actual, truth, allowed, label)


def _report(wrong: Tensor, actual: Tensor, truth: Tensor, allowed: Tensor, label: str) -> None:
    if not wrong.any():
        return
    i = int(wrong.flatten().nonzero()[0])
    got, expected, bound = (float(t.flatten()[i]) for t in (actual.detach().double().cpu(), truth, allowed))
    raise AssertionError(
        f"{label}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; "
        f"element {i} is {got!r}, expected {expected!r} within {bound:.3g}"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are the same: NaNs are equal, zeros of different sign are not."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(*(t.detach().cpu().contiguous().view(bits) for t in (a, b)))


def assert_same_bits(a: Tensor, b: Tensor, label: str = "") -> None:
    assert same_bits(a, b), f"{label}: other bits than expected:\n{a}\n{b}"
