# SPDX-License-Identifier: Apache-2.0
"""Clipping by the norm of all gradients."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from .._errors import message, require
from .._ops.optim import grad_squares

_EPS = 1e-6  # torch's
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``, with the norm of all gradients in one pass over them.

    Gradients are multiplied in place by min(1, max_norm / (norm + 1e-6)). The norm is summed in float64 over all
    elements, whatever their dtypes, and is not rounded to 16 bits between tensors as torch's is. Nothing waits for a
    GPU, unless ``error_if_nonfinite``.

    Args:
        parameters: a tensor or tensors, whose gradients are clipped; those without a gradient are ignored.
        max_norm: not negative.
        norm_type: 2.0 runs the fused norm; torch's own function does other ones.
        error_if_nonfinite: whether a norm that is infinite or NaN is an error; nothing is changed then. Otherwise all
            gradients become NaN or 0, as by torch.
        foreach: as torch's; ignored where the norm is fused.

    Returns:
        Tensor: the norm before clipping, float32, 0-dim, on the first gradient's device.

    Gradients in float64, sparse ones, DTensors and other tensor subclasses go to torch's own function, which is right
    for sharded gradients, and returns a DTensor for them.

    Raises:
        ValueError: a negative max_norm.
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``.

    Example:
        >>> import torch
        >>> from singlepass.optim import clip_grad_norm_
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([p], 1.0), p.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    where = "clip_grad_norm_"
    number = isinstance(max_norm, Real) or (isinstance(max_norm, Tensor) and max_norm.numel() == 1)
    require(number and float(max_norm) >= 0.0, where, "max_norm >= 0", repr(max_norm), "Pass a number.")
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in params if p.grad is not None]
    if not grads or float(norm_type) != 2.0 or not all(map(_is_plain, grads)):
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = _norm(grads)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(message(where, "a finite norm of all gradients", norm.item(), "Skip this step."))
    scale = (float(max_norm) / (norm + _EPS)).clamp(max=1.0)
    for device, some in _by_device(grads).items():
        torch._foreach_mul_(some, scale.to(device, non_blocking=True))
    return norm


def _is_plain(grad: Tensor) -> bool:
    """Whether kernels take it."""
    subclass = type(grad).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return grad.layout == torch.strided and grad.dtype in _KERNEL_DTYPES and not subclass


def _by_device(grads: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        found.setdefault(grad.device, []).append(grad)
    return found


def _norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements, on the first gradient's device."""
    first = grads[0].device
    squares = [grad_squares(some).to(first, non_blocking=True) for some in _by_device(grads).values()]
    return torch.cat(squares).sum().sqrt().float()
