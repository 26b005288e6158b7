# SPDX-License-Identifier: Apache-2.0
"""Float64 arrays that carry a bound of the error that the same formula makes in float32.

Running error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.3): each operation
adds half an ulp of its result to what its operands bring. So the tolerance of a test follows from the formula and the
data, element by element, and none is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

HALF_ULP = 2.0**-24  # of float32, relative
SMALLEST = 2.0**-149  # float32's spacing near zero

# Bits of precision, and the exponent of the spacing near zero, of what tensors are stored in.
STORAGE = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}

Operand = Any  # Bounded, or a float that is a coefficient of the formula


class Bounded:
    """``value`` in float64, and ``error``: how far a float32 computation of it may be off.

    A Python float among the operands is a coefficient, made in double precision and rounded to float32 once.
    """

    __array_ufunc__ = None  # so that ndarray leaves binary operations to this class

    def __init__(self, value: Any, error: Any = 0.0) -> None:
        self.value = np.asarray(value, np.float64)
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    @staticmethod
    def of(x: Operand) -> Bounded:
        return x if isinstance(x, Bounded) else Bounded(x, HALF_ULP * abs(x))

    @staticmethod
    def rounded(value: Any, error: Any) -> Bounded:
        # An exact zero stays exact: 0 * x and 0 / x round nothing.
        return Bounded(value, error + np.where(value == 0.0, 0.0, HALF_ULP * np.abs(value) + SMALLEST))

    def __getitem__(self, index: slice) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def __add__(self, other: Operand) -> Bounded:
        other = Bounded.of(other)
        return Bounded.rounded(self.value + other.value, self.error + other.error)

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error)

    def __sub__(self, other: Operand) -> Bounded:
        return self + -Bounded.of(other)

    def __mul__(self, other: Operand) -> Bounded:
        other = Bounded.of(other)
        error = np.abs(self.value) * other.error + (np.abs(other.value) + other.error) * self.error
        return Bounded.rounded(self.value * other.value, error)

    def __truediv__(self, other: Operand) -> Bounded:
        other = Bounded.of(other)
        quotient = self.value / other.value
        smallest_divisor = np.maximum(np.abs(other.value) - other.error, 0.0)
        error = self.error + np.abs(quotient) * other.error
        with np.errstate(divide="ignore"):  # nothing is known where the divisor may be zero
            bound = np.divide(error, smallest_divisor, where=error > 0.0, out=np.zeros_like(error))
        return Bounded.rounded(quotient, bound)

    def __radd__(self, other: float) -> Bounded:
        return self + other

    def __rsub__(self, other: float) -> Bounded:
        return Bounded.of(other) - self

    def __rmul__(self, other: float) -> Bounded:
        return self * other

    def __rtruediv__(self, other: float) -> Bounded:
        return Bounded.of(other) / self

    def stored(self, dtype: str) -> Bounded:
        """After rounding to the nearest ``dtype``."""
        precision, smallest = STORAGE[dtype]
        magnitude = np.abs(self.value) + self.error
        _, exponent = np.frexp(magnitude)
        half_ulp = np.ldexp(0.5, np.maximum(exponent - precision, smallest))
        return Bounded(self.value, self.error + np.where(magnitude == 0.0, 0.0, half_ulp))


def concatenate(pieces: Iterable[Bounded]) -> Bounded:
    pieces = list(pieces)
    return Bounded(np.concatenate([x.value for x in pieces]), np.concatenate([x.error for x in pieces]))


def sqrt(x: Bounded) -> Bounded:
    root = np.sqrt(x.value)
    least, most = np.sqrt(np.maximum(x.value - x.error, 0.0)), np.sqrt(x.value + x.error)
    return Bounded.rounded(root, np.maximum(most - root, root - least))


def sign(x: Bounded) -> Bounded:
    """Where the error may turn the sign, either sign is right."""
    return Bounded(np.sign(x.value), np.where(np.abs(x.value) <= x.error, 2.0 * (x.error > 0.0), 0.0))


def maximum(x: Bounded, y: Bounded) -> Bounded:
    return Bounded(np.maximum(x.value, y.value), np.maximum(x.error, y.error))


def absolute(x: Bounded) -> Bounded:
    return Bounded(np.abs(x.value), x.error)


def one_plus_exp_negative(x: Bounded) -> Bounded:
    """Within two ulp, as common/math.h promises and common_test.cpp checks."""
    exp = np.exp(-x.value)
    return Bounded(1.0 + exp, exp * np.expm1(x.error) + 4.0 * HALF_ULP)


def norm(x: Bounded) -> Bounded:
    """Euclidean norm, summed in double precision."""
    return Bounded(np.linalg.norm(x.value.ravel()), np.linalg.norm(x.error.ravel()))
