# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class Lion(FusedOptimizer):
    r"""Lion: steps by the sign of an interpolated momentum (arXiv 2302.06675, Algorithm 2).

    .. math::
        p &= (1-\eta\lambda) p - \eta\,\mathrm{sign}(\beta_1 m + (1-\beta_1) g) \\
        m &= \beta_2 m + (1-\beta_2) g

    The sign of zero is zero. States per parameter: ``exp_avg`` (and ``step`` with stochastic rounding). State dicts
    of google/automl's ``lion_pytorch.py`` and of lion-pytorch load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; the paper uses a third to a tenth of AdamW's.
        betas: interpolation for the direction, and decay rate of the momentum.
        weight_decay: decoupled weight decay, times ``lr``; the paper uses 3 to 10 times AdamW's.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.Lion(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.lion

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
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
                "weight_decay": weight_decay,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )
