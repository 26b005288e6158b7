# SPDX-License-Identifier: Apache-2.0
"""Rational functions of least maximum error, by the differential correction algorithm.

Within |f - P/Q| <= E, that is |f Q - P| <= E Q, everything is linear in the coefficients once E is fixed and Q > 0. So,
from an approximation P_k / Q_k of error E_k, the linear program

    minimise w  subject to  |f Q - P| - E_k Q <= w Q_k  at every node

finds a better one as long as there is any (Cheney and Loeb, Numer. Math. 3, 1961; Barrodale, Powell and Roberts, SIAM
J. Numer. Anal. 9, 1972): no local minima, no start to choose, quadratic convergence. The forms' conditions, |b| >= 0 in
A and a polynomial >= 0 in B and C, are further constraints. NumPy and SciPy are imported when a fit is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import message, require
from ..reference.rational import C_OFFSET
from ._tables import Table, check_form, evaluate, second_moment

_NODES = 150  # per side of zero, denser towards its ends
_CHECKS = 20001  # at which errors are measured
_STEPS = 60
_EXACT = 1e-9  # relative error that rounding to float32 drowns
_BOUND = {"A": 1e5, "B": 1e5, "C": 1e4}  # of denominator coefficients on |t| <= 1: Q(0) may be that much smaller
_GROWTH, _LEAST_GROWTH = 3.0, 1e-2  # of coefficients in a step: keeps the program's numbers within its solver's reach
_FAR = 1e8
_TOLERANCE = 1e-10


@dataclass
class _Problem:
    """f at the nodes and the bases: P = T a, Q = offset + D b, where every row of S b is at least 0."""

    y: Any
    t_basis: Any
    d_basis: Any
    signs: Any
    offset: float
    bound: float
    nonnegative: bool


def _modules() -> tuple[Any, Any]:
    try:
        import numpy as np
        from scipy.optimize import linprog
    except ImportError as error:
        remedy = "Install them: pip install numpy scipy."
        raise ImportError(message("fit_rational", "NumPy and SciPy", str(error), remedy)) from error
    return np, linprog


def _sample(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    np, _ = _modules()
    contract, remedy = "an elementwise fn of a one-dimensional float64 tensor", "Wrap it in a function that is one."
    try:
        with torch.no_grad():
            y = fn(torch.from_numpy(x.copy()))
    except (RuntimeError, TypeError) as error:
        raise ValueError(message("fit_rational", contract, f"{type(error).__name__}: {error}", remedy)) from error
    y = np.asarray(y.numpy(force=True) if isinstance(y, Tensor) else y, dtype=np.float64)
    fits = y.shape == x.shape and bool(np.isfinite(y).all())
    got = f"shape {y.shape}, finite {bool(np.isfinite(y).all())}"
    remedy = "It is called with a one-dimensional float64 tensor."
    require(fits, "fit_rational", f"finite values of shape {x.shape} from fn", got, remedy)
    return y


def _nodes(low: float, high: float) -> Any:
    """Chebyshev's, on each side of zero by itself: there denominators and many activations have their kink."""
    np, _ = _modules()
    rising = (1.0 - np.cos(np.linspace(0.0, np.pi, _NODES))) / 2.0
    if low < 0.0 < high:
        return np.unique(np.concatenate([low * rising, high * rising]))
    return low + (high - low) * rising


def _problem(fn: Callable[[Tensor], Tensor], form: str, degrees: tuple[int, int], low: float, high: float) -> _Problem:
    np, _ = _modules()
    x = _nodes(low, high)
    scale = max(abs(low), abs(high))
    powers = np.arange(0 if form == "C" else 1, degrees[1] + 1)

    def basis(t: Any) -> Any:
        return (np.abs(t) if form == "A" else t)[:, None] ** powers

    # Forms B and C: the polynomial within |.| is held at or above zero on the whole line. Beyond the interval it would
    # otherwise soon cross zero, where Q collapses to its least and the activation shoots up.
    far = np.geomspace(1.0, _FAR, 80)
    signs = basis(np.concatenate([x / scale, far, -far]))
    return _Problem(
        y=_sample(fn, x),
        t_basis=np.polynomial.chebyshev.chebvander((2.0 * x - low - high) / (high - low), degrees[0]),
        d_basis=basis(x / scale),
        signs=signs / np.maximum(np.abs(signs).max(axis=1, keepdims=True), 1e-300),
        offset=C_OFFSET if form == "C" else 1.0,
        bound=_BOUND[form],
        nonnegative=form == "A",
    )


