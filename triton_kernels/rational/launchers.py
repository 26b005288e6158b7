# SPDX-License-Identifier: Apache-2.0
"""Launches the kernels of rational activations. Arguments and results are those of ``singlepass._ops.rational``.

A forward pass is one launch, a backward pass two. The compiled code depends on dtypes, form and degrees, on which
optional inputs are present, on the alignment of rows, and on which of five tiles fits the columns. Only a very small
batch can change the tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._errors import require
from ..._ops import rational as ops
from .._common import LAUNCH_OPTIONS, STORAGE
from .._launch import device_guard, require_device, require_dtypes
from .finish import finish_kernel
from .functions import C, D
from .geometry import Geometry, Layout, Order, Parts, View
from .kernels import backward_kernel, forward_kernel

MAX_COUNTS = ops.MAX_DEGREES[0] + 1, ops.MAX_DEGREES[1]  # coefficients of a and of b, which has one more in form C

# Elements of a tile, and the most in a vector. Backward keeps an accumulator per element and coefficient.
FORWARD_TILE, FORWARD_VECTOR = 1024, 8
BACKWARD_TILE, BACKWARD_VECTOR = 512, 4
# The most tiles of a program: enough to pay for its coefficients and sums. Small tensors get fewer, for more programs.
FORWARD_TILES, BACKWARD_TILES = 8, 16
PROGRAMS = 1024  # at least so many before a program gets a second tile
MOST_BACKWARD_PROGRAMS = 4096
FINISH_BLOCK = 256


@dataclass(frozen=True)
class Inputs:
    """The layouts of the tensors of a call, the allocated result included, and its options."""

    op: str
    x: Layout
    numerator: Layout
    denominator: Layout
    bias: Layout | None
    gate: Layout | None
    grad: Layout | None
    seed: Layout | None
    y: Layout
    form: int
    channel_dim: int
    dropout: float

    @property
    def groups(self) -> int:
        return max(self.numerator.shape[0], self.denominator.shape[0])

    @property
    def threshold(self) -> int:
        return ops.dropout_threshold(self.dropout)

    def check(self) -> None:
        """Checks what memory safety needs."""
        tensors: list[Any] = [self.x, self.numerator, self.denominator, self.bias, self.gate, self.grad]
        tensors = [t for t in tensors if t is not None]
        require_device(self.op, [tensors])
        require_dtypes(self.op, tensors)
        dims = len(self.x.shape)
        contract = f"channel_dim among x's {dims} dimensions"
        known = -dims <= self.channel_dim < dims
        require(known, self.op, contract, self.channel_dim, "Count from 0 or from -1.")
        require(0 <= self.form <= 3, self.op, "form 0 to 3", self.form, "Choose one.")
        require(0.0 <= self.dropout < 1.0, self.op, "0 <= dropout < 1", self.dropout, "Choose one.")
        self._check_tables()
        for role, t in (("gate", self.gate), ("grad", self.grad)):
            if t is not None:
                same = t.shape == self.x.shape and t.dtype == self.x.dtype
                contract = f"{role} of x's shape and dtype, {tuple(self.x.shape)} of {self.x.dtype}"
                require(same, self.op, contract, f"{tuple(t.shape)} of {t.dtype}", "Convert it.")
        if self.form == D.value or self.threshold > 0:
            seed = self.seed
            fits = seed is not None and seed.shape.numel() == 1 and seed.dtype == torch.int64
            fits = fits and seed is not None and seed.device == self.x.device
            contract = f"a seed of one int64 on {self.x.device} for form D and for dropout"
            got = "none" if seed is None else f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            require(fits, self.op, contract, got, "Pass torch.tensor([number]).")

    def _check_tables(self) -> None:
        a, b, channels = self.numerator, self.denominator, self.x.shape[self.channel_dim]
        contract = "numerator and denominator of two dimensions"
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        require(len(a.shape) == len(b.shape) == 2, self.op, contract, got, "Pass (groups, coefficients).")
        rows, groups = (a.shape[0], b.shape[0]), self.groups
        divided = groups > 0 and all(n in (1, groups) for n in rows) and channels % groups == 0
        contract = f"groups that divide the {channels} channels, and as many in both tables or one"
        require(divided, self.op, contract, f"{rows[0]} and {rows[1]}", "Change the groups.")
        constant = int(self.form == C.value)
        limits = (2, MAX_COUNTS[0]), (1 + constant, MAX_COUNTS[1] + constant)
        for role, t, (fewest, most) in zip(("numerator", "denominator"), (a, b), limits, strict=True):
            fits = t.is_contiguous and fewest <= t.shape[1] <= most
            contract = f"a contiguous {role} of {fewest} to {most} columns"
            remedy = "Call .contiguous(), or choose other degrees."
            require(fits, self.op, contract, f"shape {tuple(t.shape)}", remedy)
        if self.bias is not None:
            fits = self.bias.shape == (channels,) and self.bias.is_contiguous
            contract, remedy = f"a contiguous bias of {channels} numbers", "Call .contiguous(), or choose another."
            require(fits, self.op, contract, f"shape {tuple(self.bias.shape)}", remedy)


@dataclass(frozen=True)
class Plan:
    """All of a launch but addresses. ``copied``: which of x, gate and grad need a copy."""

    copied: tuple[bool, bool, bool]
    grid: tuple[int]
    grad_strides: tuple[int, int]
    scalars: tuple[float, ...]
    constants: tuple[Any, ...]
    partials: int
    finish_grid: tuple[int]
    finish: tuple[Any, ...]


@lru_cache(maxsize=4096)
def make_plan(inputs: Inputs, sizes: tuple[int, ...]) -> Plan | None:
    """Checks a call and divides its work. Returns None if there is no work."""
    inputs.check()
    x, y, gate, grad = inputs.x, inputs.y, inputs.gate, inputs.grad
    if x.shape.numel() == 0:
        return None
    tile, most_vector, tiles_each, enough_programs = sizes[:4]
    order = Order(y, inputs.channel_dim % len(x.shape))
    nothing = View(0, 0, 0, False)
    views = [nothing if t is None else order.view(t) for t in (x, gate, grad, y)]
    present = [v for v in views if v is not nothing]
    g = Geometry.of(order, inputs.groups, present, inputs.bias is not None)
    block = g.block(tile)
    parts = Parts.of(g, block, tiles_each, enough_programs, sizes[4] if grad else None)
    width = x.dtype.itemsize
    vector = math.gcd(g.columns, *g.strides(present), *(v.misaligned // width for v in present), 16 // width)
    threshold = inputs.threshold
    dropout = None
    if threshold > 0:
        dropout = "blocks" if math.gcd(g.columns, *g.strides(views[3:])) % 8 == 0 else "elements"
    a, b, bias = inputs.numerator, inputs.denominator, inputs.bias
    storages = STORAGE[a.dtype], STORAGE[b.dtype], None if bias is None else STORAGE[bias.dtype]
    counts = a.shape[1], b.shape[1]
    programs = g.groups * parts.count
    bias_blocks = 0 if bias is None else -(-g.channels // FINISH_BLOCK)
    return Plan(
        copied=(views[0].is_copy, views[1].is_copy, views[2].is_copy),
        grid=(programs,),
        grad_strides=(views[2].outer, views[2].channel),
        scalars=(
            *(g.rows, g.columns, g.groups, g.group_size),
            *(stride for v in (views[0], views[1], views[3]) for stride in (v.outer, v.channel)),
            *(t.shape[1] if t.shape[0] > 1 else 0 for t in (a, b)),
            *(threshold, 65536.0 / (65536.0 - threshold)),
            *(parts.units, parts.tiles, parts.column_tiles, parts.unit_parts, parts.tile_parts),
        ),
        constants=(
            *(inputs.form, *counts, STORAGE[x.dtype], *storages),
            *(g.bias, dropout, gate is not None, min(vector, most_vector), *block),
        ),
        partials=sum(counts) * programs + (0 if bias is None else parts.tile_parts * g.channels),
        finish_grid=(a.shape.numel() + b.shape.numel() + bias_blocks,),
        finish=(
            *(g.groups, parts.count, a.shape[0], b.shape[0], g.channels, parts.tile_parts),
            *(inputs.form, *counts, *storages, g.bias, FINISH_BLOCK),
        ),
    )


def _address(t: Tensor | None, is_copy: bool, y: Tensor, kept: list[Tensor]) -> int:
    """The address of a tensor, or of its copy in the result's layout, which ``kept`` holds until the launch."""
    if t is None:
        return 0
    if is_copy:
        t = torch.empty_like(y).copy_(t)
        kept.append(t)
    return t.data_ptr()


