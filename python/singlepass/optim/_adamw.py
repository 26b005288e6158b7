# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class AdamW(FusedOptimizer):
    r"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101), as in ``torch.optim.AdamW``.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2 \\
        p &= (1-\eta\lambda) p - \frac{\eta}{1-\beta_1^t} \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}

    States per parameter: ``exp_avg``, ``exp_avg_sq``, with AMSGrad ``max_exp_avg_sq``, and ``step``. State dicts of
    ``torch.optim.AdamW`` load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, times ``lr``.
        amsgrad: use the maximum of all second moments so far.
        foreach, fused: accepted as ``torch.optim.AdamW`` does, and ignored: a step is fused in any case.
        differentiable: must be False.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.adamw

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        unscale_in_step: bool = True,
        backend: str | None = None,
    ) -> None:
        remedy = "For gradients through a step, use torch.optim.AdamW."
        self._require(not differentiable, "differentiable=False", differentiable, remedy)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad},
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        decoupled = group.get("decoupled_weight_decay", True) or group["weight_decay"] == 0.0  # of torch's groups
        remedy = "It was saved by torch.optim.Adam, whose weight decay goes into the gradient."
        self._require(decoupled, "decoupled weight decay", "decoupled_weight_decay=False", remedy)
