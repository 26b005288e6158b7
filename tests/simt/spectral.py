# SPDX-License-Identifier: Apache-2.0
"""The ops of sparse spectral training in float64, with bounds of what float32 arithmetic may be off.

Written from the contract in ``singlepass/_ops/spectral.py`` and the papers it names. Arrays are float64 values of what
is stored, unless their name says codes or factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..rational.truth import philox
from .arrays import Array, decode, encode
from .bounded import HALF_ULP, SMALLEST, Bounded, concatenate, norm, sqrt
from .truth import adamw

Floats = NDArray[np.float64]
BLOCK = 128  # columns of codes that share a factor
SUMMANDS = 32  # products that are added up in float32


def options(core: ModuleType, device: str, **changes: int) -> Any:
    """How an op runs: small launches, so that arrays of a few elements are cut too."""
    small = {"threads": 64, "chunk": 256, "workers": 2, "blocks": 6, "held": 11264, "misalignment": 0}
    return core.SpectralOptions(device, **(small | changes))


def check(array: Array, expected: Bounded, dtype: str, label: str) -> None:
    bound = expected.stored(dtype)
    off = np.abs(decode(array).reshape(bound.value.shape) - bound.value)
    wrong = np.flatnonzero(~(off <= bound.error))
    assert wrong.size == 0, f"{label}: {wrong.size} of {off.size} off, the first at {wrong[0]}"


def scale(q: Floats, t: Floats, s: Floats) -> tuple[Bounded, Bounded]:
    """q's columns times s, and the column sums of q * t."""
    products = q * t
    # A product is rounded, and so are the sums that it goes into while they are float32.
    size = np.abs(products).sum(0)
    error = (SUMMANDS + 2) * HALF_ULP * size + len(q) * SMALLEST
    return Bounded(q) * Bounded(s), Bounded.rounded(products.sum(0), error)


@dataclass(frozen=True)
class Step:
    """What a step is to do."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    project: bool = False
    maximize: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None
    lr_on_device: bool = False
    seed: int | None = None  # of stochastic rounding

    @property
    def hyper(self) -> tuple[float, float, float, float]:
        return self.beta1, self.beta2, self.eps, self.weight_decay


@dataclass
class Tensors:
    """Stored parameters, gradients and states, and how often each was stepped."""

    params: list[Array]
    grads: list[Array]
    exp_avg: list[Array]
    exp_avg_sq: list[Array]
    steps: list[float]

    def run(self, core: ModuleType, step: Step, place: Any, repeats: int = 1) -> Tensors:
        arrays = core.SpectralTensors(self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.steps)
        names = ("lr_on_device", "project", "maximize", "grad_scale", "found_inf", "seed")
        settings = core.SpectralStep(step.lr, repeats=repeats, **{name: getattr(step, name) for name in names})
        params, exp_avg, exp_avg_sq, steps = core.spectral_step(arrays, step.hyper, settings, place)
        return Tensors(params, self.grads, exp_avg, exp_avg_sq, steps)

    def bits(self) -> list[Array]:
        return [*self.params, *self.exp_avg, *self.exp_avg_sq]

    def expected(self, i: int, step: Step) -> list[Bounded]:
        """Parameter and states of tensor i after a step, flat."""
        p, g = decode(self.params[i]), Bounded(decode(self.grads[i]))
        m, v = Bounded(decode(self.exp_avg[i])), Bounded(decode(self.exp_avg_sq[i]))
        factor = (-1.0 if step.maximize else 1.0) / (step.grad_scale or 1.0)
        if factor != 1.0:
            g = g * factor
        hyper = SimpleNamespace(lr=step.lr, beta1=step.beta1, beta2=step.beta2, eps=step.eps)
        hyper.weight_decay = step.weight_decay
        t = int(self.steps[i]) + 1
        if p.ndim == 1:
            new, states = adamw(Bounded(p), g, [m, v], t, 1.0, hyper)
            return [Bounded(np.maximum(new.value, 0.0), new.error), *states]
        rows = [self._row(p[r], g[r], [m[r], v[r]], t, hyper, step.project) for r in range(len(p))]
        if not p.size:
            return [Bounded(np.zeros(0))] * 3
        return [concatenate(column) for column in zip(*rows, strict=True)]

    @staticmethod
    def _row(p: Floats, g: Bounded, s: list[Bounded], t: int, hyper: Any, project: bool) -> list[Bounded]:
        if project:
            along = Bounded.rounded(np.dot(g.value, p), np.dot(g.error, np.abs(p)))
            g = g - along * Bounded(p)
        new, states = adamw(Bounded(p), g, s, t, 1.0, hyper)
        length = norm(new)
        if length.value > 0.0:
            new = new * (Bounded(1.0) / length)
        return [new, *states]


def race_times(s: Floats, seed: int, stream: int, uniform: float) -> Floats:
    """Of all places of a layer; ``stream`` is (draw << 32) + id."""
    weight = np.where(np.isfinite(s) & (s > 0.0), s, 0.0)
    total = weight.sum()
    share = weight / total if total > 0.0 else np.full(len(s), 1.0 / len(s))
    p = uniform / len(s) + (1.0 - uniform) * share
    low, high, *_ = philox(seed, np.arange(len(s), dtype=np.uint64), stream)
    number = ((high << np.uint64(20) | low >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    with np.errstate(divide="ignore"):
        return -np.log(number) / p


def exchange(times: Floats, rank: int) -> NDArray[np.int64]:
    """What comes to each active place."""
    drawn = set(sorted(range(len(times)), key=lambda place: (times[place], place))[:rank])
    coming = iter(sorted(place - rank for place in drawn if place >= rank))
    return np.array([-1 if place in drawn else next(coming) for place in range(rank)], np.int64)


def factors(rows: Floats) -> NDArray[np.float32]:
    """One for each BLOCK columns: the largest magnitude divided by 127, rounded once."""
    blocks = [np.abs(rows[:, first : first + BLOCK]).max(1) for first in range(0, rows.shape[1], BLOCK)]
    return np.stack(blocks, 1).astype(np.float32) / np.float32(127.0)


def spread(per_block: Array, columns: int) -> Array:
    """Factors for every column."""
    return np.repeat(per_block, BLOCK, axis=1)[:, :columns]


def decoded(codes: Array, per_block: Array, dtype: str) -> Array:
    """Rows as they are stored."""
    return encode(codes.astype(np.float32) * spread(per_block, codes.shape[1]), dtype)


def _exp(x: Bounded) -> Bounded:
    """Within two ulp, as CUDA documents expf; the C library's is closer."""
    value = np.exp(x.value)
    return Bounded(value, value * (np.expm1(x.error) + 4.0 * HALF_ULP))


