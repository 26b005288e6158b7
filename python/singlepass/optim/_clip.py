# SPDX-License-Identifier: Apache-2.0
"""Clipping by the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from .._errors import message, require
from ._buckets import is_wrapper
from ._checks import check_norm_group, check_spread
from ._exchange import Exchange, Layout, has_dtensors
from ._norm import Parts, moved, squares_of
from ._shards import check_placed_alike, check_placements, local

_WHERE = "clip_grad_norm_"
_EPS = 1e-6  # torch's


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``, with the norm of all gradients in one pass over them, sharded ones too.

    Gradients are multiplied in place by min(1, max_norm / (norm + 1e-6)). The norm is summed in float64 over all
    elements, whatever their dtypes, and is not rounded to 16 bits between tensors as torch's is. Nothing waits for a
    GPU, unless ``error_if_nonfinite``.

    DTensors (FSDP2, tensor parallelism) may stand beside plain tensors, and on several meshes. Each rank reads the
    parts that it holds, and one all-reduce of a few numbers for each dimension of a mesh makes the norm of all. Every
    rank takes part, with gradients or without; replicas count once. Of plain tensors that are spread over ranks nobody
    knows it: there ``norm_group`` says which ranks these are.

    Args:
        parameters: a tensor or tensors, whose gradients are clipped; those without a gradient are ignored. If some are
            sharded, the same ones on every rank.
        max_norm: not negative.
        norm_type: 2.0 runs the fused norm; torch's own function does other ones.
        error_if_nonfinite: whether a norm that is infinite or NaN is an error; nothing is changed then. Otherwise all
            gradients become NaN or 0, as by torch.
        foreach: as torch's; ignored where the norm is fused.
        norm_group: the ranks of this group hold different plain tensors, or different parts of them (partitions of
            DeepSpeed's ZeRO, FSDP1 with ``use_orig_params``): the norm is of the gradients of all. Each of them calls
            this, also without gradients or tensors of its own. What several of them hold alike would count several
            times. Not for DTensors, nor for other norms than 2.0.

    Returns:
        Tensor: the norm before clipping, 0-dim, float32, or float64 if a gradient is. It is on the first gradient's
        device or, if parameters are sharded, on theirs; with ``norm_group``, on the GPU if the group has a backend for
        GPUs alone (NCCL), else on the CPU. It is a plain tensor, equal on every rank, where torch returns a
        DTensor that is still to be added up by ``full_tensor()``.

    Sparse gradients, and tensor subclasses other than DTensor, go to torch's own function.

    Raises:
        ValueError: a negative max_norm, a ``Partial`` parameter, a ``norm_group`` that is none or beside DTensors or
            another norm, or, where ranks add up, a gradient that torch's own function would have to take. Nothing is
            changed.
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; a gradient that is not placed as its
            parameter, a ``Partial`` one for example; an exception on another rank. Nothing is changed. On a GPU the
            host does not wait to hear of other ranks: then the norm is NaN, and gradients stay as they are.

    Example:
        >>> import torch
        >>> from singlepass.optim import clip_grad_norm_
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([p], 1.0), p.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    check_norm_group(_WHERE, norm_group)
    layout = Layout(params, norm_group) if norm_group is not None or has_dtensors(params) else None
    grads = [p.grad if layout is None else local(p.grad) for p in params if p.grad is not None]
    is_fused = float(norm_type) == 2.0
    with Exchange(_WHERE, layout, [(1, True)] * (is_fused or norm_group is not None)) as exchange:
        number = isinstance(max_norm, Real) or (isinstance(max_norm, Tensor) and max_norm.numel() == 1)
        require(number and float(max_norm) >= 0.0, _WHERE, "max_norm >= 0", repr(max_norm), "Pass a number.")
        fits = is_fused or norm_group is None
        require(fits, _WHERE, "norm_type 2.0 with norm_group", norm_type, "Leave one of them out.")
        check_spread(_WHERE, norm_group, params)
        if not is_fused or (not exchange.rounds and not (grads and all(map(_is_plain, grads)))):
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
        if layout is not None:
            _check_shards(params)
        parts = _parts(params, exchange)
        squares = squares_of(parts, exchange)
        failed = exchange.add_up(squares, None) if exchange.rounds else None
    norm = squares.sum().sqrt()
    if all(g.dtype != torch.float64 for g in grads):
        norm = norm.float()
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(message(_WHERE, "a finite norm of all gradients", norm.item(), "Skip this step."))
    scale = (float(max_norm) / (norm + _EPS)).clamp(max=1.0)
    if failed is not None:  # on a GPU
        norm, scale = torch.where(failed > 0.0, math.nan, norm), torch.where(failed > 0.0, 1.0, scale)
    for some, _, _ in parts:
        torch._foreach_mul_(some, moved(scale, some[0].device))
    return norm


def _is_plain(grad: Tensor) -> bool:
    """Whether kernels or the reference take it."""
    return grad.layout == torch.strided and grad.dtype.is_floating_point and not is_wrapper(grad)


def _check_shards(params: list[Tensor]) -> None:
    """Checks parameters that are divided or spread over ranks, and their gradients."""
    for p in params:
        check_placements(_WHERE, p)
        grad = p.grad
        if grad is None:
            continue
        check_placed_alike(_WHERE, p, grad)
        part = local(grad)
        if not _is_plain(part):
            contract = "plain, dense, floating-point gradients for a norm over ranks"
            got = f"{type(part).__name__}, {part.layout}, {part.dtype}"
            raise ValueError(message(_WHERE, contract, got, "Clip them in another call."))


def _parts(params: list[Tensor], exchange: Exchange) -> Parts:
    """Gradients that one call takes: those on one device, of parameters that are divided over the same ranks."""
    parts: dict[tuple[torch.device, int], list[Tensor]] = {}
    for p, kind in zip(params, exchange.kinds(range(len(params))), strict=True):
        if p.grad is not None:
            parts.setdefault((p.grad.device, kind), []).append(local(p.grad))
    return [(some, None, kind) for (_, kind), some in parts.items()]
