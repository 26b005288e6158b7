# SPDX-License-Identifier: Apache-2.0
"""What functions and layers ask of tensors and numbers that they are given."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .._autograd import TANGENT, has_tangent, in_forward_mode
from .._errors import message, require
from .._ops import kv as ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tokens(op: str, name: str, x: Tensor) -> None:
    """Raises unless x can be tokens of a cache."""
    require(isinstance(x, Tensor), op, f"a tensor {name}", type(x).__name__, "Convert it.")
    require(x.dim() == 4, op, f"{name} (batch, heads, tokens, channels)", tuple(x.shape), "Reshape it.")
    require(x.dtype in FLOATS, op, f"a floating-point {name}", x.dtype, "Convert it.")
    head_dim = x.shape[3]
    contract = f"{name} of 16, 32, ..., {ops.MAX_HEAD_DIM} channels"
    require(head_dim % 16 == 0 and 0 < head_dim <= ops.MAX_HEAD_DIM, op, contract, head_dim, "Pad channels with zeros.")


def check_bits(op: str, name: str, bits: int) -> None:
    require(isinstance(bits, int) and bits in ops.BITS, op, f"{name} 2, 4 or 8", repr(bits), "Choose one of them.")


def check_queries(op: str, q: Tensor, k: Tensor) -> None:
    """Raises unless queries q go with keys k, which were checked."""
    if isinstance(q, Tensor) and q.dim() == 4 and q.dtype in FLOATS and q.device == k.device and _go_with(q, k):
        return
    check_tokens(op, "q", q)
    contract = f"q of batch {k.shape[0]}, a multiple of {k.shape[1]} heads and {k.shape[3]} channels, as the keys"
    remedy = "Pass (batch, query heads, tokens, channels)."
    require(_go_with(q, k), op, contract, tuple(q.shape), remedy)
    require(q.device == k.device, op, f"q on {k.device}, as the keys", q.device, "Move it there.")


def _go_with(q: Tensor, k: Tensor) -> bool:
    (batch, query_heads, _, head_dim), (its, heads, _, channels) = q.shape, k.shape
    return batch == its and head_dim == channels and 0 < heads <= query_heads and query_heads % heads == 0


def check_needs_no_gradient(op: str, **tensors: Tensor) -> None:
    """Raises if a derivative is wanted of a tensor, which compressed tokens can't give."""
    if not torch.is_grad_enabled() and not in_forward_mode():
        return
    for name, x in tensors.items():
        wanted = x.requires_grad and torch.is_grad_enabled()
        if wanted or has_tangent(x):
            got = "requires_grad=True" if wanted else TANGENT
            remedy = "Call it under torch.no_grad()." if wanted else "Call it outside of forward mode."
            raise ValueError(message(op, f"{name} that needs no gradient", got, remedy))


def check_logits(op: str, scale: float | None, softcap: float) -> None:
    """Raises unless they can scale logits and cap them."""
    fits = scale is None or (isinstance(scale, Real) and math.isfinite(scale))
    require(fits, op, "scale as a number, or None", repr(scale), "None: channels^-0.5.")
    fits = isinstance(softcap, Real) and math.isfinite(softcap) and softcap >= 0
    require(fits, op, "softcap >= 0", repr(softcap), "0 leaves logits as they are.")


def check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """They themselves, contiguous as kernels take them. Raises unless they are None, or logits of attention sinks for
    the heads of q."""
    if sinks is None:
        return None
    check_exact(op, "sinks", sinks, torch.float32, (q.shape[1],), q)
    check_needs_no_gradient(op, sinks=sinks)
    return sinks.contiguous()


def dense(t: Tensor | None) -> Tensor | None:
    """t, or a contiguous copy of it; None if it is."""
    return None if t is None else t.contiguous()


def check_exact(op: str, name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises unless t is None or a tensor of that dtype and shape where ``like`` is."""
    if t is not None and not isinstance(t, Tensor):
        raise ValueError(message(op, f"a tensor {name}", type(t).__name__, "Convert it."))
    if t is None or (t.shape == shape and t.dtype == dtype and t.device == like.device):
        return
    contract = f"{str(dtype).removeprefix('torch.')} {name} of shape {shape} on {like.device}"
    got = f"{tuple(t.shape)} of {t.dtype} on {t.device}"
    raise ValueError(message(op, contract, got, "Convert or reshape it."))
