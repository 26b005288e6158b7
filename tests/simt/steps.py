# SPDX-License-Identifier: Apache-2.0
"""What the tests of optimizer steps share: data, runs on both engines, and the comparison with the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .arrays import Array, decode, encode
from .bounded import Bounded, concatenate
from .truth import Case

SIZES = [0, 1, 2, 7, 8, 9, 1000]


@dataclass(frozen=True)
class Dtypes:
    param: str = "float32"
    grad: str = "float32"
    state: str = "float32"

    def __str__(self) -> str:
        return f"{self.param}-{self.grad}-{self.state}"


def with_representable_eps(case: Case, dtypes: Dtypes) -> Case:
    """float16 has no squares of small gradients: with a tiny eps nothing is promised of them but overflow."""
    if dtypes.state == "float16" and "beta1" in case.hyper and "eps" in case.hyper:
        return replace(case, hyper=case.hyper | {"eps": 0.1})
    return case


def random_values(rng: Generator, sizes: list[int], zero_every: int) -> list[np.ndarray]:
    """Normal numbers, some of them exactly zero."""
    values = [rng.standard_normal(size) for size in sizes]
    for x in values:
        x[::zero_every] = 0.0
    return values


def joined(arrays: Iterable[Array]) -> NDArray[np.float64]:
    return np.concatenate([decode(x).ravel() for x in arrays])


@dataclass(frozen=True)
class State:
    """Parameters and states of all tensors, one after another."""

    param: Bounded
    states: list[Bounded]


class Run:
    """A rule's steps over random tensors on one engine."""

    def __init__(
        self,
        core: ModuleType,
        case: Case,
        device: str,
        dtypes: Dtypes | None = None,
        sizes: list[int] | None = None,
        *,
        threads: int = 64,
        chunk: int = 512,
        workers: int = 1,
        misalignment: tuple[int, int, int] = (0, 0, 0),
        data_seed: int = 0,
    ) -> None:
        self.case, self.dtypes, self.sizes = case, dtypes or Dtypes(), SIZES if sizes is None else sizes
        self.rng = np.random.default_rng(data_seed)
        self.t = 0
        rule = core.rules()[case.rule]
        scales = [float(np.float32(1.0 + 0.5 * i)) for i in range(len(self.sizes))]
        # Elements that a step may treat together: a tensor, or all of them where no norm is taken.
        ends = np.cumsum(self.sizes)
        tensors = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        self.pieces: list[tuple[slice, Any]] = [(slice(None), np.repeat(scales, self.sizes))]
        if rule["norms"]:
            self.pieces = list(zip(tensors, scales, strict=True))
        self.stepper = core.Stepper(
            case.rule,
            device,
            params=[encode(x, self.dtypes.param) for x in random_values(self.rng, self.sizes, 5)],
            grads=[encode(np.zeros(n), self.dtypes.grad) for n in self.sizes],
            states=[[encode(np.zeros(n), self.dtypes.state) for _ in range(rule["states"])] for n in self.sizes],
            scales=scales if rule["scaled"] else [],
            ids=list(range(len(self.sizes))),
            threads=threads,
            chunk=chunk,
            workers=workers,
            misalignment=misalignment,
        )

    def step(self, **options: Any) -> None:
        self.stepper.set_grads([encode(x, self.dtypes.grad) for x in random_values(self.rng, self.sizes, 7)])
        self.stepper.step(tuple(self.case.hyper.values()), **({"lr": self.case.lr} | options))
        self.t += 1

    def bits(self) -> list[Array]:
        return [*self.stepper.params(), *(state for states in self.stepper.states() for state in states)]

    def exact(self) -> State:
        """Parameters and states as they are now."""
        params, states = self.stepper.params(), self.stepper.states()
        return State(Bounded(joined(params)), [Bounded(joined(column)) for column in zip(*states, strict=True)])

    def expected(self, before: State, factor: float = 1.0) -> State:
        """What the step just made should have made of ``before``. ``factor`` multiplies the gradients."""
        hyper = SimpleNamespace(lr=self.case.lr, state_dtype=self.dtypes.state, **self.case.hyper)
        g = Bounded(joined(self.stepper.grads()))
        if factor != 1.0:
            g = g * factor
        results = [
            self.case.step(before.param[piece], g[piece], [s[piece] for s in before.states], self.t, scale, hyper)
            for piece, scale in self.pieces
        ]
        params, states = zip(*results, strict=True)
        return State(concatenate(params), [concatenate(column) for column in zip(*states, strict=True)])

    def check(self, expected: State) -> None:
        """Compares what is stored now with what was expected, element by element."""
        label = f"{self.case.id}, step {self.t}"
        assert_within(joined(self.stepper.params()), expected.param, self.dtypes.param, f"{label}: parameter")
        for k, column in enumerate(zip(*self.stepper.states(), strict=True)):
            assert_within(joined(column), expected.states[k], self.dtypes.state, f"{label}: state {k}")


def assert_within(actual: NDArray[np.float64], expected: Bounded, dtype: str, label: str) -> None:
    """The bound is doubled: a kernel may associate the same formula otherwise. Storing adds half an ulp, once."""
    stored = Bounded(expected.value, 2.0 * expected.error).stored(dtype)
    difference = np.abs(actual - stored.value)
    wrong = np.flatnonzero(~(difference <= stored.error))
    if wrong.size:
        i = int(wrong[0])
        raise AssertionError(
            f"{label}: {wrong.size} of {actual.size} elements are wrong; element {i} is {actual[i]}, "
            f"expected {stored.value[i]} within {stored.error[i]:.3g}"
        )
