# SPDX-License-Identifier: Apache-2.0
"""What the package's autograd functions share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._errors import message, require

TANGENT = "a tangent of forward mode"
PLAIN = 'Pass backend="eager", plain PyTorch, for that.'


_CONTRACT = "plain tensors and reverse mode for kernels"
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _what_kernels_cannot(tensors: Iterable[Tensor | None]) -> str | None:
    """What goes on here that asks for PyTorch's own operators, if anything does."""
    compiling = torch.compiler.is_compiling()
    if compiling or torch.jit.is_tracing():
        if torch.onnx.is_in_onnx_export():
            return "an export to ONNX"
        return None if compiling else "torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    for t in tensors:
        if is_dtensor(t):
            return "a DTensor"
        if has_tangent(t):
            return TANGENT
    return None


@torch.compiler.assume_constant_result  # a graph that looked at the level would be compiled anew where it changes
def in_forward_mode() -> bool:
    """Whether tensors may have derivatives of forward mode."""
    return forward_ad._current_level >= 0


def has_tangent(t: Tensor | None) -> bool:
    """Whether a tensor has a derivative of forward mode, of which kernels know nothing: they would drop it."""
    return t is not None and in_forward_mode() and forward_ad.unpack_dual(t).tangent is not None


def is_dtensor(t: Tensor | None) -> bool:
    return t is not None and type(t) not in _PLAIN_TYPES and hasattr(t, "placements")


def must_be_plain(where: str, requested: str | None, *tensors: Tensor | None) -> bool:
    """Whether plain PyTorch has to run, without an autograd function around it: under the transforms of torch.func,
    in forward mode, for DTensors, and where operators are recorded by torch.jit.trace or for ONNX.

    Raises:
        RuntimeError: it has to, but a kernel was asked for.
        ValueError: some tensors are DTensors, and others are not.
    """
    what = _what_kernels_cannot(tensors)
    if what is None:
        return False
    if requested not in (None, "eager"):
        raise RuntimeError(message(where, _CONTRACT, what, PLAIN))
    whole = what != "a DTensor" or all(t is None or is_dtensor(t) for t in tensors)
    require(whole, where, "DTensors alone, or none", "some", "Distribute the module's parameters and its input alike.")
    return True


def _plain_gradients(
    function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)``, which is plain PyTorch; they can be differentiated again in grad mode."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Names of their own: an input that was made of another one counts as independent of it.
        named = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t in named if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(function(*named), wanted, grad, create_graph=create_graph))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in named)


class _OnlyOnce(torch.autograd.Function):
    """A gradient that depends on tensors in a way that nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, where: str, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.text = message(where, "to be differentiated once", "a gradient of its gradient", PLAIN)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.text)


def gradients(
    where: str,
    backend: str,
    run: Callable[[], Iterable[Tensor | None]],
    function: Callable[..., Tensor],
    grad: Tensor,
    *inputs: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of inputs in a backward pass, which ``run`` computes of ``grad``, that of ``function(*inputs)``.

    Where the pass has to leave a graph, with create_graph=True, the function is differentiated instead, as plain
    PyTorch computes it, if the backend is eager; and with any backend where the pass is for many gradients at a time,
    under vmap, with is_grads_batched=True. Gradients of kernels raise where they are differentiated: such that
    looked constant would make second derivatives silently wrong.

    Raises:
        RuntimeError: ``grad`` has a tangent of forward mode, and the backend is a kernel.
    """
    if backend != "eager" and has_tangent(grad):
        raise RuntimeError(message(where, _CONTRACT, TANGENT, PLAIN))
    if torch.compiler.is_compiling():
        return tuple(run())
    if torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad):
        return _plain_gradients(function, grad, *inputs)
    if not torch.is_grad_enabled():
        return tuple(run())
    if backend == "eager":
        return _plain_gradients(function, grad, *inputs)
    with torch.no_grad():
        grads = tuple(run())
    return tuple(None if g is None else _OnlyOnce.apply(where, g, grad, *inputs) for g in grads)
