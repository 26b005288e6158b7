# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps in eager PyTorch.

A rule here is what it is in ``csrc/optim/``: coefficients, made in float64 from the step count, and an update of one
tensor, after a norm pass where the rule needs norms. Both return the states that they change. The order of operations
is the kernels', so that float32 results agree to the last bit wherever no sum over a tensor, no exponential and no root
is involved (ATen's vectorised root is not always correctly rounded). Nothing here looks at a tensor's value from the
host: the functions run under CUDA graphs and ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._errors import require
from .._ops import optim as ops
from .steps import Coefficients, reference_of, square_sum


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    return 1.0 - beta**step


@reference_of(ops.adamw)
class AdamW:
    """Decoupled weight decay regularization, arXiv 1711.05101; AMSGrad where a third state is given."""

    @staticmethod
    def coefficients(lr, step, scale, *, beta1, beta2, eps, weight_decay):
        return Coefficients(
            decay=1.0 - lr * weight_decay,
            step_size=lr / _bias_correction(beta1, step),
            inverse_root2=_bias_correction(beta2, step).rsqrt(),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )

    @staticmethod
    def update(c, p, g, s):
        m = c.beta1 * s[0] + (1.0 - c.beta1) * g
        v = c.beta2 * s[1] + (1.0 - c.beta2) * (g * g)
        new = [m, v]
        if len(s) == 3:
            new.append(torch.maximum(s[2], v))
        denominator = new[-1].sqrt() * c.inverse_root2 + c.eps
        return p * c.decay - c.step_size * (m / denominator), new


@reference_of(ops.lion)
class Lion:
    """Symbolic discovery of optimization algorithms, arXiv 2302.06675, Algorithm 2."""

    @staticmethod
    def coefficients(lr, step, scale, *, beta1, beta2, weight_decay):
        return Coefficients(lr=lr, decay=1.0 - lr * weight_decay, beta1=beta1, beta2=beta2)

    @staticmethod
    def update(c, p, g, s):
        direction = torch.sign(c.beta1 * s[0] + (1.0 - c.beta1) * g)
        return p * c.decay - c.lr * direction, [c.beta2 * s[0] + (1.0 - c.beta2) * g]


@reference_of(ops.adabelief)
class AdaBelief:
    """AdaBelief, arXiv 2010.07468, as adabelief-pytorch 0.2.1; rectified as in RAdam, arXiv 1908.03265."""

    @staticmethod
    def coefficients(
        lr,
        step,
        scale,
        *,
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled_weight_decay,
        fixed_decay,
        rectify,
        degenerated_to_sgd,
    ):
        correction1, correction2 = _bias_correction(beta1, step), _bias_correction(beta2, step)
        step_size = lr / correction1
        inverse_root2: Tensor | float = correction2.rsqrt()
        adaptive = None
        if rectify:
            n_max = 2.0 / (1.0 - beta2) - 1.0
            n = n_max - 2.0 * step * (1.0 - correction2) / correction2
            adaptive = n >= 5.0
            inverse_root2 = 1.0
            ratio = correction2 * (n - 4.0) / (n_max - 4.0) * (n - 2.0) / n * n_max / (n_max - 2.0)
            fallback = step_size if degenerated_to_sgd else torch.zeros_like(step_size)
            step_size = torch.where(adaptive, step_size * ratio.abs().sqrt(), fallback)
        return Coefficients(
            decay=1.0 - (1.0 if fixed_decay else lr) * weight_decay if decoupled_weight_decay else 1.0,
            coupled_decay=0.0 if decoupled_weight_decay else weight_decay,
            step_size=step_size,
            inverse_root2=inverse_root2,
            adaptive=adaptive,
            use_maximum=not rectify,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )

    @staticmethod
    def update(c, p, g, s):
        g = g + c.coupled_decay * p
        m = c.beta1 * s[0] + (1.0 - c.beta1) * g
        residual = g - m
        v = c.beta2 * s[1] + (1.0 - c.beta2) * (residual * residual) + c.eps
        new = [m, v]
        if len(s) == 3:
            new.append(torch.maximum(s[2], v))
        variance = new[-1] if c.use_maximum else v
        denominator = variance.sqrt() * c.inverse_root2 + c.eps
        if c.adaptive is not None:
            denominator = torch.where(c.adaptive, denominator, torch.ones_like(denominator))
        return p * c.decay - c.step_size * (m / denominator), new


@reference_of(ops.adan)
class Adan:
    """Adan, arXiv 2208.06677, as the authors' adan.py."""

    @staticmethod
    def coefficients(lr, step, scale, *, beta1, beta2, beta3, eps, weight_decay, no_prox):
        return Coefficients(
            decay=1.0 - lr * weight_decay if no_prox else 1.0,
            shrink=1.0 if no_prox else 1.0 / (1.0 + lr * weight_decay),
            step_size=lr / _bias_correction(beta1, step),
            difference_step_size=lr * beta2 / _bias_correction(beta2, step),
            inverse_root3=_bias_correction(beta3, step).rsqrt(),
            first=step == 1.0,
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            eps=eps,
        )

    @staticmethod
    def update(c, p, g, s):
        difference = torch.where(c.first, torch.zeros_like(g), g + s[3])
        lookahead = g + c.beta2 * difference
        m = c.beta1 * s[0] + (1.0 - c.beta1) * g
        v = c.beta2 * s[1] + (1.0 - c.beta2) * difference
        n = c.beta3 * s[2] + (1.0 - c.beta3) * (lookahead * lookahead)
        denominator = n.sqrt() * c.inverse_root3 + c.eps
        step = (c.step_size * m + c.difference_step_size * v) / denominator
        return (p * c.decay - step) * c.shrink, [m, v, n, -g]


@reference_of(ops.diffgrad)
class DiffGrad:
    """diffGrad, arXiv 1909.11015, as the authors' second version."""

    @staticmethod
    def coefficients(lr, step, scale, *, beta1, beta2, eps, weight_decay):
        return Coefficients(
            coupled_decay=weight_decay,
            step_size=lr * _bias_correction(beta2, step).sqrt() / _bias_correction(beta1, step),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )

    @staticmethod
    def update(c, p, g, s):
        g = g + c.coupled_decay * p
        m = c.beta1 * s[0] + (1.0 - c.beta1) * g
        v = c.beta2 * s[1] + (1.0 - c.beta2) * (g * g)
        denominator = (1.0 + torch.exp(-(s[2] - g).abs())) * (v.sqrt() + c.eps)
        return p - c.step_size * (m / denominator), [m, v, g]


def _rate(rate: Tensor, dtype: torch.dtype) -> Tensor:
    """A rate that norms made. What the dtype does not hold counts as its largest number."""
    return rate.clamp(max=torch.finfo(dtype).max).to(dtype)


@reference_of(ops.lamb)
class LAMB:
    """LAMB, arXiv 1904.00962, Algorithm 2 with phi the identity."""

    @staticmethod
    def coefficients(lr, step, scale, *, beta1, beta2, eps, weight_decay, always_adapt):
        return Coefficients(
            lr=lr,
            decay=weight_decay,
            inverse1=1.0 / _bias_correction(beta1, step),
            inverse2=1.0 / _bias_correction(beta2, step),
            adapt=always_adapt or weight_decay != 0.0,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )

    @staticmethod
    def direction(c, p, s):
        return (s[0] * c.inverse1) / ((s[1] * c.inverse2).sqrt() + c.eps) + c.decay * p

    @staticmethod
    def norm_terms(c, p, g, s):
        new = [c.beta1 * s[0] + (1.0 - c.beta1) * g, c.beta2 * s[1] + (1.0 - c.beta2) * (g * g)]
        return (p, LAMB.direction(c, p, new)), new

    @staticmethod
    def apply_norms(c, squares):
        if c.adapt:
            adapted = c.lr.double() * (squares[0] / squares[1]).sqrt()
            c.lr = torch.where((squares[0] > 0.0) & (squares[1] > 0.0), _rate(adapted, c.lr.dtype), c.lr)

    @staticmethod
    def update(c, p, g, s):
        return p - c.lr * LAMB.direction(c, p, s), []


@reference_of(ops.lars)
class LARS:
    """LARS, arXiv 1708.03888, Algorithm 1; the local rate is 1 where a norm is zero."""

    @staticmethod
    def coefficients(lr, step, scale, *, momentum, weight_decay, trust_coefficient, eps):
        return Coefficients(lr=lr, decay=weight_decay, momentum=momentum, trust=trust_coefficient, eps=eps)

    @staticmethod
    def norm_terms(c, p, g, s):
        return (p, g), []

    @staticmethod
    def apply_norms(c, squares):
        norm_p, norm_g = squares[0].sqrt(), squares[1].sqrt()
        rate = c.trust * norm_p / (norm_g + c.decay * norm_p + c.eps)
        c.lr = torch.where((norm_p > 0.0) & (norm_g > 0.0), _rate(c.lr.double() * rate, c.lr.dtype), c.lr)

    @staticmethod
    def update(c, p, g, s):
        v = c.momentum * s[0] + c.lr * (g + c.decay * p)
        return p - v, [v]


@reference_of(ops.sgdsai)
class SGDSaI:
    """SGD-SaI, arXiv 2412.11768, as the authors' sgd_sai.py; ``scale`` is the tensor's signal-to-noise ratio."""

    @staticmethod
    def coefficients(lr, step, scale, *, momentum, weight_decay):
        held = torch.where(step == 1.0, torch.zeros_like(step), torch.full_like(step, momentum))
        return Coefficients(decay=1.0 - lr * weight_decay, momentum=held, rest=1.0 - held, step_size=lr * scale)

    @staticmethod
    def update(c, p, g, s):
        m = c.momentum * s[0] + c.rest * g
        return p * c.decay - c.step_size * m, [m]


@ops.grad_squares.eager
def grad_squares(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all gradients, as ``singlepass._ops.optim`` defines it."""
    require(len(grads) > 0, "grad_squares", "at least one gradient", "none", "Leave out the call.")
    return torch.stack([square_sum(g) for g in grads]).sum().reshape(1)


def finish_grad_norm(
    squares: Tensor, *, max_norm: float = 0.0, eps: float = 0.0, grad_scale: Tensor | None = None
) -> Tensor:
    """What ``grad_norm`` returns, from the sum of squares of all gradients: float64, one element."""
    squares = squares.reshape(())
    scale = torch.ones_like(squares) if grad_scale is None else grad_scale.reshape(()).double()
    norm = squares.sqrt() / scale
    divisor = scale
    if max_norm > 0.0:
        clip = max_norm / (norm + eps)
        divisor = torch.where(clip >= 1.0, scale, scale / clip)
    return torch.stack((norm, divisor, (~squares.isfinite()).double())).float()


@ops.grad_norm.eager
def grad_norm(
    grads: Sequence[Tensor], *, max_norm: float = 0.0, eps: float = 0.0, grad_scale: Tensor | None = None
) -> Tensor:
    """Norm, divisor and non-finite flag of all gradients, as ``singlepass._ops.optim`` defines them."""
    require(len(grads) > 0, "grad_norm", "at least one gradient", "none", "Leave out the call.")
    return finish_grad_norm(grad_squares(grads), max_norm=max_norm, eps=eps, grad_scale=grad_scale)


@ops.stream_.eager
def stream_(reads: Sequence[Tensor], updates: Sequence[Tensor]) -> None:
    """Reads every tensor of ``reads``, reads and writes every tensor of ``updates``."""
    total: Tensor | float = 0.0
    for r in reads:
        total = total + r
    for u in updates:
        u.add_(total, alpha=0.0)