def _column(x: Any) -> Bounded:
    x = x if isinstance(x, Bounded) else Bounded(x)
    return Bounded(x.value[:, None], x.error[:, None])


@dataclass
class Lorentz:
    """HyboNet's map of rows z, and its derivatives."""

    z: Floats
    log_scale: float
    k: float = 1.0
    offset: float = 1.1

    def __post_init__(self) -> None:
        first, self.space = Bounded(self.z[:, 0]), Bounded(self.z[:, 1:])
        self.scale = _exp(Bounded(np.float64(self.log_scale)))
        self.gate = 1.0 / (1.0 + _exp(-first))
        self.time = self.gate * self.scale + self.offset
        squares = (self.z[:, 1:] ** 2).sum(1)
        self.clamped = squares <= 1e-8
        self.held = Bounded.rounded(np.maximum(squares, 1e-8), 0.0)
        self.root = sqrt((self.time * self.time - self.k) / self.held)

    def forward(self) -> Bounded:
        return self._rows(self.time, self.space * _column(self.root))

    def backward(self, grad: Floats) -> tuple[Bounded, Bounded]:
        """Gradients of z and of log_scale."""
        along = Bounded.rounded((grad[:, 1:] * self.z[:, 1:]).sum(1), 0.0)
        grad_time = Bounded(grad[:, 0]) + along * self.time / (self.held * self.root)
        grad_first = grad_time * self.scale * self.gate * (1.0 - self.gate)
        pull = along * self.root / self.held
        pull = Bounded(np.where(self.clamped, 0.0, pull.value), np.where(self.clamped, 0.0, pull.error))
        grad_space = Bounded(grad[:, 1:]) * _column(self.root) - self.space * _column(pull)
        parts = grad_time * self.gate * self.scale
        return self._rows(grad_first, grad_space), Bounded.rounded(parts.value.sum(), parts.error.sum())

    @staticmethod
    def _rows(first: Bounded, rest: Bounded) -> Bounded:
        value = np.concatenate((first.value[:, None], rest.value), axis=1)
        return Bounded(value, np.concatenate((first.error[:, None], rest.error), axis=1))


def unit_rows(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    x = rng.standard_normal((rows, columns))
    return x / math.sqrt(max(columns, 1))
