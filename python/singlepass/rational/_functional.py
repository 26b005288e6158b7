# SPDX-License-Identifier: Apache-2.0
"""Fused differentiable functions: the building blocks of :mod:`singlepass.nn`."""

from __future__ import annotations

from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .._autograd import gradients, is_dtensor, must_be_plain
from .._errors import message, require
from .._ops import rational as ops
from .._ops import requested

__all__ = ["rational"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Rational(torch.autograd.Function):
    """Saves x and what the caller holds anyway; everything else is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        numerator: Tensor,
        denominator: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        seed: Tensor | None,
        form: int,
        channel_dim: int,
        dropout: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator, bias, gate, seed)
        ctx.options = {"form": form, "channel_dim": channel_dim, "dropout": dropout}
        ctx.backend = backend
        run = ops.rational.on(backend)
        return run(x, numerator, denominator, bias, gate, seed=seed, **ctx.options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, seed = ctx.saved_tensors
        run = partial(ops.rational_backward.on(ctx.backend), grad, *inputs, seed=seed, **ctx.options)
        plain = partial(ops.rational.on("eager"), seed=seed, **ctx.options)
        grads = gradients("rational", ctx.backend, run, plain, grad, *inputs)
        wanted = (g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:5], strict=True))
        return (*wanted, None, None, None, None, None)


def _check_types(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            got = value.layout if isinstance(value, Tensor) else type(value).__name__
            remedy = "Convert it; a nested tensor has values()."
            raise ValueError(message("rational", f"{name} as a dense tensor", got, remedy))


def _check_table(name: str, table: Tensor, fewest: int, most: int, form: str, x: Tensor) -> None:
    if table.dim() != 2 or not fewest <= table.shape[1] <= most:
        contract = f"{name} of shape (groups, {fewest} to {most})" + (" for form C" if form == "C" else "")
        remedy = "Each row has one group's coefficients, the lowest first."
        raise ValueError(message("rational", contract, tuple(table.shape), remedy))
    if table.dtype not in _FLOATS:
        raise ValueError(message("rational", f"a floating-point {name}", table.dtype, "Convert it."))
    if table.device != x.device:
        raise ValueError(message("rational", f"{name} on {x.device}, as x", table.device, "Move it there."))


def _check_coefficients(x: Tensor, numerator: Tensor, denominator: Tensor, form: str, channels: int) -> None:
    constant = int(form == "C")  # the denominator has one too
    _check_table("numerator", numerator, 2, ops.MAX_DEGREES[0] + 1, form, x)
    _check_table("denominator", denominator, 1 + constant, ops.MAX_DEGREES[1] + constant, form, x)
    few, many = sorted((numerator.shape[0], denominator.shape[0]))
    if few not in (1, many) or many == 0:
        contract = "as many groups in numerator and denominator, or 1 in one of them"
        raise ValueError(message("rational", contract, sorted({few, many}), "Repeat the rows of one."))
    if channels % many != 0:
        contract = f"a number of groups that divides x's {channels} channels"
        raise ValueError(message("rational", contract, many, "Choose another number, or another channel_dim."))


def _check_extras(x: Tensor, bias: Tensor | None, gate: Tensor | None, dropout: float, channels: int) -> None:
    op = "rational"
    if bias is not None:
        _check_types(bias=bias)
        shape = tuple(bias.shape)
        require(shape == (channels,), op, f"bias of shape ({channels},), one per channel", shape, "Reshape it.")
        require(bias.dtype in _FLOATS, op, "a floating-point bias", bias.dtype, "Convert it.")
        require(bias.device == x.device, op, f"bias on {x.device}, as x", bias.device, "Move it there.")
    if gate is not None:
        _check_types(gate=gate)
        got = f"{tuple(gate.shape)} of {gate.dtype} on {gate.device}"
        fits = gate.shape == x.shape and gate.dtype == x.dtype and gate.device == x.device
        require(fits, op, f"gate as x, {tuple(x.shape)} of {x.dtype} on {x.device}", got, "Convert or expand it.")
    if not isinstance(dropout, (float, Real)) or not 0.0 <= dropout < 1.0:
        raise ValueError(message(op, "0 <= dropout < 1", dropout, "It is the probability of becoming zero."))


def rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    form: str = "A",
    channel_dim: int = -1,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rational function P(x) / Q(x) with coefficients shared within groups of channels.

    ``P(x) = a_0 + a_1 x + ... + a_m x^m``, and with b the denominator's coefficients:

    * form ``"A"``: ``Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n``, as in KAT's kernels;
    * form ``"B"``: ``Q(x) = 1 + |b_1 x + ... + b_n x^n|``, eq. 12 of the KAT paper;
    * form ``"C"``: ``Q(x) = 0.1 + |b_0 + b_1 x + ... + b_n x^n|``;
    * form ``"D"``: B; in training every coefficient is multiplied, for every element, by noise from [0.9, 1.1).

    One pass over memory computes ``dropout(f(x + bias)) * gate``, a second one all gradients. Only the inputs are saved
    for backward. Arithmetic is float32 whatever the storage dtype; autocast has no effect. The derivative of ``|v|`` at
    zero is 1. Second derivatives need ``backend="eager"``, plain PyTorch. That also runs under transforms of
    ``torch.func``, in forward mode, for DTensors (without dropout and noise), in ``torch.jit.trace`` and in exports to
    ONNX, unless a kernel is asked for.

    Args:
        x: any shape and strides; float32, bfloat16, float16 or float64 (eager only).
        numerator: (Ga, m + 1), lowest degree first, m from 1 to 7; any of these dtypes.
        denominator: (Gb, n), n from 1 to 6; form C: (Gb, n + 1). Ga and Gb are the number of groups G, or one of them
            is 1. G divides the number of channels C; channel c belongs to group ``c // (C // G)``.
        form: "A", "B", "C" or "D".
        channel_dim: the channel dimension of x. Dense memory in any dimension order is read without a copy, and so are
            slices with equally spaced rows or planes, such as those of ``chunk``; other strides are copied.
        bias: (C,), added to x first; the same pass computes its gradient.
        gate: x's shape and dtype, multiplied last.
        dropout: probability p that an element of f is zeroed in training, rounded to a multiple of 2^-16; the others
            are scaled by 1 / (1 - p).
        training: whether dropout and form D's noise are applied.
        seed: of dropout and noise: an int, or an int64 tensor with one element on x's device. None draws one from
            torch's generator of that device. The same seed and memory order of x give the same random numbers.
        backend: "native", "triton" or "eager"; None selects one, see ``singlepass info``.

    Returns:
        Tensor: x's shape and dtype, and its strides if x is dense.

    Raises:
        ValueError: invalid shapes, dtypes, devices or options.
        RuntimeError: the chosen backend cannot run here; in backward, a second derivative of a kernel's gradient.

    Sources: Molina et al., "Padé Activation Units", arXiv 1907.06732, and the package rational-activations (forms);
    Yang and Wang, "Kolmogorov-Arnold Transformer", arXiv 2409.10594 (groups).

    Example:
        >>> import torch
        >>> from singlepass.functional import rational
        >>> x = torch.tensor([[-2.0, 1.0, 3.0, 4.0]])
        >>> a = torch.tensor([[0.0, 1.0]])  # P(x) = x for all channels
        >>> b = torch.tensor([[0.0], [1.0]])  # Q(x) = 1 for the first half of them, 1 + |x| for the second
        >>> rational(x, a, b)
        tensor([[-2.0000,  1.0000,  0.7500,  0.8000]])
    """
    op = "rational"
    if form not in (*ops.FORMS,):
        raise ValueError(message(op, "form A, B, C or D", repr(form), "Choose one of them."))
    _check_types(x=x, numerator=numerator, denominator=denominator)
    if x.dtype not in _FLOATS:
        raise ValueError(message(op, "a floating-point x", x.dtype, "Convert it."))
    if not isinstance(channel_dim, (int, Integral)) or not -x.dim() <= channel_dim < x.dim():
        contract = f"channel_dim among x's {x.dim()} dimensions"
        raise ValueError(message(op, contract, channel_dim, "Count from 0, or back from -1."))
    channels = x.shape[channel_dim]
    _check_coefficients(x, numerator, denominator, form, channels)
    _check_extras(x, bias, gate, dropout, channels)
    if not training:
        dropout, form = 0.0, "B" if form == "D" else form
    if form != "D" and dropout == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    elif isinstance(seed, int):
        require(abs(seed) < 2**63, op, "seed as one int64", seed, "Pass a smaller one.")
        seed = torch.tensor([seed], dtype=torch.int64, device=x.device)
    else:
        tensor = isinstance(seed, Tensor)
        got = f"{tuple(seed.shape)} of {seed.dtype} on {seed.device}" if tensor else repr(seed)
        fits = tensor and seed.numel() == 1 and seed.dtype == torch.int64 and seed.device == x.device
        require(fits, op, f"seed as one int64 on {x.device}", got, "Pass an int, or None.")
    tensors = [t for t in (x, numerator, denominator, bias, gate) if t is not None]
    plain = must_be_plain(op, requested(backend), *tensors)
    if plain and seed is not None and is_dtensor(x):
        got, remedy = f"dropout {dropout}, form {form}", "Use torch.nn.Dropout instead, and form B."
        raise ValueError(message(op, "neither dropout nor noise for DTensors in training", got, remedy))
    backend = "eager" if plain else ops.rational.choose(x.device.type, {t.dtype for t in tensors}, backend)
    numerator, denominator = numerator.contiguous(), denominator.contiguous()
    bias = None if bias is None else bias.contiguous()
    code = ops.FORMS.index(form)
    if not plain and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Rational.apply(x, numerator, denominator, bias, gate, seed, code, channel_dim, float(dropout), backend)
    run = ops.rational.on(backend)
    return run(
        x, numerator, denominator, bias, gate, form=code, channel_dim=channel_dim, dropout=float(dropout), seed=seed
    )
