# SPDX-License-Identifier: Apache-2.0
"""One step of each optimizer, written from its paper or official code, over float64 with error bounds.

``step(p, g, s, t, scale, h)`` takes parameter, gradient, list of states, step counted from 1, the parameter's scalar
and the hyperparameters, and returns the new parameter and states. A rule's hyperparameters stand in the order of its
C++ ``Hyper``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from .bounded import Bounded, absolute, maximum, norm, one_plus_exp_negative, sign, sqrt

Result = tuple[Bounded, list[Bounded]]


def adamw(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 1711.05101 as torch.optim.AdamW has it: eps outside the corrected root; AMSGrad keeps the largest v."""
    m = h.beta1 * s[0] + (1.0 - h.beta1) * g
    v = h.beta2 * s[1] + (1.0 - h.beta2) * (g * g)
    largest = [maximum(s[2], v)] if len(s) == 3 else []
    denominator = sqrt(largest[0] if largest else v) / math.sqrt(1.0 - h.beta2**t) + h.eps
    p = p * (1.0 - h.lr * h.weight_decay) - h.lr / (1.0 - h.beta1**t) * (m / denominator)
    return p, [m, v, *largest]


def lion(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 2302.06675, Algorithm 2."""
    direction = sign(h.beta1 * s[0] + (1.0 - h.beta1) * g)
    p = p * (1.0 - h.lr * h.weight_decay) - h.lr * direction
    return p, [h.beta2 * s[0] + (1.0 - h.beta2) * g]


def adabelief(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 2010.07468, Algorithm 2, as adabelief-pytorch has it; rectification is RAdam's, arXiv 1908.03265."""
    if h.decoupled_weight_decay:
        p = p * (1.0 - (h.weight_decay if h.fixed_decay else h.lr * h.weight_decay))
    else:
        g = g + h.weight_decay * p
    m = h.beta1 * s[0] + (1.0 - h.beta1) * g
    residual = g - m
    v = h.beta2 * s[1] + (1.0 - h.beta2) * (residual * residual) + h.eps
    largest = [maximum(s[2], v)] if len(s) == 3 else []
    correction1, correction2 = 1.0 - h.beta1**t, 1.0 - h.beta2**t
    if not h.rectify:
        denominator = sqrt(largest[0] if largest else v) / math.sqrt(correction2) + h.eps
        return p - h.lr / correction1 * (m / denominator), [m, v, *largest]
    n_max = 2.0 / (1.0 - h.beta2) - 1.0
    n = n_max - 2.0 * t * h.beta2**t / correction2
    if n >= 5.0:
        r = math.sqrt(correction2 * (n - 4.0) / (n_max - 4.0) * (n - 2.0) / n * n_max / (n_max - 2.0)) / correction1
        p = p - h.lr * r * (m / (sqrt(v) + h.eps))
    elif h.degenerated_to_sgd:
        p = p - h.lr / correction1 * m
    return p, [m, v, *largest]


def adan(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 2208.06677 as the authors' adan.py has it; the fourth state is the negated previous gradient."""
    difference = g + s[3] if t > 1 else g - g
    lookahead = g + h.beta2 * difference
    m = h.beta1 * s[0] + (1.0 - h.beta1) * g
    v = h.beta2 * s[1] + (1.0 - h.beta2) * difference
    n = h.beta3 * s[2] + (1.0 - h.beta3) * (lookahead * lookahead)
    denominator = sqrt(n) / math.sqrt(1.0 - h.beta3**t) + h.eps
    if h.no_prox:
        p = p * (1.0 - h.lr * h.weight_decay)
    p = p - h.lr / (1.0 - h.beta1**t) * m / denominator - h.lr * h.beta2 / (1.0 - h.beta2**t) * v / denominator
    if not h.no_prox:
        p = p / (1.0 + h.lr * h.weight_decay)
    return p, [m, v, n, -g]


def diffgrad(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 1909.11015 as the authors' second version has it: eps inside the bias correction, decay in the gradient."""
    g = g + h.weight_decay * p
    m = h.beta1 * s[0] + (1.0 - h.beta1) * g
    v = h.beta2 * s[1] + (1.0 - h.beta2) * (g * g)
    friction = Bounded(1.0) / one_plus_exp_negative(absolute(s[2] - g))
    step_size = h.lr * math.sqrt(1.0 - h.beta2**t) / (1.0 - h.beta1**t)
    return p - step_size * (m * friction / (sqrt(v) + h.eps)), [m, v, g]


def lamb(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 1904.00962, Algorithm 2, phi the identity. Moments are read back from where they are stored."""
    m = h.beta1 * s[0] + (1.0 - h.beta1) * g
    v = h.beta2 * s[1] + (1.0 - h.beta2) * (g * g)
    stored_m, stored_v = m.stored(h.state_dtype), v.stored(h.state_dtype)
    corrected_m, corrected_v = stored_m / (1.0 - h.beta1**t), stored_v / (1.0 - h.beta2**t)
    update = corrected_m / (sqrt(corrected_v) + h.eps) + h.weight_decay * p
    ratio = Bounded(1.0)
    if h.always_adapt or h.weight_decay != 0.0:
        p_norm, update_norm = norm(p), norm(update)
        if p_norm.value > 0.0 and update_norm.value > 0.0:
            ratio = p_norm / update_norm
    return p - h.lr * ratio * update, [m, v]


def lars(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 1708.03888, Algorithm 1: the learning rate stands inside the momentum."""
    rate = Bounded(1.0)
    p_norm, g_norm = norm(p), norm(g)
    if p_norm.value > 0.0 and g_norm.value > 0.0:
        rate = h.trust_coefficient * p_norm / (g_norm + h.weight_decay * p_norm + h.eps)
    v = h.momentum * s[0] + h.lr * rate * (g + h.weight_decay * p)
    return p - v, [v]


def sgdsai(p: Bounded, g: Bounded, s: list[Bounded], t: int, scale: float, h: SimpleNamespace) -> Result:
    """arXiv 2412.11768 as the authors' sgd_sai.py has it: ``scale`` is the gradient's signal-to-noise ratio."""
    m = g if t == 1 else h.momentum * s[0] + (1.0 - h.momentum) * g
    return p * (1.0 - h.lr * h.weight_decay) - h.lr * scale * m, [m]


@dataclass(frozen=True)
class Case:
    """A rule under one choice of hyperparameters."""

    rule: str
    step: Callable[..., Result]
    lr: float
    hyper: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def id(self) -> str:
        return f"{self.rule}-{self.label}" if self.label else self.rule


_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
_BELIEF = _ADAM | {"decoupled_weight_decay": True, "fixed_decay": False, "rectify": True, "degenerated_to_sgd": True}
_ADAN = {"beta1": 0.98, "beta2": 0.92, "beta3": 0.99, "eps": 1e-8, "weight_decay": 0.1, "no_prox": False}
_LAMB = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1, "always_adapt": True}
_LARS = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 1e-3, "eps": 0.0}
_PLAIN_BELIEF = _BELIEF | {"rectify": False}

CASES = [
    Case("adamw", adamw, 1e-2, _ADAM),
    Case("adamw_amsgrad", adamw, 1e-2, _ADAM),
    Case("lion", lion, 1e-3, {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}),
    Case("adabelief", adabelief, 1e-2, _BELIEF),
    Case("adabelief", adabelief, 1e-2, _BELIEF | {"degenerated_to_sgd": False, "fixed_decay": True}, "no_sgd"),
    Case("adabelief", adabelief, 1e-2, _PLAIN_BELIEF | {"decoupled_weight_decay": False}, "plain"),
    Case("adabelief_amsgrad", adabelief, 1e-2, _PLAIN_BELIEF),
    Case("adabelief_amsgrad", adabelief, 1e-2, _BELIEF, "rectified"),
    Case("adan", adan, 1e-2, _ADAN),
    Case("adan", adan, 1e-2, _ADAN | {"no_prox": True}, "no_prox"),
    Case("diffgrad", diffgrad, 1e-2, _ADAM),
    Case("lamb", lamb, 1e-2, _LAMB),
    Case("lamb", lamb, 1e-2, _LAMB | {"always_adapt": False, "weight_decay": 0.0}, "unadapted"),
    Case("lars", lars, 1.0, _LARS),
    Case("lars", lars, 1.0, _LARS | {"weight_decay": 0.0, "eps": 1e-3}, "eps"),
    Case("sgdsai", sgdsai, 1e-4, {"momentum": 0.9, "weight_decay": 0.1}),
]