@ops.rational.triton
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
    """``rational`` in Triton."""
    y = torch.empty_like(x)
    layouts = map(Layout.of, (x, numerator, denominator, bias, gate, None, seed, y))
    inputs = Inputs("rational", *layouts, form, channel_dim, dropout)  # type: ignore[arg-type, call-arg]
    plan = make_plan(inputs, (FORWARD_TILE, FORWARD_VECTOR, FORWARD_TILES, PROGRAMS))
    if plan is None:
        return y
    kept: list[Tensor] = []
    with device_guard(x.device):
        forward_kernel[plan.grid](
            _address(x, plan.copied[0], y, kept),
            _address(gate, plan.copied[1], y, kept),
            *(0 if t is None else t.data_ptr() for t in (y, numerator, denominator, bias, seed)),
            *plan.scalars,
            *plan.constants,
            **LAUNCH_OPTIONS,
        )
    return y


@ops.rational_backward.triton
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
    """``rational_backward`` in Triton: gradients and partial sums of a fixed division of the work, then their sums."""
    grad_x = torch.empty_like(x)
    layouts = map(Layout.of, (x, numerator, denominator, bias, gate, grad, seed, grad_x))
    inputs = Inputs("rational_backward", *layouts, form, channel_dim, dropout)  # type: ignore[arg-type, call-arg]
    sizes = BACKWARD_TILE, BACKWARD_VECTOR, BACKWARD_TILES, PROGRAMS, MOST_BACKWARD_PROGRAMS
    plan = make_plan(inputs, sizes)
    make = torch.zeros_like if plan is None else torch.empty_like
    tables = make(numerator), make(denominator), x.new_empty(0) if bias is None else make(bias)
    grad_gate = x.new_empty(0) if gate is None else torch.empty_like(x)
    if plan is not None:
        kept: list[Tensor] = []
        with device_guard(x.device):
            partials = torch.empty(plan.partials, dtype=torch.float32, device=x.device)
            backward_kernel[plan.grid](
                _address(grad, plan.copied[2], grad_x, kept),
                grad_gate.data_ptr(),
                partials,
                *plan.grad_strides,
                _address(x, plan.copied[0], grad_x, kept),
                _address(gate, plan.copied[1], grad_x, kept),
                *(0 if t is None else t.data_ptr() for t in (grad_x, numerator, denominator, bias, seed)),
                *plan.scalars,
                *plan.constants,
                **LAUNCH_OPTIONS,
            )
            addresses = [t.data_ptr() for t in (*tables, denominator)]
            finish_kernel[plan.finish_grid](partials, *addresses, *plan.finish, **LAUNCH_OPTIONS)
    return grad_x, *tables, grad_gate
