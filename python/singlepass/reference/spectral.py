# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training in eager PyTorch: the ops of ``_ops/spectral.py``, and the layer as the paper writes it.

Zhao, Zhang, Li, Liu and Cannistraci, "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural
Networks", ICML 2025 (arXiv 2405.15481); the Lorentz layer is of Chen et al., "Fully Hyperbolic Neural Networks", ACL
2022 (arXiv 2105.14686).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._ops import spectral as ops
from .optim import AdamW
from .philox import philox4x32
from .steps import cast, check_grads, check_ids, stochastically_rounded, store, unscaled


def linear(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of W = U^T diag(s) V, always factored; autograd gives the default gradients of U and V, with s."""
    y = (x @ v.mT * s) @ u
    return y if bias is None else y + bias


def _working(t: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


@ops.scale_.eager
def scale_(q: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """q's columns times s in place; column sums of q * t."""
    sums = (_working(q) * _working(t)).sum(0)
    q.copy_(_working(q) * s.to(sums.dtype))
    return sums


def _unit_rows(p: Tensor) -> Tensor:
    norm = p.double().square().sum(-1, keepdim=True).sqrt()
    return p * torch.where(norm == 0, 1.0, 1.0 / norm).to(p.dtype)


@ops.step_.eager
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    project: bool = False,
    maximize: bool = False,
    seed: int | None = None,
    ids: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """AdamW, then rows of unit length, or values that are not negative."""
    check_grads("spectral_step_", params, grads)
    check_ids("spectral_step_", params, seed, ids)
    hyper = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    for i, (p, g, m, v, step) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, steps, strict=True)):
        dtype = torch.promote_types(p.dtype, torch.float32)
        old = p.to(dtype)
        grad = unscaled(g.to(dtype), grad_scale, maximize)
        if project and p.dim() == 2:
            grad = grad - (grad.double() * old.double()).sum(-1, keepdim=True).to(dtype) * old
        coefficients = AdamW.coefficients(lr.double().reshape(()), step.double() + 1.0, None, **hyper)
        c = cast(coefficients, dtype, p.device)
        new, moments = AdamW.update(c, old, grad, [m.to(dtype), v.to(dtype)])
        new = _unit_rows(new) if p.dim() == 2 else new.clamp(min=0.0)
        if seed is not None and p.dtype == torch.bfloat16:
            new = stochastically_rounded(p, new, seed, step, ids[i])
        for target, value in ((m, moments[0]), (v, moments[1]), (p, new), (step, step + 1.0)):
            store(target, value, skip)


def _race_times(p: Tensor, seed: int, draw: int, stream: int) -> Tensor:
    places = torch.arange(p.numel(), device=p.device, dtype=torch.int64)
    low, high, *_ = philox4x32(seed, places, (draw << 32) + stream)
    # 52 random bits, and half of the last one so that the number is inside (0, 1).
    number = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52
    return -number.log() / p


@ops.sample.eager
def sample(
    s: Sequence[Tensor], *, ranks: Sequence[int], ids: Sequence[int], seed: int, draw: int, uniform: float
) -> list[Tensor]:
    """Draws places without replacement by exponential races, and pairs those that go with those that come."""
    exchanges = []
    for values, rank, stream in zip(s, ranks, ids, strict=True):
        weight = values.double().nan_to_num(nan=0.0, posinf=0.0).clamp(min=0.0)
        total = weight.sum()
        count = values.numel()
        share = torch.where(total > 0, weight / total, torch.full_like(weight, 1.0 / count))
        p = uniform / count + (1.0 - uniform) * share
        times = _race_times(p, seed, draw, stream)
        drawn = torch.zeros(count, dtype=torch.bool, device=values.device)
        drawn[times.argsort(stable=True)[:rank]] = True
        # The j-th active place that was not drawn takes the j-th frozen row that was.
        coming = drawn[rank:].long().argsort(descending=True, stable=True)
        leaving = ~drawn[:rank]
        which = (leaving.cumsum(0) - 1).clamp(0, max(count - rank - 1, 0))
        taken = coming[which] if count > rank else torch.full_like(which, -1)
        exchanges.append(torch.where(leaving, taken, torch.full_like(taken, -1)))
    return exchanges


def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of rows (f, c), and their factors (f, ceil(c / 128))."""
    count, columns = rows.shape
    blocks = (columns + ops.BLOCK - 1) // ops.BLOCK
    padded = F.pad(rows.float(), (0, blocks * ops.BLOCK - columns)).view(count, blocks, ops.BLOCK)
    scales = padded.abs().amax(-1) / 127.0
    inverse = torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))
    codes = (padded * inverse.unsqueeze(-1)).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return codes.view(count, blocks * ops.BLOCK)[:, :columns].contiguous(), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 rows that codes and factors stand for."""
    columns = codes.shape[-1]
    return codes.float() * scales.repeat_interleave(ops.BLOCK, dim=-1)[..., :columns]


@ops.swap_.eager
def swap_(
    active: Sequence[Tensor], frozen: Sequence[Tensor], scales: Sequence[Tensor], exchange: Sequence[Tensor]
) -> None:
    """Exchanges rows of two segments, each keeping its dtype."""
    for a, f, factors, change in zip(active, frozen, scales, exchange, strict=True):
        slots = ((change >= 0) & (change < len(f))).nonzero().squeeze(-1)
        rows = change[slots]
        leaving = a[slots]
        if f.dtype == torch.int8:
            a[slots] = decode(f[rows], factors[rows]).to(a.dtype)
            f[rows], factors[rows] = encode(leaving)
        else:
            a[slots] = f[rows].to(a.dtype)
            f[rows] = leaving.to(f.dtype)


@ops.lorentz.eager
def lorentz(z: Tensor, log_scale: Tensor, *, k: float, offset: float) -> Tensor:
    """Rows onto the hyperboloid: a time from their first element, the rest rescaled to fit it."""
    work = _working(z)
    time = work[..., :1].sigmoid() * log_scale.to(work.dtype).exp() + offset
    space = work[..., 1:]
    ratio = ((time - k**0.5) * (time + k**0.5)).clamp(min=0.0) / space.square().sum(-1, keepdim=True).clamp(min=1e-8)
    return torch.cat((time, space * ratio.sqrt()), dim=-1).to(z.dtype)


@ops.lorentz_backward.eager
def lorentz_backward(grad: Tensor, z: Tensor, log_scale: Tensor, *, k: float, offset: float) -> tuple[Tensor, Tensor]:
    """Gradients of z and of log_scale."""
    g, work = _working(grad), _working(z)
    space, scale = work[..., 1:], log_scale.to(work.dtype).exp()
    gate = work[..., :1].sigmoid()
    time = gate * scale + offset
    square = space.square().sum(-1, keepdim=True)
    held = square.clamp(min=1e-8)
    root = (((time - k**0.5) * (time + k**0.5)).clamp(min=0.0) / held).sqrt()
    along = (g[..., 1:] * space).sum(-1, keepdim=True)
    # d root / d time = time / (held root), d root / d space_i = -root space_i / held where the norm is not clamped.
    grad_time = g[..., :1] + torch.where(root > 0.0, along * time / (held * root), 0.0)
    grad_space = g[..., 1:] * root - torch.where(square > 1e-8, along * root / held, 0.0) * space
    grad_first = grad_time * scale * gate * (1.0 - gate)
    grad_scale = (grad_time * gate * scale).sum().reshape(log_scale.shape)
    return torch.cat((grad_first, grad_space), dim=-1).to(z.dtype), grad_scale.to(log_scale.dtype)