def _program(problem: _Problem, a: Any, b: Any, error: float, growth: float) -> tuple[Any, ...]:
    """The linear program of one step: cost, rows, limits, bounds. Unknowns are the changes of a and b in units of the
    error, so that its numbers are near 1 at any accuracy, and w.
    """
    np, _ = _modules()
    q = problem.offset + problem.d_basis @ b
    r = problem.y * q - problem.t_basis @ a
    change = np.hstack([-problem.t_basis, problem.y[:, None] * problem.d_basis])
    slack = np.hstack([np.zeros_like(problem.t_basis), error * problem.d_basis])
    rows = [np.hstack([change - slack, -q[:, None]]), np.hstack([-change - slack, -q[:, None]])]
    limits = [q - r / error, q + r / error]
    room = growth * (1.0 + np.abs(b))
    low, high = np.maximum(-problem.bound, b - room), np.minimum(problem.bound, b + room)
    if problem.nonnegative:
        low = np.maximum(low, 0.0)
    else:
        count = len(problem.signs)
        rows.append(np.hstack([np.zeros((count, len(a))), -problem.signs, np.zeros((count, 1))]))
        limits.append(np.maximum(problem.signs @ b, 0.0) / error)
    bounds = [(None, None)] * len(a) + list(zip((low - b) / error, (high - b) / error, strict=True)) + [(-1.0, 0.0)]
    cost = np.zeros(len(a) + len(b) + 1)
    cost[-1] = 1.0
    return cost, np.vstack(rows), np.concatenate(limits), bounds


def _step(problem: _Problem, a: Any, b: Any, error: float, growth: float) -> tuple[Any, Any] | None:
    """One step of differential correction; None where numbers are beyond the solver, which also claims less."""
    np, linprog = _modules()
    cost, rows, limits, bounds = _program(problem, a, b, error, growth)
    options = {"primal_feasibility_tolerance": _TOLERANCE, "dual_feasibility_tolerance": _TOLERANCE}
    for chosen in (options, {}):
        solution = linprog(cost, rows, limits, bounds=bounds, method="highs", options=chosen).x
        if solution is not None:
            b = b + error * solution[len(a) : -1]
            return a + error * solution[: len(a)], np.maximum(b, 0.0) if problem.nonnegative else b
    return None


def _error(problem: _Problem, a: Any, b: Any) -> float:
    np, _ = _modules()
    return float(np.max(np.abs(problem.y - problem.t_basis @ a / (problem.offset + problem.d_basis @ b))))


def _minimax(problem: _Problem) -> tuple[float, Any, Any]:
    """The error at the nodes and coefficients (a, b) in the problem's bases, from a polynomial of least squares on."""
    np, _ = _modules()
    b = np.zeros(problem.d_basis.shape[1])
    if problem.offset != 1.0:
        b[0] = 1.0 - problem.offset
    a = np.linalg.lstsq(problem.t_basis, problem.y, rcond=None)[0]
    best = _error(problem, a, b), a, b
    growth, stalled = _GROWTH, 0
    for _ in range(_STEPS):
        if stalled == 2 or growth < _LEAST_GROWTH or best[0] <= _EXACT * np.max(np.abs(problem.y)):
            break
        step = _step(problem, best[1], best[2], best[0], growth)
        error = _error(problem, *step) if step is not None else best[0]
        if step is None or not error < best[0]:
            growth /= 10.0  # exact arithmetic would not need this
            continue
        stalled = stalled + 1 if error > 0.999 * best[0] else 0
        best = error, *step
    return best


def _powers(a: Any, low: float, high: float) -> Any:
    """Coefficients of powers of t = x / max(|low|, |high|), from those of Chebyshev polynomials on the interval."""
    np, _ = _modules()
    scale = max(abs(low), abs(high))
    numerator = np.zeros(len(a))
    domain = [low / scale, high / scale]
    converted = np.polynomial.Chebyshev(a, domain=domain).convert(kind=np.polynomial.Polynomial).coef
    numerator[: len(converted)] = converted
    return numerator


