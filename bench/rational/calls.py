# SPDX-License-Identifier: Apache-2.0
"""Activations made ready to be timed, and compared with their own formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..registry import Gate, Step

GATE_SHAPE = (2, 37, 64)
# Allowed error of each element of the result and of x's gradient, relative to the element plus the mean magnitude:
# rounding to bfloat16 may move it by 2^-8 of itself. The gate tells wrong from right; tests judge the last bits.
GATE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
GATE_COEFFICIENTS = 1e-4  # the same for gradients of coefficients, sums that are float32 whatever x is


@dataclass(frozen=True)
class Inputs:
    """What all providers of a case share. Coefficients are float32, one numerator for all groups, as in KAT."""

    x: Tensor
    grad: Tensor
    numerator: Tensor
    denominator: Tensor

    def double(self) -> Inputs:
        return Inputs(self.x.double(), self.grad.double(), self.numerator.double(), self.denominator.double())


def make_inputs(shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x and the gradient as a normalised layer has them; the table of gelu, its zeros and groups a little apart."""
    from singlepass.nn import table

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def moved(coefficients: tuple[float, ...], rows: int, first: int) -> Tensor:
        """The less, the higher the power: it stays an activation."""
        powers = torch.arange(first, first + len(coefficients), device=device)
        return torch.tensor([coefficients], device=device) + 0.02 * 0.5**powers * normal(rows, len(coefficients))

    start = table("gelu", form="A", degrees=(5, 4))
    numerator, denominator = moved(start.numerator, 1, 0), moved(start.denominator, groups, 1)
    return Inputs(normal(*shape).to(dtype), normal(*shape).to(dtype), numerator, denominator)


# The two passes over one tensor share it; more of them would fill the memory.
inputs = lru_cache(maxsize=1)(make_inputs)


@dataclass(frozen=True)
class Function:
    """A function of x, ready to be called, and the coefficients that it has gradients of."""

    call: Callable[[Tensor], Tensor]
    coefficients: tuple[Tensor, ...] = ()


Make = Callable[[Inputs], Function]


def with_coefficients(call: Callable[[Tensor, Tensor, Tensor], Tensor], data: Inputs) -> Function:
    """A function of x, numerator and denominator, given coefficients of its own."""
    numerator, denominator = (t.clone().requires_grad_() for t in (data.numerator, data.denominator))
    return Function(lambda x: call(x, numerator, denominator), (numerator, denominator))


def caller(make: Make, backward: bool, data: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Returns the result alone, without grad, or the result and all gradients."""
    function = make(data)
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function.call(data.x),)

        return forward

    x = data.x.detach().requires_grad_()

    def both() -> tuple[Tensor, ...]:
        y = function.call(x)
        return (y, *torch.autograd.grad(y, (x, *function.coefficients), data.grad))

    return both


def prepare(make: Make, backward: bool, data: Inputs) -> Step:
    return Step(caller(make, backward, data))


def gate(make: Make, truth: Make, backward: bool, groups: int, dtype: torch.dtype, device: torch.device) -> Gate:
    """One call on a small tensor, compared elementwise with `truth` in float64."""
    data = make_inputs(GATE_SHAPE, groups, dtype, device)
    got = caller(make, backward, data)()
    want = caller(truth, backward, data.double())()
    if [t.shape for t in got] != [t.shape for t in want]:
        return Gate(float("inf"))
    errors = []
    for i, (value, exact) in enumerate(zip(got, want, strict=True)):
        exact = exact.detach()
        # Gradients of coefficients differ by magnitudes from power to power: each is compared with its like.
        like, tolerance = (exact.abs().mean(), GATE_TOLERANCE[dtype])
        if i > 1:
            like, tolerance = exact.abs().mean(0, keepdim=True), GATE_COEFFICIENTS
        errors.append((value.detach().double() - exact).abs() / (tolerance * (exact.abs() + like)))
    return Gate.of(errors)
