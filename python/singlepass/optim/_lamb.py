# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .._ops import optim as ops
from ._base import FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class LAMB(FusedOptimizer):
    r"""LAMB: Adam with layer-wise step sizes (arXiv 1904.00962, Algorithm 2, with the identity for phi).

    .. math::
        u &= \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda p \\
        p &= p - \eta \frac{\|p\|}{\|u\|} u

    The ratio is 1 if a norm is zero; norms are per tensor. Gradients are clipped by default (``max_grad_norm``), as in
    apex and NVLAMB; the paper does not clip (0). The paper adapts all tensors; apex's FusedLAMB by default does not
    adapt tensors without weight decay (``always_adapt=False``).

    States per parameter: ``exp_avg``, ``exp_avg_sq`` and ``step``. State dicts of apex's FusedLAMB load.

    Args:
        params: parameters, or groups of them. Put biases and norms in a group without weight decay.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: added to the update before it is scaled.
        always_adapt: also scale groups without weight decay by the ratio (apex's ``use_nvlamb``).
        max_grad_norm: clip the global gradient norm to this; 0: no clipping. One value for all groups.
        norm_group: the ranks of this group have different plain tensors, or different parts of them, as under
            ZeroRedundancyOptimizer, FSDP1 and DeepSpeed: ``max_grad_norm`` is for the norm of the gradients of all.
            Each of them takes part in each step. Ratios are of what a rank has, and right of whole tensors alone.
            Not for DTensors.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.LAMB(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.lamb
    _norms_follow_states = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        always_adapt: bool = True,
        max_grad_norm: float = 1.0,
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
                "always_adapt": always_adapt,
                "max_grad_norm": max_grad_norm,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
            norm_group=norm_group,
        )
