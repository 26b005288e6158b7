# SPDX-License-Identifier: Apache-2.0
"""What the package's autograd functions share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._errors import message


class _OnlyOnce(torch.autograd.Function):
    """A gradient that depends on tensors in a way that nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, where: str, remedy: str, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.text = message(where, "to be differentiated once", "a gradient of its gradient", remedy)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.text)


def only_once(
    where: str, remedy: str, grads: Iterable[Tensor | None], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients that raise where they are differentiated.

    With create_graph=True a gradient that looked constant would make second derivatives silently wrong.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(grads)
    return tuple(None if g is None else _OnlyOnce.apply(where, remedy, g, *inputs) for g in grads)
