# SPDX-License-Identifier: Apache-2.0
"""The product with W = U^T diag(s) V by two routes, and its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd import gradients
from .._ops import spectral as ops
from ..reference.spectral import decode

# Columns of the dense gradient that exist at a time where W is materialised.
PANEL = 512


class Sizes(NamedTuple):
    """Of a product: tokens, outputs, inputs, singular values, and active ones among them."""

    tokens: int
    outputs: int
    inputs: int
    values: int
    active: int


def flops(sizes: Sizes, training: bool) -> dict[str, int]:
    """Floating-point operations of each way to evaluate the product, with its gradients where ``training``."""
    tokens, m, n, k, r = sizes
    factored, materialized = 2 * tokens * k * (m + n), 2 * tokens * m * n + 2 * k * m * n
    if training:
        factored += 2 * tokens * (k + r) * (m + n)
        materialized += 4 * tokens * m * n + 2 * (k + r) * m * n
    return {"factored": factored, "materialized": materialized}


def evaluation_of(sizes: Sizes, training: bool) -> str:
    """The way with fewer operations: W is worth its making from about twice as many tokens as it has rows."""
    counts = flops(sizes, training)
    return "materialized" if counts["materialized"] < counts["factored"] else "factored"


class _Segment(NamedTuple):
    """Singular vectors that lie together: rows of U and V in the dtype of the products, and their values."""

    u: Tensor
    s: Tensor
    v: Tensor


def _segments(
    active_u: Tensor,
    active_v: Tensor,
    s: Tensor,
    frozen: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> list[_Segment]:
    """Active vectors, then frozen ones if there are any."""
    rank = active_u.shape[0]
    segments = [_Segment(active_u.to(dtype), s[:rank], active_v.to(dtype))]
    if rank < s.shape[0]:
        u, v, scales_u, scales_v = frozen
        if scales_u is not None and scales_v is not None:
            u, v = decode(u, scales_u), decode(v, scales_v)
        segments.append(_Segment(u.to(dtype), s[rank:], v.to(dtype)))
    return segments


def _scaled(rows: Tensor, s: Tensor) -> Tensor:
    """Rows times their singular values, rounded once."""
    return (rows * s.unsqueeze(-1)).to(rows.dtype)


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, where total is None, a bias, or a matrix whose memory is taken for the result."""
    if total is None:
        return a @ b
    return total.addmm_(a, b) if total.dim() == 2 else torch.addmm(total.to(a.dtype), a, b)


def _materialize(segments: list[_Segment]) -> Tensor:
    weight = None
    for u, s, v in segments:
        weight = _plus(weight, _scaled(u, s).mT, v)
    assert weight is not None
    return weight


