# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ._base import Bucket, FusedOptimizer
from ._doc import shared_arguments


@shared_arguments
class SGDSaI(FusedOptimizer):
    r"""SGD-SaI, momentum SGD with rates scaled at initialisation (arXiv 2412.11768), as the authors' ``sgd_sai.py``.

    .. math::
        \mathrm{gsnr} &= \frac{\|g\|}{\mathrm{std}(g) + \epsilon} \text{ at the first step}, \quad
        m = \mu m + (1-\mu) g \text{ (at the first step } g) \\
        p &= (1-\eta\lambda) p - \eta\,\mathrm{gsnr}\,m

    The gain is measured once per tensor, when it first has a gradient; that first step looks at ``found_inf`` on the
    host. Tensors of one element, whose deviation is undefined, take the gain 1 (the official code gives them |g|/eps).

    States per parameter: ``momentum_buffer``, ``gsnr`` and ``step``. State dicts of the official code load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: decay rate of the momentum.
        eps: added to the standard deviation.
        weight_decay: decoupled weight decay, times ``lr``.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.SGDSaI(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule_name = "sgdsai"
    steps_where_uncounted = 1.0  # the official code counts none; its saved momentum has begun

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "eps": eps,
                "weight_decay": weight_decay,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            backend=backend,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_values(group, momentum="in [0, 1)", eps="in [0, inf)", weight_decay="in [0, inf)")

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": group["momentum"], "weight_decay": group["weight_decay"]}

    def _before_step(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> bool:
        fresh = [(p, g) for p, g in zip(bucket.params, bucket.grads, strict=True) if "gsnr" not in self.state[p]]
        if fresh and found_inf is not None and bool(found_inf):
            return False
        for p, g in fresh:
            scale = 1.0 if grad_scale is None else grad_scale.reshape(())
            self.state[p]["gsnr"] = _gain(g.to(torch.promote_types(g.dtype, torch.float32)) / scale, group["eps"])
        return True


def _gain(g: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient signal-to-noise ratio of one tensor."""
    if g.numel() < 2:
        return torch.ones((), dtype=torch.float32, device=g.device)
    return (torch.linalg.vector_norm(g) / (g.std() + eps)).nan_to_num(nan=0.0).float()
