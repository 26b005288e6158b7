# SPDX-License-Identifier: Apache-2.0
"""Functions: the product with W = U^T diag(s) V, and HyboNet's map to the hyperboloid."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd import gradients, must_be_plain
from .._errors import require
from .._ops import requested
from .._ops import spectral as ops
from ._frozen import factors_shape
from ._product import Sizes, SSTProduct, evaluation_of, plain_product

GRADIENTS = ("enhanced", "default")
EVALUATIONS = ("auto", "factored", "materialized")


def _check_factors(x: Tensor, u: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], s: Tensor) -> None:
    op = "sst_linear"
    shapes = f"u {[tuple(t.shape) for t in u]}, v {[tuple(t.shape) for t in v]}, s {tuple(s.shape)}"
    fits = s.dim() == 1 and all(t.dim() == 2 for t in (*u, *v)) and len(u[0]) == len(v[0]) and len(u[1]) == len(v[1])
    fits = (
        fits and len(u[0]) + len(u[1]) == len(s) and u[0].shape[1] == u[1].shape[1] and v[0].shape[1] == v[1].shape[1]
    )
    contract = "active and frozen rows of u and v, as many of each, and a singular value for every pair"
    require(fits, op, contract, shapes, "See the docstring for the shapes.")
    contract = f"x of shape (..., {v[0].shape[1]})"
    require(x.dim() >= 1 and x.shape[-1] == v[0].shape[1], op, contract, tuple(x.shape), "Check in_features.")
    devices = {t.device for t in (x, *u, *v, s)}
    require(len(devices) == 1, op, "tensors of one device", sorted(map(str, devices)), "Move them to x's.")


def _check_codes(frozen: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor] | None) -> None:
    """Codes without their scales would be taken for rows."""
    for rows, factors in zip(frozen, (None, None) if scales is None else scales, strict=True):
        wanted = factors_shape(rows.shape[0], rows.shape[1], rows.dtype)
        got = (0,) if factors is None else tuple(factors.shape)
        contract, remedy = f"scales of shape {wanted} for frozen rows of {rows.dtype}", "int8 codes alone have scales."
        require(got == wanted, "sst_linear", contract, got, remedy)


def sst_linear(
    x: Tensor,
    active_u: Tensor,
    active_v: Tensor,
    singular_values: Tensor,
    frozen_u: Tensor,
    frozen_v: Tensor,
    bias: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    gradient: str = "enhanced",
    evaluation: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """x W^T + b for W = U^T diag(s) V, whose first r singular vectors are trained, with the gradients of SST.

    After Zhao et al., "Sparse Spectral Training", arXiv 2405.15481. With G = dL/dW, the gradient of s_i is
    u_i G v_i^T for every i; those of active rows u_i and v_i are v_i G^T and u_i G ("enhanced"), or s_i times that
    ("default"). They are computed from t = x V^T and q = g U^T or, if W is materialised, from panels of g^T x: G as a
    whole never exists.

    Args:
        x: (..., n), any strides.
        active_u: (r, m), the trained left singular vectors as rows.
        active_v: (r, n), the right ones.
        singular_values: (k,), those of the active vectors first.
        frozen_u: (k - r, m), the other left singular vectors; int8 with ``scales``.
        frozen_v: (k - r, n).
        bias: (m,).
        scales: of int8 frozen vectors, (k - r, ceil(m / 128)) and (k - r, ceil(n / 128)), float32.
        gradient: "enhanced", the paper's choice, or "default".
        evaluation: "factored" multiplies by V, s and U in turn; "materialized" computes W first and keeps it for
            backward; "auto" picks the one with fewer floating-point operations.
        backend: for everything but the matrix products: "native", "triton" or "eager"; None selects one.

    Matrix products use x's dtype (float32, bfloat16, float16 or float64), or autocast's. Singular values and the sums
    for their gradients keep their dtype, at least float32. Second derivatives need ``backend="eager"``.

    Returns:
        Tensor: (..., m), contiguous, of the products' dtype.

    Raises:
        ValueError: invalid shapes, devices or options.
        RuntimeError: the chosen backend cannot run here.

    Example:
        >>> import torch
        >>> from singlepass.spectral import sst_linear
        >>> u, s, v = torch.eye(3, 4), torch.tensor([3.0, 2.0, 1.0]), torch.eye(3)
        >>> sst_linear(torch.ones(1, 3), u[:1], v[:1], s, u[1:], v[1:])
        tensor([[3., 2., 1., 0.]])
    """
    op = "sst_linear"
    require(gradient in GRADIENTS, op, f"gradient among {', '.join(GRADIENTS)}", repr(gradient), "Choose one of them.")
    contract = f"evaluation among {', '.join(EVALUATIONS)}"
    require(evaluation in EVALUATIONS, op, contract, repr(evaluation), "Choose one of them.")
    _check_factors(x, (active_u, frozen_u), (active_v, frozen_v), singular_values)
    _check_codes((frozen_u, frozen_v), scales)
    if bias is not None:
        got, outputs = tuple(bias.shape), active_u.shape[1]
        require(got == (outputs,), op, f"bias of shape ({outputs},)", got, "Check out_features.")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != active_u.dtype:
        require(False, op, f"x of {active_u.dtype}, as the vectors", x.dtype, "Convert it, or use torch.autocast.")
    scales_u, scales_v = (None, None) if scales is None else scales
    inputs = (x, active_u, active_v, singular_values)
    frozen = (frozen_u, frozen_v, scales_u, scales_v)
    if must_be_plain(op, requested(backend), *inputs, bias):
        return plain_product(*inputs, bias, frozen, gradient)
    if evaluation == "auto":
        training = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        tokens = x.numel() // max(x.shape[-1], 1)
        sizes = Sizes(tokens, active_u.shape[1], x.shape[-1], len(singular_values), len(active_u))
        evaluation = evaluation_of(sizes, training)
    dtypes = {x.dtype, singular_values.dtype}
    backend = ops.scale_.choose(x.device.type, dtypes, backend)
    return SSTProduct.apply(*inputs, bias, *frozen, gradient, evaluation, backend)


class _Lorentz(torch.autograd.Function):
    """Saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_scale: Tensor, k: float, offset: float, backend: str) -> Tensor:
        ctx.save_for_backward(z, log_scale)
        ctx.options, ctx.backend = {"k": k, "offset": offset}, backend
        return ops.lorentz.on(backend)(z, log_scale, **ctx.options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        run = partial(ops.lorentz_backward.on(ctx.backend), grad.contiguous(), *inputs, **ctx.options)
        plain = partial(ops.lorentz.on("eager"), **ctx.options)
        return *gradients("lorentz", ctx.backend, run, plain, grad, *inputs), None, None, None


def lorentz(z: Tensor, log_scale: Tensor, *, k: float = 1.0, offset: float = 1.1, backend: str | None = None) -> Tensor:
    """HyboNet's map from rows to points x of the hyperboloid -x_0^2 + x_1^2 + ... = -k, in one pass.

    ``x_0 = sigmoid(z_0) exp(log_scale) + offset``, and ``x_i = z_i sqrt((x_0^2 - k) / |z_1..|^2)``, as LorentzLinear of
    Chen et al., "Fully Hyperbolic Neural Networks", arXiv 2105.14686. ``|z_1..|^2`` is at least 1e-8.

    Args:
        z: (..., c), c >= 2; float32, bfloat16, float16 or float64 (eager only).
        log_scale: one element, any of these dtypes.
        k: minus the squared Lorentz norm of points, positive.
        offset: minimum of the time coordinate x_0, at least sqrt(k).
        backend: "native", "triton" or "eager"; None selects one.

    Returns:
        Tensor: z's shape and dtype, contiguous.

    Raises:
        ValueError: invalid shapes, dtypes or options.

    Example:
        >>> import torch
        >>> from singlepass.spectral import lorentz
        >>> x = lorentz(torch.tensor([[0.0, 3.0, 4.0]]), torch.zeros(()))
        >>> x[:, 0].item(), round((x[:, 1:].square().sum() - x[:, 0] ** 2).item(), 4)
        (1.600000023841858, -1.0)
    """
    require(z.dim() >= 1 and z.shape[-1] >= 2, "lorentz", "z of shape (..., 2 or more)", tuple(z.shape), "Widen it.")
    require(z.is_floating_point(), "lorentz", "a floating-point z", z.dtype, "Convert it.")
    tensor = isinstance(log_scale, Tensor)
    require(tensor, "lorentz", "log_scale as a tensor", type(log_scale).__name__, "Use torch.tensor.")
    fits = log_scale.numel() == 1 and log_scale.device == z.device and log_scale.is_floating_point()
    got = f"{tuple(log_scale.shape)} of {log_scale.dtype} on {log_scale.device}"
    require(fits, "lorentz", f"log_scale as one number on {z.device}", got, "Reshape or move it.")
    require(k > 0.0 and offset >= k**0.5, "lorentz", "k > 0 and offset >= sqrt(k)", (k, offset), "Raise the offset.")
    if must_be_plain("lorentz", requested(backend), z, log_scale):
        return ops.lorentz.on("eager")(z, log_scale, k=float(k), offset=float(offset))
    chosen = ops.lorentz.choose(z.device.type, {z.dtype, log_scale.dtype}, backend)
    return _Lorentz.apply(z.contiguous(), log_scale, float(k), float(offset), chosen)
