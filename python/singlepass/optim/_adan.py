# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class Adan(FusedOptimizer):
    r"""Adan: adaptive Nesterov momentum (arXiv 2208.06677), as in the authors' ``adan.py``.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2)(g-g'), \quad
        n = \beta_3 n + (1-\beta_3)(g + \beta_2 (g-g'))^2 \\
        p &= \frac{1}{1+\eta\lambda} \left( p - \frac{\frac{\eta}{1-\beta_1^t} m +
        \frac{\eta\beta_2}{1-\beta_2^t} v}{\sqrt{n} / \sqrt{1-\beta_3^t} + \epsilon} \right)

    The code's betas are one minus the paper's; the paper's Algorithm 1 has no bias correction and adds ``eps`` inside
    the root. :math:`g'` is the previous gradient; the first difference is zero. Steps are counted per parameter (the
    official code counts per group, which matters for parameters that appear late).

    States per parameter: ``exp_avg``, ``exp_avg_diff``, ``exp_avg_sq``, ``neg_pre_grad`` (bfloat16 if the gradients
    are bfloat16 and not clipped, which is exact), and ``step``. Official state dicts load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay rates of the averages of gradients, differences and squares.
        eps: added to the square root of the squares' average.
        weight_decay: weight decay, times ``lr``.
        max_grad_norm: clip the global gradient norm to this; 0: no clipping. One value for all groups.
        no_prox: decay as in AdamW, :math:`p \leftarrow (1-\eta\lambda)p` before the step, instead of the proximal
            division after it.
        norm_group: the ranks of this group have different plain tensors, or different parts of them, as under
            ZeroRedundancyOptimizer, FSDP1 and DeepSpeed: ``max_grad_norm`` is for the norm of the gradients of all.
            Each of them takes part in each step. Not for DTensors.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.Adan(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.adan

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        no_prox: bool = False,
        *,
        norm_group: torch.distributed.ProcessGroup | None = None,
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
                "max_grad_norm": max_grad_norm,
                "no_prox": no_prox,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
            norm_group=norm_group,
        )

    def _clipping(self) -> tuple[float, float]:
        max_norm, _ = super()._clipping()
        return max_norm, self.param_groups[-1]["eps"] if max_norm > 0.0 else 0.0  # the official code takes the last

    def _state_dtype_of(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
        lossless = group["max_grad_norm"] == 0.0 and p.grad is not None and p.grad.dtype == torch.bfloat16
        if name == "neg_pre_grad" and lossless and p.dtype != torch.float64:
            return torch.bfloat16
        return super()._state_dtype_of(name, p, group)
