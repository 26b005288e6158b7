# SPDX-License-Identifier: Apache-2.0
"""Inputs of rational functions in every layout, and the truth for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singlepass.functional import rational

from ..simt.bounded import Bounded
from ..tolerances import assert_within
from .truth import Problem, truth

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SEED = 987654321987


def _gaps(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


# Name -> (values of a shape in this layout, which dimension counts channels).
LAYOUTS: dict[str, tuple[Callable[[int], Tensor], int]] = {
    "rows": (lambda c: torch.randn(3, 5, c), -1),
    "planes": (lambda c: torch.randn(2, c, 3, 5), 1),
    "channels_last": (lambda c: torch.randn(2, c, 3, 5).to(memory_format=torch.channels_last), 1),
    "chunk": (lambda c: torch.randn(7, 2 * c).chunk(2, -1)[1], -1),
    "transposed": (lambda c: torch.randn(c, 11).t(), 1),
    "permuted": (lambda c: torch.randn(2, c, 3, 5).flatten(2).permute(0, 2, 1), -1),
    "cropped": (lambda c: torch.randn(2, c, 6, 4)[:, :, 1:5], 1),
    "gaps": (lambda c: _gaps((5, c)), -1),
    "expanded": (lambda c: torch.randn(1, c).expand(4, c), -1),
    "first": (lambda c: torch.randn(c, 4), 0),
    "vector": (lambda c: torch.randn(c), 0),
}


@dataclass(frozen=True)
class Place:
    """A backend on a device. ``simt``: native kernels are those of GPUs, run on the CPU (tests/conftest.py)."""

    backend: str
    device: str = "cpu"
    simt: bool = False


NATIVE = pytest.param(Place("native"), id="native-cpu")
SIMT = pytest.param(Place("native", simt=True), id="native-simt")
ON_GPU = [pytest.param(Place(name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ("native", "triton")]

each_kernel = pytest.mark.parametrize("place", [NATIVE, SIMT, *ON_GPU])
each_compiled = pytest.mark.parametrize("place", [NATIVE, *ON_GPU])  # in the package's own namespace


@dataclass(repr=False)
class Inputs:
    """Leaves of a call, its options, and a gradient for its result."""

    x: Tensor
    numerator: Tensor
    denominator: Tensor
    bias: Tensor | None
    gate: Tensor | None
    grad: Tensor
    form: str
    channel_dim: int
    dropout: float

    def __repr__(self) -> str:
        def layout(t: Tensor | None) -> str:
            return "none" if t is None else f"{tuple(t.shape)}:{t.stride()}+{t.storage_offset()}"

        tensors = (self.x, self.numerator, self.denominator, self.bias, self.gate, self.grad)
        options = (self.form, self.channel_dim, self.dropout, self.x.dtype)
        return f"Inputs({', '.join(map(layout, tensors))}, {', '.join(map(str, options))})"

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.numerator, self.denominator, self.bias, self.gate) if t is not None]

    def call(self, backend: str, **options: Any) -> Tensor:
        return rational(
            self.x,
            self.numerator,
            self.denominator,
            form=self.form,
            channel_dim=self.channel_dim,
            bias=self.bias,
            gate=self.gate,
            dropout=self.dropout,
            seed=SEED,
            backend=backend,
            **options,
        )

    def results(self, backend: str) -> list[Tensor]:
        """The result and the gradients of all leaves."""
        y = self.call(backend)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.grad)]

    def bounds(self) -> list[Bounded]:
        """What :meth:`results` should be, and how far float32 arithmetic may be off, in the results' shapes."""
        strides = torch.empty_like(self.x, device="meta").stride()
        sizes = [self.x.shape[d] for d in range(self.x.dim())]
        channel = self.channel_dim % self.x.dim()
        moving = [d for d in range(self.x.dim()) if sizes[d] != 1 or d == channel]
        order = sorted(moving, key=lambda d: -strides[d])
        if sizes[channel] == 1:
            order = [channel, *(d for d in order if d != channel)]
        order = [d for d in range(self.x.dim()) if d not in order] + order
        place = order.index(channel)
        ordered = [sizes[d] for d in order]
        canonical = (int(np.prod(ordered[:place])), sizes[channel], int(np.prod(ordered[place + 1 :])))

        def exact(t: Tensor | None) -> np.ndarray | None:
            return None if t is None else t.detach().double().cpu().permute(order).reshape(canonical).numpy()

        def small(t: Tensor | None) -> np.ndarray | None:
            return None if t is None else t.detach().double().cpu().numpy()

        threshold = int(self.dropout * 65536 + 0.5)
        found = truth(
            Problem(
                self.form,
                exact(self.x),
                small(self.numerator),
                small(self.denominator),
                small(self.bias),
                exact(self.gate),
                exact(self.grad),
                threshold,
                SEED,
            )
        )

        def back(bound: Bounded) -> Bounded:
            inverse = np.argsort(order)
            value, error = (
                v.reshape(ordered).transpose(inverse) for v in (bound.value, np.array(bound.error, np.float64))
            )
            return Bounded(value, error)

        like_x = [0, 4] if self.bias is not None else [0, 3]
        return [back(found.y), *(back(g) if i in like_x else g for i, g in enumerate(found.grads))]


def make(
    layout: str = "rows",
    form: str = "A",
    dtype: torch.dtype = torch.float32,
    *,
    channels: int = 24,
    rows: tuple[int, int] = (1, 8),
    degrees: tuple[int, int] = (5, 4),
    fused: bool = False,
    tables: torch.dtype = torch.float32,
    device: str = "cpu",
    requires_grad: bool = True,
) -> Inputs:
    torch.manual_seed(0)
    values, channel_dim = LAYOUTS[layout]

    def in_layout() -> Tensor:
        # Converting first keeps the layout's strides, gaps and all.
        generated = values(channels)
        base = torch.empty(0, dtype=dtype, device=device).set_(
            torch.zeros(generated.untyped_storage().nbytes() // 4, dtype=dtype, device=device).untyped_storage(),
            generated.storage_offset(),
            generated.size(),
            generated.stride(),
        )
        (base[0] if layout == "expanded" else base).copy_(generated[0] if layout == "expanded" else generated)
        return base

    x = in_layout()
    inputs = Inputs(
        x=x,
        numerator=torch.randn(rows[0], degrees[0] + 1).to(device, tables),
        denominator=torch.randn(rows[1], degrees[1] + (form == "C")).to(device, tables),
        bias=torch.randn(channels).to(device, tables) if fused else None,
        gate=in_layout() if fused else None,
        grad=torch.randn(x.shape).to(device, dtype),
        form=form,
        channel_dim=channel_dim,
        dropout=0.3 if fused else 0.0,
    )
    for leaf in inputs.leaves:
        leaf.requires_grad_(requires_grad)
    return inputs


def check(results: list[Tensor], bounds: list[Bounded], label: str = "") -> None:
    assert len(results) == len(bounds)
    for i, (result, bound) in enumerate(zip(results, bounds, strict=True)):
        stored = bound.stored(NAMES[result.dtype])
        expected, allowed = torch.from_numpy(stored.value.copy()), torch.from_numpy(stored.error.copy())
        # What is too large for the dtype comes out infinite, and counts as the largest number on either side.
        most = torch.finfo(result.dtype).max
        found, expected = result.detach().double().clamp(-most, most), expected.clamp(-most, most)
        assert_within(found, expected, allowed, f"{label} {'y' if i == 0 else f'gradient {i - 1}'}")


def spread(*shape: int) -> Tensor:
    """Within the tables' interval, all of it."""
    count = torch.Size(shape).numel()
    return torch.linspace(-3.0, 3.0, count)[torch.randperm(count)].view(shape)


def perturbed(module: nn.Module, scale: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module
