# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class AdaBelief(FusedOptimizer):
    r"""AdaBelief: steps adapted by the belief in gradients (arXiv 2010.07468, Algorithm 2; adabelief-pytorch 0.2.1).

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad s = \beta_2 s + (1-\beta_2)(g-m)^2 + \epsilon \\
        p &= (1-\eta\lambda) p - \frac{\eta}{1-\beta_1^t} \frac{m}{\sqrt{s} / \sqrt{1-\beta_2^t} + \epsilon}

    The residual uses the updated mean, and ``eps`` is added to the stored variance at every step, in the paper and in
    the code. ``rectify`` (the code's default since 0.1.0; not in the paper's Algorithm 2) multiplies the step by
    RAdam's rectification (arXiv 1908.03265) once its length of average reaches 5. As in the official code, the maximum
    of ``amsgrad`` is then updated but not used.

    States per parameter: ``exp_avg``, ``exp_avg_var``, with AMSGrad ``max_exp_avg_var``, and ``step``. State dicts of
    adabelief-pytorch load. In float16 states an ``eps`` of 1e-16 is zero.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the mean and of the variance of the residual.
        eps: added to the variance and to its square root. The authors advise 1e-8 where SGD beats Adam, else 1e-16.
        weight_decay: weight decay.
        amsgrad: use the maximum of all variances so far.
        decoupled_weight_decay: shrink parameters by ``lr * weight_decay`` (the code's ``weight_decouple``); False adds
            ``weight_decay * p`` to the gradient.
        fixed_decay: decoupled decay by ``weight_decay`` alone, without ``lr``.
        rectify: rectify the variance of the first steps.
        degenerated_to_sgd: as long as the rectification is undefined, step by the mean alone; False: do not step.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.AdaBelief(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.adabelief

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = True,
        fixed_decay: bool = False,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        *,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        unscale_in_step: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "decoupled_weight_decay": decoupled_weight_decay,
                "fixed_decay": fixed_decay,
                "rectify": rectify,
                "degenerated_to_sgd": degenerated_to_sgd,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )
