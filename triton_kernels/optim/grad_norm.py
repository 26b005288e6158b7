# SPDX-License-Identifier: Apache-2.0
"""The norm, divisor and non-finite flag of all gradients, from a single read of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._errors import require
from ..._ops import optim as ops
from .._common import (
    LAUNCH_OPTIONS,
    STORAGE,
    double,
    is_last_program,
    load,
    load_scalar,
    square,
    sum_partials,
    tile_pointers,
)
from .._launch import Cache, device_guard, identities, layouts, require_device, require_dtypes, require_scalar
from .._table import BLOCK, IS_ALIGNED, NUMEL, PARAM, WIDTH, Record, Table, is_dense, make_table


@triton.jit
def square_tile(address, start, end, squares, STORAGE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the squares of elements [start, start + BLOCK): a full tile as aligned vectors, any other with a mask."""
    mask = None if FULL else start + tl.arange(0, BLOCK) < end
    return squares + square(load(tile_pointers(address, start, STORAGE, FULL, BLOCK), mask, STORAGE), mask)


@triton.jit(
    do_not_specialize=["p_records", "p_chunks", "p_tickets", "p_partials", "p_result", "first", "total", "a_grad_scale"]
)
def grad_norm_kernel(
    p_records,
    p_chunks,
    p_tickets,
    p_partials,
    p_result,
    first: tl.int64,
    total: tl.int64,
    max_norm: tl.float64,
    eps: tl.float64,
    a_grad_scale: tl.int64,
    STORAGE: tl.constexpr,
    SUM_ALONE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program sums the squares of one chunk; the last of all ``total`` programs computes the result.

    A launch serves the chunks of one storage type, from ``first`` on. The result is the sum, a float64, or, as float32,
    [norm, divisor, non-finite flag].
    """
    i_program = first + tl.program_id(0)
    chunk = tl.load(p_chunks + i_program)
    p_record = p_records + (chunk >> 32) * WIDTH
    address = tl.load(p_record + PARAM)
    begin = (chunk & 0xFFFFFFFF) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(p_record + NUMEL))
    # Full tiles up to full_end as aligned vectors, the rest with a mask.
    full_end = begin
    if tl.load(p_record + IS_ALIGNED) != 0:
        full_end = end - (end - begin) % BLOCK
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, full_end, BLOCK):
        squares = square_tile(address, start, end, squares, STORAGE, True, BLOCK)
    for start in range(full_end, end, BLOCK):
        squares = square_tile(address, start, end, squares, STORAGE, False, BLOCK)
    tl.store(p_partials + i_program * 2, tl.sum(squares))

    # The ticket counts the programs of all launches. Gradients are to be divided by loss scale / clip, if clip < 1.
    if is_last_program(p_tickets, total):
        squared = sum_partials(p_partials, total, BLOCK)
        if SUM_ALONE:
            tl.store(p_result, squared)
        else:
            scale = load_scalar(a_grad_scale.to(tl.int64), 1.0)
            norm = tl.sqrt(squared) / scale
            clip = tl.where(double(max_norm) > 0.0, max_norm / (norm + eps), 1.0)
            divisor = tl.where(clip >= 1.0, scale, scale / clip)
            tl.store(p_result, norm.to(tl.float32))
            tl.store(p_result + 1, divisor.to(tl.float32))
            tl.store(p_result + 2, tl.where(squared < float("inf"), 0.0, 1.0))


@dataclass(frozen=True)
class Plan:
    """A table with the gradients of each storage type next to each other, and the number of chunks of each type."""

    table: Table
    chunk_counts: dict[str, int]


_plans: Cache[Plan] = Cache()


def _make_plan(op: str, grads: Sequence[Tensor]) -> Plan:
    device = require_device(op, [grads])
    require_dtypes(op, grads)
    records: dict[str, list[Record]] = {}
    for g in grads:
        records.setdefault(STORAGE[g.dtype], []).append(Record((g.data_ptr(),), g.numel()))
    table = make_table([record for rows in records.values() for record in rows], device)
    return Plan(table, {storage: sum(r.chunk_count for r in rows) for storage, rows in records.items()})


def _launch(
    op: str,
    grads: Sequence[Tensor],
    dtype: torch.dtype,
    size: int,
    max_norm: float = 0.0,
    eps: float = 0.0,
    grad_scale: Tensor | None = None,
) -> Tensor:
    require(len(grads) > 0, op, "at least one gradient", "none", "Leave the call out where there are no gradients.")
    device = grads[0].device
    a_grad_scale = require_scalar(op, "grad_scale", grad_scale, device)
    with device_guard(device):
        # The norm does not depend on the order of elements.
        flat = [g if is_dense(g) else g.contiguous() for g in grads]
        content = identities(flat), layouts(flat)
        plan = _plans.get(content[0], content, device, lambda: _make_plan(op, flat))
        result = torch.empty(size, dtype=dtype, device=device)
        first = 0
        for storage, count in plan.chunk_counts.items():
            grad_norm_kernel[(count,)](
                plan.table.records,
                plan.table.chunks,
                plan.table.tickets,
                plan.table.partials,
                result,
                first,
                plan.table.chunk_count,
                max_norm,
                eps,
                a_grad_scale,
                storage,
                dtype == torch.float64,
                plan.table.chunk,
                BLOCK,
                **LAUNCH_OPTIONS,
            )
            first += count
    return result


@ops.grad_squares.triton
def grad_squares(grads: Sequence[Tensor]) -> Tensor:
    """``grad_squares`` in Triton, one launch for each dtype of the gradients."""
    return _launch("grad_squares", grads, torch.float64, 1)


@ops.grad_norm.triton
def grad_norm(
    grads: Sequence[Tensor], *, max_norm: float = 0.0, eps: float = 0.0, grad_scale: Tensor | None = None
) -> Tensor:
    """``grad_norm`` in Triton, one launch for each dtype of the gradients. Arguments and result as in
    ``singlepass._ops.optim``.
    """
    return _launch("grad_norm", grads, torch.float32, 3, max_norm, eps, grad_scale)
