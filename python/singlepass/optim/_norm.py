# SPDX-License-Identifier: Apache-2.0
"""The norm of all gradients, by which they are unscaled and clipped, and whether any is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import require
from .._ops.optim import grad_norm
from ._buckets import Bucket, is_wrapper
from ._shards import whole


def measure(
    where: str,
    buckets: list[Bucket],
    max_norm: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """One read of all gradients: (divisor that unscales and clips, found_inf)."""
    grads: dict[tuple[torch.device, str | None, bool], list[Tensor]] = {}
    for bucket in buckets:
        all_grads = [p.grad for p in bucket.owners if p.grad is not None]
        kinds = {kind: [g for g in all_grads if is_wrapper(g) == kind] for kind in (False, True)}
        for wrapped, some in kinds.items():
            key = (bucket.device, "eager" if wrapped else bucket.asked, wrapped)
            if some:
                grads.setdefault(key, []).extend(some)
    stats = []
    for (device, wanted, _), present in grads.items():
        run = grad_norm.on(grad_norm.choose(device.type, {g.dtype for g in present}, wanted))
        stats.append(whole(run(present, max_norm=max_norm, eps=eps, grad_scale=to_device(grad_scale, device))))
    if not stats:
        return grad_scale, found_inf
    alone = len(stats) == 1 or not any(map(is_wrapper, stats))
    remedy = "Give them to optimizers of their own, or pass max_grad_norm=0."
    require(alone, where, "one type of parameters for the norm of all gradients", "several", remedy)
    _, divisor, nonfinite = stats[0] if len(stats) == 1 else _join(stats, max_norm, eps, grad_scale)
    return divisor, nonfinite if grad_scale is not None and found_inf is None else found_inf


def to_device(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)


def _join(stats: list[Tensor], max_norm: float, eps: float, grad_scale: Tensor | None) -> Tensor:
    """What grad_norm would say of the gradients of several devices together, on the first of them."""
    device = stats[0].device
    norm = torch.linalg.vector_norm(torch.stack([s[0].to(device) for s in stats]).double())
    scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(device).double().reshape(())
    clip = max_norm / (norm + eps) if max_norm > 0.0 else torch.ones_like(norm)
    divisor = torch.where(clip >= 1.0, scale, scale / clip)
    return torch.stack((norm, divisor, (~norm.isfinite()).double())).float()
