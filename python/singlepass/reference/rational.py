# SPDX-License-Identifier: Apache-2.0
"""Rational activations in plain PyTorch: the truth that kernels are held to, in any dtype up to float64.

Sources: Molina et al., "Padé Activation Units", arXiv 1907.06732, and the package rational-activations (forms A to D);
Yang and Wang, "Kolmogorov-Arnold Transformer", arXiv 2409.10594, and rational_kat_cu (groups). Sign conventions are the
kernels' of the latter: the derivative of |v| at v = 0 is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import rational as ops
from .philox import philox4x32

NOISE = 0.1  # form D multiplies coefficients by 1 - NOISE to 1 + NOISE
C_OFFSET = 0.1
_A, _B, _C, _D = range(4)
_STREAM_DROPOUT, _STREAM_NUMERATOR, _STREAM_DENOMINATOR = range(3)


def _absolute(v: Tensor) -> Tensor:
    """|v|, whose derivative at zero is 1: autograd takes the branch that was taken."""
    return torch.where(v < 0, -v, v)


def _along(v: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A vector of one number per channel, shaped to broadcast against x."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return v.view(shape)


def _per_channel(weights: Tensor, x: Tensor, channel_dim: int) -> list[Tensor]:
    """(groups, k) coefficients as k tensors that broadcast against x."""
    spread = weights.repeat_interleave(x.shape[channel_dim] // weights.shape[0], dim=0)
    return [_along(column, x, channel_dim) for column in spread.unbind(1)]


def _offsets(x: Tensor) -> Tensor:
    """Each element's offset in the memory of the result."""
    strides = torch.empty_like(x, device="meta").stride()
    return torch.arange(x.numel(), device=x.device).as_strided(x.shape, strides)


def _half(words: tuple[Tensor, ...], index: int) -> Tensor:
    return (words[index // 2] >> (16 * (index % 2))) & 0xFFFF


def _noise(seed: Tensor, stream: int, offsets: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Factors for ``count`` coefficients of every element."""
    words = philox4x32(seed.reshape(()), offsets, stream)
    return [(1.0 - NOISE) + _half(words, i).to(dtype) * (2.0 * NOISE / 65536.0) for i in range(count)]


def _kept(seed: Tensor, offsets: Tensor, threshold: int) -> Tensor:
    words = torch.stack(philox4x32(seed.reshape(()), offsets // 8, _STREAM_DROPOUT))
    lane = offsets % 8
    word = words.gather(0, (lane // 2).unsqueeze(0)).squeeze(0)
    return ((word >> (16 * (lane % 2))) & 0xFFFF) >= threshold


def _horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


@ops.rational.eager
def rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    *,
    form: int,
    channel_dim: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``rational`` in eager PyTorch. Arguments and result as in ``singlepass._ops.rational``; differentiable."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype)
    if bias is not None:
        z = z + _along(bias.to(dtype), x, channel_dim)
    a = _per_channel(numerator.to(dtype), x, channel_dim)
    b = _per_channel(denominator.to(dtype), x, channel_dim)
    if form == _D:
        assert seed is not None
        offsets = _offsets(x)
        noise_a = _noise(seed, _STREAM_NUMERATOR, offsets, len(a), dtype)
        noise_b = _noise(seed, _STREAM_DENOMINATOR, offsets, len(b), dtype)
        a = [coefficient * factor for coefficient, factor in zip(a, noise_a, strict=True)]
        b = [coefficient * factor for coefficient, factor in zip(b, noise_b, strict=True)]
    if form == _A:
        q = _horner([torch.ones_like(b[0]), *map(_absolute, b)], _absolute(z))
    elif form == _C:
        q = C_OFFSET + _absolute(_horner(b, z))
    else:
        q = 1.0 + _absolute(_horner([torch.zeros_like(b[0]), *b], z))
    y = _horner(a, z) / q
    threshold = ops.dropout_threshold(dropout)
    if threshold > 0:
        assert seed is not None
        kept = _kept(seed, _offsets(x), threshold)
        y = torch.where(kept, y * (65536.0 / (65536.0 - threshold)), 0.0)
    if gate is not None:
        y = y * gate.to(dtype)
    y = y.to(x.dtype)
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x).copy_(y)


@ops.rational_backward.eager
def rational_backward(
    grad: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    *,
    form: int,
    channel_dim: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`rational` by autograd, as ``singlepass._ops.rational`` lists them."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, numerator, denominator, bias, gate)]
    with torch.enable_grad():
        y = rational(*inputs, form=form, channel_dim=channel_dim, dropout=dropout, seed=seed)  # type: ignore[arg-type]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad))
    grads = [x.new_empty(0) if t is None else next(found) for t in inputs]
    for i in (0, 4):
        if inputs[i] is not None:
            grads[i] = torch.empty_like(x).copy_(grads[i])
    return tuple(grads)  # type: ignore[return-value]
