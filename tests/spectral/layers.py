# SPDX-License-Identifier: Apache-2.0
"""Layers under test, and the dense formulas for their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singlepass.spectral import SSTLinear

# Outputs, inputs and rank: tall, wide, square; rank 1, full rank, more than one panel of columns.
SIZES = {
    "tall": (40, 24, 5),
    "wide": (24, 40, 5),
    "square": (32, 32, 8),
    "rank-1": (17, 19, 1),
    "full": (12, 16, 12),
    "one": (1, 1, 1),
    "panels": (20, 1100, 3),
}


def linear(
    outputs: int, inputs: int, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def layer_of(name: str, dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> SSTLinear:
    outputs, inputs, rank = SIZES[name]
    return SSTLinear.from_linear(linear(outputs, inputs, bias).to(dtype), rank, **options)


@dataclass(frozen=True)
class Dense:
    """Result and gradients by the dense formulas, in float64; ``bound``: the same of absolute values, the scale of
    what rounding may do."""

    y: Tensor
    x: Tensor
    s: Tensor
    u: Tensor
    v: Tensor
    bias: Tensor


def dense(layer: SSTLinear, x: Tensor, grad: Tensor, absolute: bool = False) -> Dense:
    def wide(t: Tensor) -> Tensor:
        t = t.detach().double()
        return t.abs() if absolute else t

    u, s, v = map(wide, layer.factors())
    weight = (u * s[:, None]).mT @ v
    rows, g = wide(x).reshape(-1, x.shape[-1]), wide(grad).reshape(-1, grad.shape[-1])
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else wide(layer.bias)
    outer = g.mT @ rows
    active_u, active_v = u[: layer.rank], v[: layer.rank]
    grad_u, grad_v = active_v @ outer.mT, active_u @ outer
    if layer.gradient == "default":
        grad_u, grad_v = (t * s[: layer.rank, None] for t in (grad_u, grad_v))
    y = (rows @ weight.mT + bias).view(*x.shape[:-1], len(weight))
    return Dense(y, (g @ weight).view(x.shape), ((u @ outer) * v).sum(1), grad_u, grad_v, g.sum(0))


def evaluated(layer: SSTLinear, x: Tensor, grad: Tensor) -> Dense:
    """What the layer computes."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    bias = torch.zeros(0) if layer.bias is None else layer.bias.grad
    grads = [p.grad for p in (layer.singular_values, layer.active_u, layer.active_v)]
    return Dense(y.detach(), x.grad, *grads, bias)  # type: ignore[arg-type]