def _normalised(numerator: Any, denominator: Any) -> tuple[Any, Any]:
    """Form C with Q(0) = 1, as in the other forms, where the 0.1 allows that: P and Q may be multiplied by a number as
    long as the least of Q stays at 0.1 or above.
    """
    np, _ = _modules()
    far = np.geomspace(1.0, _FAR, 80)
    t = np.concatenate([np.linspace(-1.0, 1.0, 2001), far, -far])
    q = C_OFFSET + np.abs(t[:, None] ** np.arange(len(denominator)) @ denominator)
    factor = 1.0 / (C_OFFSET + abs(denominator[0]))
    if factor * q.min() < C_OFFSET:
        return numerator, denominator
    denominator = factor * denominator
    denominator[0] = 1.0 - C_OFFSET
    return factor * numerator, denominator


def _float32(values: Any, scale: float, first: int) -> tuple[float, ...]:
    """Coefficients of powers of x from those of t, rounded as float32 holds them."""
    np, _ = _modules()
    return tuple(map(float, (values / scale ** np.arange(first, first + len(values))).astype(np.float32)))


def _solve(problem: _Problem, form: str, low: float, high: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Numerator and denominator of the best approximation, rounded; terms that change nothing that is seen are zero."""
    np, _ = _modules()
    error, a, b = _minimax(problem)
    numerator, denominator = _powers(a, low, high), b.copy()
    size = float(np.max(np.abs(problem.y)))
    q0 = problem.offset + (abs(b[0]) if form == "C" else 0.0)
    unseen = q0 * max(1e-2 * error, 1e-8 * size)
    numerator[np.abs(numerator) < unseen] = 0.0
    denominator[np.abs(denominator) * size < unseen] = 0.0
    if form == "C":
        numerator, denominator = _normalised(numerator, denominator)
    scale = max(abs(low), abs(high))
    return _float32(numerator, scale, 0), _float32(denominator, scale, 0 if form == "C" else 1)


def fit_rational(
    fn: Callable[[Tensor], Tensor],
    form: str = "A",
    degrees: tuple[int, int] = (5, 4),
    interval: tuple[float, float] = (-3.0, 3.0),
) -> Table:
    """Fits a rational function with the least maximum error to fn on an interval. Coefficients are rounded to float32.

    In forms B and C the polynomial inside the absolute value is kept non-negative on the whole line, so that the
    activation has no spike outside the interval. The result is deterministic.

    Args:
        fn: elementwise function; called with one-dimensional float64 tensors. A module, such as torch.nn.PReLU, is
            copied in float64.
        form: "A", "B", "C" or "D" (fitted as B, which it is without noise), as in
            :func:`singlepass.functional.rational`.
        degrees: of numerator (1 to 7) and denominator (1 to 6).
        interval: (low, high).

    Returns:
        Table: for ``init`` of the modules of :mod:`singlepass.nn`. ``max_error`` is measured at 20,001 points, with the
        rounded coefficients, in float64.

    Raises:
        ValueError: an invalid form, degree or interval, or values of fn that are not finite.
        ImportError: NumPy or SciPy is missing; ``pip install ".[fit]"`` in a clone installs them.

    Example:
        >>> import torch
        >>> from singlepass.nn import fit_rational
        >>> softsign = fit_rational(torch.nn.functional.softsign, degrees=(1, 1))  # x / (1 + |x|) itself
        >>> softsign.denominator, softsign.max_error < 1e-6
        ((1.0,), True)
    """
    check_form("fit_rational", form, degrees)
    np, _ = _modules()
    low, high = map(float, interval)
    ordered = bool(np.isfinite(low) and np.isfinite(high)) and low < high
    require(ordered, "fit_rational", "an interval (low, high) with low < high", interval, "Give finite bounds.")
    form = "B" if form == "D" else form
    if isinstance(fn, nn.Module):
        fn = copy.deepcopy(fn).to("cpu", torch.float64)
    a, b = _solve(_problem(fn, form, degrees, low, high), form, low, high)
    x = np.linspace(low, high, _CHECKS)
    found = evaluate(torch.from_numpy(x), a, b, form).numpy()
    worst = float(np.max(np.abs(found - _sample(fn, x))))
    return Table(a, b, form, (low, high), worst, second_moment(a, b, form))