def _through_factors(x: Tensor, segments: list[_Segment], bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """x W^T + b and the parts of t = x V^T."""
    y, parts = bias, []
    for u, s, v in segments:
        t = x @ v.mT
        parts.append(t)
        # The smaller factor is the one to be scaled; a traced graph is for any number of tokens.
        few = torch.compiler.is_compiling() or t.shape[0] < u.shape[1]
        y = _plus(y, (t * s).to(t.dtype), u) if few else _plus(y, t, _scaled(u, s))
    assert y is not None
    return y, parts


def plain_product(
    x: Tensor,
    active_u: Tensor,
    active_v: Tensor,
    s: Tensor,
    bias: Tensor | None,
    frozen: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    gradient: str,
) -> Tensor:
    """The product by operators that PyTorch differentiates by itself, as often as one likes."""
    segments = _segments(active_u, active_v, s, frozen, x.dtype)
    y = 0.0 if bias is None else bias.to(x.dtype)
    for i, (u, values, v) in enumerate(segments):
        if i == 0 and gradient == "enhanced":
            # Both terms are zero; their gradients are those of the vectors, without s.
            fixed_u, fixed_v = u.detach(), v.detach()
            y = y + (x @ fixed_v.T) @ (u - fixed_u) + (x @ (v - fixed_v).T) @ fixed_u
            u, v = fixed_u, fixed_v
        y = y + (x @ v.T * values).to(x.dtype) @ u
    assert isinstance(y, Tensor)
    return y


class SSTProduct(torch.autograd.Function):
    """Saves x with the parts of t = x V^T, or with W; the vectors are what the caller holds anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        active_u: Tensor,
        active_v: Tensor,
        s: Tensor,
        bias: Tensor | None,
        frozen_u: Tensor,
        frozen_v: Tensor,
        scales_u: Tensor | None,
        scales_v: Tensor | None,
        gradient: str,
        evaluation: str,
        backend: str,
    ) -> Tensor:
        segments = _segments(active_u, active_v, s, (frozen_u, frozen_v, scales_u, scales_v), x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if evaluation == "materialized":
            weight = _materialize(segments)
            y, saved = _plus(bias, rows, weight.mT), [weight]
        else:
            y, saved = _through_factors(rows, segments, bias)
        ctx.save_for_backward(x, active_u, active_v, s, frozen_u, frozen_v, scales_u, scales_v, *saved)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = gradient, evaluation, backend
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor a single time
        x, active_u, active_v, s, *frozen = saved[:8]
        gradient, evaluation, backend = ctx.options
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        needed = ctx.needs_input_grad

        def run() -> tuple[Tensor | None, ...]:
            segments = _segments(active_u, active_v, s, tuple(frozen), x.dtype)
            if evaluation == "materialized":
                grads = _gradients_from_weight(g, rows, segments, saved[8], needed)
            else:
                grads = _gradients_from_factors(g, rows, segments, saved[8:], needed, backend)
            grad_x, grad_u, grad_v, grad_s = grads
            if gradient == "default":
                values = s[: active_u.shape[0]].unsqueeze(-1)
                grad_u, grad_v = (None if t is None else t * values for t in (grad_u, grad_v))
            return (
                None if grad_x is None else grad_x.view(x.shape),
                None if grad_u is None else grad_u.to(active_u.dtype),
                None if grad_v is None else grad_v.to(active_v.dtype),
                None if grad_s is None else grad_s.to(s.dtype),
            )

        plain = partial(plain_product, bias=None, frozen=tuple(frozen), gradient=gradient)
        found = gradients("sst_linear", backend, run, plain, grad, x, active_u, active_v, s)
        return *found, g.sum(0, dtype=ctx.bias_dtype) if needed[4] else None, *[None] * 7


# Of x, active_u, active_v and s, where wanted; those of the vectors are enhanced: without s.
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients_from_factors(
    g: Tensor, x: Tensor, segments: list[_Segment], parts: tuple[Tensor, ...], needed: tuple[bool, ...], backend: str
) -> _Gradients:
    """From t = x V^T and q = g U^T; no matrix of W's size is made."""
    needs_x, needs_u, needs_v, needs_s = needed[:4]
    scale = ops.scale_.on(backend)
    grad_u = parts[0].mT @ g if needs_u else None
    grad_x = grad_v = None
    sums = []
    for i, ((u, s, v), t) in enumerate(zip(segments, parts, strict=True)):
        if not (needs_x or needs_s or (needs_v and i == 0)):
            continue
        q = g @ u.mT
        if needs_v and i == 0:
            grad_v = q.mT @ x
        sums.append(scale(q, t, s))
        if needs_x:
            grad_x = _plus(grad_x, q, v)
    return grad_x, grad_u, grad_v, torch.cat(sums) if needs_s else None


def _gradients_from_weight(
    g: Tensor, x: Tensor, segments: list[_Segment], weight: Tensor, needed: tuple[bool, ...]
) -> _Gradients:
    """From W, and from its own gradient g^T x, of which one panel of columns exists at a time."""
    needs_x, needs_u, needs_v, needs_s = needed[:4]
    grad_x = g @ weight if needs_x else None
    if not (needs_u or needs_v or needs_s):
        return grad_x, None, None, None
    active, wide = segments[0], torch.promote_types(g.dtype, torch.float32)
    grad_u, grad_v = torch.zeros_like(active.u, dtype=wide), torch.empty_like(active.v)
    sums = [torch.zeros_like(segment.s, dtype=wide) for segment in segments]
    for start in range(0, x.shape[1], PANEL):
        columns = slice(start, start + PANEL)
        panel = g.mT @ x[:, columns]
        grad_u += active.v[:, columns] @ panel.mT
        for i, (u, _, v) in enumerate(segments):
            along = u @ panel
            if i == 0:
                grad_v[:, columns] = along
            sums[i] += (along * v[:, columns]).sum(1, dtype=wide)
    return grad_x, grad_u, grad_v, torch.cat(sums)
