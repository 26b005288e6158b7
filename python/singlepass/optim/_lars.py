# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class LARS(FusedOptimizer):
    r"""LARS: SGD with momentum and layer-wise learning rates (arXiv 1708.03888, Algorithm 1).

    .. math::
        v &= \mu v + \eta \frac{\kappa \|p\|}{\|g\| + \lambda \|p\| + \epsilon} (g + \lambda p) \\
        p &= p - v

    The local rate is 1 if a norm is zero; norms are per tensor. The learning rate is inside the momentum, as in the
    paper. States per parameter: ``momentum_buffer``.

    Args:
        params: parameters, or groups of them. Put biases and norms in a group without weight decay, or leave them to
            another optimizer.
        lr: global learning rate.
        momentum: decay rate of the momentum.
        weight_decay: added to the gradient, and in the denominator of the local rate.
        trust_coefficient: the paper's eta, here kappa.
        eps: added to the denominator; the paper has none.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.LARS(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.lars

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
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
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "eps": eps,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )
