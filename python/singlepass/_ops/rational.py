# SPDX-License-Identifier: Apache-2.0
"""Rational activations: P(x) / Q(x) with coefficients shared within groups of channels.

Both ops take ``x``, any shape and strides, whose dimension ``channel_dim`` counts C channels; ``numerator`` (Ga, m + 1)
with m in 1..7, and ``denominator`` (Gb, n) with n in 1..6 (form C: (Gb, n + 1)), contiguous, where the larger of Ga and
Gb is the number of groups G, the other is G or 1, and G divides C: channel c belongs to group c // (C // G).

    P(x) = a_0 + a_1 x + ... + a_m x^m
    form 0 (A): Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n
    form 1 (B): Q(x) = 1 + |b_1 x + ... + b_n x^n|
    form 2 (C): Q(x) = 0.1 + |b_0 + b_1 x + ... + b_n x^n|
    form 3 (D): B, every coefficient multiplied for every element by a number from [0.9, 1.1), uniform

* ``bias`` (C,): x + bias takes the place of x. ``gate``, x's shape and dtype, multiplies the result.
* ``dropout``: the probability, rounded to a multiple of 2^-16, with which an element becomes zero; the others are
  divided by the rest of the probability.
* ``seed``: int64, one element, on x's device; needed by form 3 and by dropout. It is the key of Philox4x32-10, and the
  offset e of the element in the result's memory makes the counter. Dropout takes half e % 8 of the block (e / 8, 0);
  coefficient a_i takes half i of the block (e, 1), and b_i half i - 1 of the block (e, 2).

x, ``gate`` and gradients of both are float32, bfloat16 or float16 (eager: float64 too), one dtype; coefficients and
bias any of them. Arithmetic is float32 (eager in float64: float64). Results have x's strides where x is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Op

FORMS = "ABCD"
MAX_DEGREES = (7, 6)

_INPUTS = "Tensor x, Tensor numerator, Tensor denominator, Tensor? bias, Tensor? gate"
_OPTIONS = "*, int form, int channel_dim, float dropout=0.0, Tensor? seed=None"


def dropout_threshold(probability: float) -> int:
    """The probability in units of 2^-16, less than one."""
    return min(int(probability * 65536.0 + 0.5), 65535)


rational = Op(
    "rational",
    f"rational({_INPUTS}, {_OPTIONS}) -> Tensor",
    lambda x, *_, **__: torch.empty_like(x),
    "P(x) / Q(x), of x's shape and dtype.",
    used_by="`nn.GroupRational`, `nn.GRKAN`, `nn.KATMLP`",
)


def _gradients(grad: Tensor, *inputs: Tensor | None, **_: object) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if t is None else torch.empty_like(t) for t in inputs)


rational_backward = Op(
    "rational",
    f"rational_backward(Tensor grad, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    "Gradients of x, numerator, denominator, bias and gate; the last two are empty where there is none.",
    used_by="their gradients",
)
