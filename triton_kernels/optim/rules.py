# SPDX-License-Identifier: Apache-2.0
"""The update rules, the counterparts of ``csrc/optim/<rule>.h``. Each has two functions:

* ``coefficients(h, lr, step, scale, FLAGS)`` takes float64 scalars and returns a tuple of float32 scalars. ``h`` has
  the op's float hyperparameters in the order of its schema, then the logarithms of its betas. FLAGS has the bool
  hyperparameters. ``step`` counts from 1.
* ``update(c, p, g, s)`` works on one tile in registers. It returns the new parameter and the tuple of new states. The
  order of operations is that of the header, so that the bits are the same.

Rules that need norms of the whole tensor first (LAMB, LARS) have a norm pass before the update, and two more functions:

* ``norm_terms(c, p, g, s)`` returns the two vectors whose norms are needed, and the states.
* ``apply_norms(h, c, squares, FLAGS)`` returns the coefficients with the two squared norms applied.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .._common import double, maximum, one_plus_exp_negative, sign


@dataclass(frozen=True)
class Pass:
    """One pass over memory. ``reads`` and ``writes`` name "p" the parameter, "g" the gradient and "s" the states."""

    function: Any
    reads: str
    writes: str


@dataclass(frozen=True)
class Rule:
    coefficients: Any
    update: Pass
    norm: Pass | None = None
    apply_norms: Any = None


@triton.jit
def bias_correction(log_beta, step):
    return 1.0 - tl.exp(step * log_beta)


@triton.jit
def adamw_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    beta1, beta2, eps, weight_decay, log_beta1, log_beta2 = h
    return (
        (1.0 - lr * weight_decay).to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr / bias_correction(log_beta1, step)).to(tl.float32),
        (1.0 / tl.sqrt(bias_correction(log_beta2, step))).to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def adamw_update(c, p, g, s):
    decay, beta1, rest1, beta2, rest2, step_size, inverse_root2, eps = c
    m = beta1 * s[0] + rest1 * g
    v = beta2 * s[1] + rest2 * (g * g)
    new = (m, v)
    if len(s) == 3:
        new = (m, v, maximum(s[2], v))
    denominator = tl.sqrt_rn(new[len(s) - 1]) * inverse_root2 + eps
    return p * decay - step_size * tl.div_rn(m, denominator), new


@triton.jit
def lion_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    beta1, beta2, weight_decay, _log_beta1, _log_beta2 = h
    return (
        lr.to(tl.float32),
        (1.0 - lr * weight_decay).to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
    )


@triton.jit
def lion_update(c, p, g, s):
    lr, decay, beta1, rest1, beta2, rest2 = c
    p = p * decay - lr * sign(beta1 * s[0] + rest1 * g)
    return p, (beta2 * s[0] + rest2 * g,)


@triton.jit
def adabelief_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    beta1, beta2, eps, weight_decay, log_beta1, log_beta2 = h
    decoupled_weight_decay: tl.constexpr = FLAGS[0]
    fixed_decay: tl.constexpr = FLAGS[1]
    rectify: tl.constexpr = FLAGS[2]
    degenerated_to_sgd: tl.constexpr = FLAGS[3]
    if not decoupled_weight_decay:
        decay = double(1.0)
        coupled_decay = weight_decay
    else:
        decay = 1.0 - weight_decay if fixed_decay else 1.0 - lr * weight_decay
        coupled_decay = double(0.0)
    correction2 = bias_correction(log_beta2, step)
    step_size = lr / bias_correction(log_beta1, step)
    inverse_root2 = 1.0 / tl.sqrt(correction2)
    adaptive = tl.full((), True, tl.int1)
    if rectify:
        n_max = 2.0 / (1.0 - beta2) - 1.0
        n = n_max - 2.0 * step * (1.0 - correction2) / correction2
        adaptive = n >= 5.0
        inverse_root2 = double(1.0)  # the ratio contains the correction
        ratio = correction2 * (n - 4.0) / (n_max - 4.0) * (n - 2.0) / n * n_max / (n_max - 2.0)
        fallback = step_size if degenerated_to_sgd else double(0.0)
        step_size = tl.where(adaptive, step_size * tl.sqrt(tl.abs(ratio)), fallback)
    return (
        decay.to(tl.float32),
        coupled_decay.to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        step_size.to(tl.float32),
        inverse_root2.to(tl.float32),
        eps.to(tl.float32),
        adaptive,
        tl.full((), not rectify, tl.int1),
    )


@triton.jit
def adabelief_update(c, p, g, s):
    decay, coupled_decay, beta1, rest1, beta2, rest2, step_size, inverse_root2, eps, adaptive, use_maximum = c
    g = g + coupled_decay * p
    m = beta1 * s[0] + rest1 * g
    residual = g - m
    v = (beta2 * s[1] + rest2 * (residual * residual)) + eps
    new = (m, v)
    variance = v
    if len(s) == 3:
        new = (m, v, maximum(s[2], v))
        variance = tl.where(use_maximum, new[2], v)
    denominator = tl.sqrt_rn(variance) * inverse_root2 + eps
    return p * decay - step_size * tl.div_rn(m, tl.where(adaptive, denominator, 1.0)), new


@triton.jit
def adan_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    beta1, beta2, beta3, eps, weight_decay, log_beta1, log_beta2, log_beta3 = h
    no_prox: tl.constexpr = FLAGS[0]
    if no_prox:
        decay = 1.0 - lr * weight_decay
        shrink = double(1.0)
    else:
        decay = double(1.0)
        shrink = 1.0 / (1.0 + lr * weight_decay)
    return (
        decay.to(tl.float32),
        shrink.to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        beta3.to(tl.float32),
        (1.0 - beta3).to(tl.float32),
        (lr / bias_correction(log_beta1, step)).to(tl.float32),
        (lr * beta2 / bias_correction(log_beta2, step)).to(tl.float32),
        (1.0 / tl.sqrt(bias_correction(log_beta3, step))).to(tl.float32),
        eps.to(tl.float32),
        step == 1.0,
    )


@triton.jit
def adan_update(c, p, g, s):
    decay, shrink, beta1, rest1, beta2, rest2, beta3, rest3, step_size, difference_step_size, inverse3, eps, first = c
    difference = tl.where(first, 0.0, g + s[3])
    lookahead = g + beta2 * difference
    m = beta1 * s[0] + rest1 * g
    v = beta2 * s[1] + rest2 * difference
    n = beta3 * s[2] + rest3 * (lookahead * lookahead)
    denominator = tl.sqrt_rn(n) * inverse3 + eps
    step = tl.div_rn(step_size * m + difference_step_size * v, denominator)
    # Triton 3.6 compiles -g as 0 - g, which loses the sign of zero.
    return (p * decay - step) * shrink, (m, v, n, g * -1.0)


@triton.jit
def diffgrad_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    beta1, beta2, eps, weight_decay, log_beta1, log_beta2 = h
    return (
        weight_decay.to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr * tl.sqrt(bias_correction(log_beta2, step)) / bias_correction(log_beta1, step)).to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def diffgrad_update(c, p, g, s):
    coupled_decay, beta1, rest1, beta2, rest2, step_size, eps = c
    g = g + coupled_decay * p
    m = beta1 * s[0] + rest1 * g
    v = beta2 * s[1] + rest2 * (g * g)
    denominator = one_plus_exp_negative(tl.abs(s[2] - g)) * (tl.sqrt_rn(v) + eps)
    return p - step_size * tl.div_rn(m, denominator), (m, v, g)


@triton.jit
def lamb_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    beta1, beta2, eps, weight_decay, log_beta1, log_beta2 = h
    return (
        lr.to(tl.float32),
        weight_decay.to(tl.float32),
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (1.0 / bias_correction(log_beta1, step)).to(tl.float32),
        (1.0 / bias_correction(log_beta2, step)).to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def lamb_direction(c, p, s):
    _lr, decay, _beta1, _rest1, _beta2, _rest2, inverse1, inverse2, eps = c
    denominator = tl.sqrt_rn(s[1] * inverse2) + eps
    return tl.div_rn(s[0] * inverse1, denominator) + decay * p


@triton.jit
def lamb_norm_terms(c, p, g, s):
    _lr, _decay, beta1, rest1, beta2, rest2, _inverse1, _inverse2, _eps = c
    new = (beta1 * s[0] + rest1 * g, beta2 * s[1] + rest2 * (g * g))
    return p, lamb_direction(c, p, new), new


@triton.jit
def rate_of(rate):
    """In float32. What it does not hold counts as its largest number."""
    return tl.where(rate > 3.4028234663852886e38, 3.4028234663852886e38, rate).to(tl.float32)


@triton.jit
def lamb_apply_norms(h, c, squares, FLAGS: tl.constexpr):
    always_adapt: tl.constexpr = FLAGS[0]
    adapt = (squares[0] > 0.0) & (squares[1] > 0.0)
    if not always_adapt:
        adapt = adapt & (h[3] != 0.0)
    adapted = rate_of(c[0].to(tl.float64) * tl.sqrt(squares[0] / squares[1]))
    return (tl.where(adapt, adapted, c[0]),) + c[1:]


@triton.jit
def lamb_update(c, p, g, s):
    return p - c[0] * lamb_direction(c, p, s), s


@triton.jit
def lars_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    momentum, weight_decay, _trust_coefficient, _eps = h
    return lr.to(tl.float32), weight_decay.to(tl.float32), momentum.to(tl.float32)


@triton.jit
def lars_norm_terms(c, p, g, s):
    return p, g, s


@triton.jit
def lars_apply_norms(h, c, squares, FLAGS: tl.constexpr):
    _momentum, weight_decay, trust_coefficient, eps = h
    norm = tl.sqrt(squares[0])
    rate = trust_coefficient * norm / (tl.sqrt(squares[1]) + weight_decay * norm + eps)
    adapt = (squares[0] > 0.0) & (squares[1] > 0.0)
    return (tl.where(adapt, rate_of(c[0].to(tl.float64) * rate), c[0]),) + c[1:]


@triton.jit
def lars_update(c, p, g, s):
    lr, decay, momentum = c
    v = momentum * s[0] + lr * (g + decay * p)
    return p - v, (v,)


@triton.jit
def sgdsai_coefficients(h, lr, step, scale, FLAGS: tl.constexpr):
    momentum, weight_decay = h
    held = tl.where(step == 1.0, 0.0, momentum)
    return (
        (1.0 - lr * weight_decay).to(tl.float32),
        held.to(tl.float32),
        (1.0 - held).to(tl.float32),
        (lr * scale).to(tl.float32),
    )


@triton.jit
def sgdsai_update(c, p, g, s):
    decay, momentum, rest, step_size = c
    m = momentum * s[0] + rest * g
    return p * decay - step_size * m, (m,)


RULES = {
    "adamw": Rule(adamw_coefficients, Pass(adamw_update, "pgs", "ps")),
    "lion": Rule(lion_coefficients, Pass(lion_update, "pgs", "ps")),
    "adabelief": Rule(adabelief_coefficients, Pass(adabelief_update, "pgs", "ps")),
    "adan": Rule(adan_coefficients, Pass(adan_update, "pgs", "ps")),
    "diffgrad": Rule(diffgrad_coefficients, Pass(diffgrad_update, "pgs", "ps")),
    # The norm pass updates the moments; the update pass computes the direction again from them.
    "lamb": Rule(lamb_coefficients, Pass(lamb_update, "ps", "p"), Pass(lamb_norm_terms, "pgs", "s"), lamb_apply_norms),
    "lars": Rule(lars_coefficients, Pass(lars_update, "pgs", "ps"), Pass(lars_norm_terms, "pg", ""), lars_apply_norms),
    "sgdsai": Rule(sgdsai_coefficients, Pass(sgdsai_update, "pgs", "ps")),
}
