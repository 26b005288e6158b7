# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class DiffGrad(FusedOptimizer):
    r"""diffGrad: Adam with a friction from the gradient's change (arXiv 1909.11015), as in the authors' second version.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
        \xi = \frac{1}{1 + e^{-|g' - g|}} \\
        p &= p - \eta\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t} \frac{m\,\xi}{\sqrt{v} + \epsilon}

    Weight decay is added to the gradient. The first version of the official code, which the paper's runs used, compares
    the gradient with itself if gradients are zeroed in place, so that its friction is always one half.

    States per parameter: ``exp_avg``, ``exp_avg_sq``, ``previous_grad`` (bfloat16 if the gradients are bfloat16 and
    there is no weight decay, which is exact), and ``step``. State dicts of the official code load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment, before bias correction.
        weight_decay: L2 regularisation, added to the gradient.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.DiffGrad(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.diffgrad

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )

    def _state_dtype_of(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
        lossless = group["weight_decay"] == 0.0 and p.grad is not None and p.grad.dtype == torch.bfloat16
        if name == "previous_grad" and lossless and p.dtype != torch.float64:
            return torch.bfloat16
        return super()._state_dtype_of(name, p, group)
