# SPDX-License-Identifier: Apache-2.0
"""Launches the kernels of sparse spectral training. Arguments and results are those of ``singlepass._ops.spectral``.

A step over any number of layers is one launch for each combination of dtypes and class of rows: three widths, longer
rows, and rows that are not aligned. The draw for all layers is one launch, and so is the swap of all vectors. The
compiled code depends on dtypes and on these classes. Launchers read nothing from the device, so a CUDA graph can
capture any of these calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._errors import require
from ..._ops import spectral as ops
from .._common import LAUNCH_OPTIONS, STORAGE
from .._launch import (
    Cache,
    address_of_lr,
    device_guard,
    identities,
    layouts,
    log_of,
    require_device,
    require_dtypes,
    require_lengths,
    require_scalar,
)
from .._table import Record, Table, laid_out_like, make_table, upload
from .exchange import DRAW_WIDTH, STORAGES, draw_kernel, swap_kernel
from .rows import (
    lorentz_backward_kernel,
    lorentz_kernel,
    scale_kernel,
    sum_numbers_kernel,
    sum_parts_kernel,
)
from .step import VECTOR, step_kernel

# Widths of the step's tiles, and their warps. A thread holds at most 16 elements of each tensor, and only 8 where
# tensors are not aligned, because every element then has its own pointer. Longer rows take several of the widest tiles.
ALIGNED_TILES, MISALIGNED_TILES = {1024: 4, 4096: 8, 8192: 16}, {1024: 4, 4096: 16}
DRAW_TILE = 2048  # places; logarithms in float64 take many registers
SWAP_GROUPS, SWAP_PROGRAMS = 8, 64  # groups of columns in a tile, most programs that share a pair
SCALE_BLOCK = 16, 64  # rows and columns
SCALE_PARTS, SCALE_TILES = 128, 32  # parts before one gets a second tile, most tiles of a part
LORENTZ_TILE, LORENTZ_WIDTHS = 1024, (32, 128, 512, 1024)
LORENTZ_PROGRAMS = 1024  # of the backward pass before one gets a second tile
SUM_BLOCK = 32, 32  # parts and columns
NUMBERS_BLOCK = 1024


class _Kind(NamedTuple):
    """What all tensors of one launch of the step have in common."""

    storages: tuple[str, ...]
    rows: bool
    is_long: bool
    is_aligned: bool
    tile: int
    warps: int


_buckets: Cache[list[tuple[_Kind, Table]]] = Cache()


def _make_buckets(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    ids: Sequence[int],
) -> list[tuple[_Kind, Table]]:
    """Checks what memory safety needs and builds the tables. Gradients are contiguous already."""
    op = "spectral_step_"
    device = require_device(op, [params, grads, *states, steps])
    records: dict[_Kind, list[Record]] = {}
    for i, p in enumerate(params):
        tensors = [p, grads[i], *(values[i] for values in states)]
        require_dtypes(op, tensors)
        contract = "contiguous matrices of vectors, or vectors of values"
        got = f"shape {tuple(p.shape)} and strides {p.stride()}"
        require(p.dim() in (1, 2) and p.is_contiguous(), op, contract, got, "Make them contiguous.")
        for s in tensors[2:]:
            fits = s.shape == p.shape and s.is_contiguous()
            got = f"shape {tuple(s.shape)} and strides {s.stride()} for a parameter of shape {tuple(p.shape)}"
            require(fits, op, "contiguous states of their parameters' shapes", got, "Use torch.empty_like.")
        require_scalar(op, "each step count", steps[i], device)
        is_aligned = p.shape[-1] % VECTOR.value == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)
        tiles = ALIGNED_TILES if is_aligned else MISALIGNED_TILES
        length = max(1, p.shape[-1]) if p.dim() == 2 else min(tiles)
        tile = min((tile for tile in tiles if length <= tile), default=max(tiles))
        kind = _Kind(
            storages=tuple(STORAGE[t.dtype] for t in tensors),
            rows=p.dim() == 2,
            is_long=length > tile,
            is_aligned=is_aligned,
            tile=tile,
            warps=tiles[tile],
        )
        addresses = tuple(t.data_ptr() for t in tensors)
        tensor_id = ids[i] if ids else 0
        record = Record(addresses, p.numel(), step=steps[i].data_ptr(), id=tensor_id, chunk_size=length)
        records.setdefault(kind, []).append(record)
    return [(kind, make_table(rows, device)) for kind, rows in records.items()]


@ops.step_.triton
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    project: bool = False,
    maximize: bool = False,
    seed: int | None = None,
    ids: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``spectral_step_`` in Triton. Take one step before capturing a graph, so that the kernels are compiled."""
    op = "spectral_step_"
    if not params:
        return
    states = [exp_avg, exp_avg_sq]
    ids = ids if seed is not None else ()  # which only random numbers need
    require_lengths(op, params, (grads, *states, steps, *([ids] if seed is not None else [])))
    device = params[0].device
    a_lr = address_of_lr(op, lr, device)
    a_grad_scale = require_scalar(op, "grad_scale", grad_scale, device)
    a_found_inf = require_scalar(op, "found_inf", found_inf, device)
    with device_guard(device):
        layout = layouts(params)
        if layouts(grads) != layout:
            grads = [laid_out_like(op, g, p) for g, p in zip(grads, params, strict=True)]
        buckets = _buckets.get(
            tuple(map(Tensor.data_ptr, grads)),
            (*map(identities, (params, grads, *states, steps)), layout, *map(layouts, states), tuple(ids)),
            device,
            lambda: _make_buckets(params, grads, states, steps, ids),
        )
        for kind, table in buckets:
            step_kernel[(table.chunk_count,)](
                *(table.records, table.chunks, table.tickets),
                *(beta1, beta2, eps, weight_decay, log_of(beta1), log_of(beta2)),
                *(0.0 if a_lr else lr.item(), -1.0 if maximize else 1.0, a_lr, a_grad_scale, a_found_inf, seed or 0),
                *(kind.storages, kind.rows, kind.is_long, project and kind.rows),
                *(seed is not None and kind.storages[0] == "bf16", kind.is_aligned, kind.tile),
                **LAUNCH_OPTIONS | {"num_warps": kind.warps},
            )


def _signed(word: int) -> int:
    """The int64 with the bits of a word, taken modulo 2^64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


@ops.sample.triton
def sample(
    s: Sequence[Tensor], *, ranks: Sequence[int], ids: Sequence[int], seed: int, draw: int, uniform: float
) -> list[Tensor]:
    """``spectral_sample`` in Triton, in one launch."""
    op = "spectral_sample"
    got = f"{len(ranks)} and {len(ids)}"
    require(len(ranks) == len(ids) == len(s), op, f"a rank and an id for each of {len(s)} layers", got, "Pass them.")
    require(0.0 <= uniform <= 1.0, op, "uniform in [0, 1]", uniform, "It is a share.")
    if not s:
        return []
    device = require_device(op, [s])
    require_dtypes(op, s)
    for values, rank in zip(s, ranks, strict=True):
        fits = values.dim() == 1 and 1 <= rank <= values.numel()
        contract, got = "s of one dimension and a rank from 1 to its size", f"{tuple(values.shape)} and {rank}"
        require(fits, op, contract, got, "Choose another rank.")
    s = [values.contiguous() for values in s]
    exchanges = [values.new_empty(rank, dtype=torch.int64) for values, rank in zip(s, ranks, strict=True)]
    words: list[int] = []
    scratch = 0
    for values, rank, stream, exchange in zip(s, ranks, ids, exchanges, strict=True):
        words += [values.data_ptr(), STORAGES[STORAGE[values.dtype]], values.numel(), rank]
        words += [_signed((draw << 32) + stream), exchange.data_ptr(), scratch]
        scratch += values.numel() + 2 * rank
    assert len(words) == DRAW_WIDTH.value * len(s)
    with device_guard(device):
        memory = torch.empty(scratch, dtype=torch.int64, device=device)
        draw_kernel[(len(s),)](
            *(upload(words, device), memory, seed, uniform, DRAW_TILE), **LAUNCH_OPTIONS | {"num_warps": 8}
        )
    return exchanges


def _swap_record(active: Tensor, frozen: Tensor, scales: Tensor, exchange: Tensor) -> list[int]:
    """Checks a pair and returns what the kernel reads of it."""
    op, columns = "spectral_swap_", active.shape[1] if active.dim() == 2 else 1
    fits = active.dim() in (1, 2) and active.dim() == frozen.dim() and active.shape[1:] == frozen.shape[1:]
    fits = fits and active.is_contiguous() and frozen.is_contiguous()
    got = f"{tuple(active.shape)} and {tuple(frozen.shape)}"
    require(fits, op, "contiguous active and frozen rows of equal length", got, "Make them contiguous.")
    fits = exchange.dtype == torch.int64 and exchange.shape == active.shape[:1] and exchange.is_contiguous()
    contract, got = f"exchange as {active.shape[0]} of int64", f"{tuple(exchange.shape)} of {exchange.dtype}"
    require(fits, op, contract, got, "Take it from spectral_sample.")
    is_coded = frozen.dtype == torch.int8
    require_dtypes(op, [active] if is_coded else [active, frozen])
    if is_coded:
        shape = frozen.shape[0], -(-columns // ops.BLOCK)
        fits = scales.dtype == torch.float32 and scales.shape == shape and scales.is_contiguous()
        contract, got = f"float32 scales of shape {shape}", f"{tuple(scales.shape)} of {scales.dtype}"
        require(fits, op, contract, got, "Make them with the codes.")
    return [
        *(active.data_ptr(), STORAGES[STORAGE[active.dtype]]),
        *(frozen.data_ptr(), STORAGES["int8" if is_coded else STORAGE[frozen.dtype]]),
        *(scales.data_ptr() if is_coded else 0, exchange.data_ptr(), active.shape[0], columns, frozen.shape[0]),
    ]


@ops.swap_.triton
def swap_(
    active: Sequence[Tensor], frozen: Sequence[Tensor], scales: Sequence[Tensor], exchange: Sequence[Tensor]
) -> None:
    """``spectral_swap_`` in Triton, in one launch."""
    op, count = "spectral_swap_", len(active)
    got = f"{len(frozen)}, {len(scales)} and {len(exchange)}"
    same = len(frozen) == len(scales) == len(exchange) == count
    require(same, op, f"lists of {count}", got, "Pass one of each for each pair.")
    if not active:
        return
    device = require_device(op, [active, frozen, scales, exchange])
    records = [_swap_record(*pair) for pair in zip(active, frozen, scales, exchange, strict=True)]
    # Where nothing is frozen, nothing is ever exchanged.
    words = [word for record, f in zip(records, frozen, strict=True) if len(f) for word in record]
    slots = max((len(a) for a, f in zip(active, frozen, strict=True) if len(f)), default=0)
    if slots == 0:
        return
    with device_guard(device):
        pairs = sum(len(f) > 0 for f in frozen)
        swap_kernel[(pairs, min(slots, SWAP_PROGRAMS))](upload(words, device), SWAP_GROUPS, **LAUNCH_OPTIONS)


def _vector_of(columns: int, *tensors: Tensor) -> int:
    """How many elements of a row one 16-byte access takes; 1 if rows are not aligned to 16 bytes."""
    vector = 16 // tensors[0].itemsize
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % vector == 0 for t in tensors)
    return vector if aligned and columns % vector == 0 else 1


@ops.scale_.triton
def scale_(q: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """``spectral_scale_`` in Triton: one launch for product and partial sums, another that adds these."""
    op = "spectral_scale_"
    device = require_device(op, [[q, t, s]])
    require_dtypes(op, [q, t, s])
    require(q.dim() == 2, op, "q of two dimensions", q.dim(), "Flatten the tokens.")
    rows, columns = q.shape
    require(s.shape == (columns,), op, f"s of shape ({columns},)", tuple(s.shape), "Check k.")
    require(t.shape == q.shape and t.dtype == q.dtype, op, "t of q's shape and dtype", tuple(t.shape), "Convert it.")
    dense = all(x.stride(1) == 1 for x in (q, t)) or columns <= 1
    require(dense, op, "rows of contiguous elements", (q.stride(), t.stride()), "Make them contiguous.")
    if q.numel() == 0:
        return q.new_zeros(columns, dtype=torch.float32)
    s = s.contiguous()
    row_tiles, column_tiles = -(-rows // SCALE_BLOCK[0]), -(-columns // SCALE_BLOCK[1])
    # The order of sums depends on the number of rows alone.
    tiles = max(1, min(SCALE_TILES, row_tiles // SCALE_PARTS))
    parts = -(-row_tiles // tiles)
    sums = q.new_empty(columns, dtype=torch.float32)
    with device_guard(device):
        partials = torch.empty(parts * columns, dtype=torch.float32, device=device)
        scale_kernel[(parts * column_tiles,)](
            *(q.data_ptr(), t.data_ptr(), s.data_ptr(), partials),
            *(rows, columns, q.stride(0), t.stride(0), column_tiles, tiles),
            *(STORAGE[q.dtype], STORAGE[s.dtype], _vector_of(columns, q, t), *SCALE_BLOCK),
            **LAUNCH_OPTIONS,
        )
        sum_parts_kernel[(-(-columns // SUM_BLOCK[1]),)](
            *(partials, sums, parts, columns, *SUM_BLOCK), **LAUNCH_OPTIONS
        )
    return sums


def _as_rows(t: Tensor) -> Tensor:
    """Views a tensor as (rows, columns) with contiguous columns, or copies it if strides do not allow that."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_lorentz(op: str, z: Tensor, log_scale: Tensor) -> torch.device:
    device = require_device(op, [[z, log_scale]])
    require_dtypes(op, [z, log_scale])
    contract = "rows of at least two elements"
    require(z.dim() > 0 and z.shape[-1] >= 2, op, contract, tuple(z.shape), "The first is the time.")
    require(log_scale.numel() == 1, op, "log_scale as one element", tuple(log_scale.shape), "Reshape it.")
    return device


def _lorentz_constants(z: Tensor, log_scale: Tensor, *others: Tensor) -> tuple[str, str, int, bool, int, int]:
    columns = z.shape[1]
    width = next((w for w in LORENTZ_WIDTHS if columns <= w), LORENTZ_WIDTHS[-1])
    vector, is_long = _vector_of(columns, z, *others), columns > width
    return STORAGE[z.dtype], STORAGE[log_scale.dtype], vector, is_long, LORENTZ_TILE // width, width


@ops.lorentz.triton
def lorentz(z: Tensor, log_scale: Tensor, *, k: float, offset: float) -> Tensor:
    """``lorentz`` in Triton."""
    device = _check_lorentz("lorentz", z, log_scale)
    out = z.new_empty(z.shape)
    if z.numel() == 0:
        return out
    z = _as_rows(z)
    constants = _lorentz_constants(z, log_scale, out.view(z.shape))
    with device_guard(device):
        lorentz_kernel[(-(-z.shape[0] // constants[4]),)](
            *(z.data_ptr(), log_scale.data_ptr(), out.data_ptr(), *z.shape, z.stride(0), k, offset, *constants),
            **LAUNCH_OPTIONS,
        )
    return out


@ops.lorentz_backward.triton
def lorentz_backward(grad: Tensor, z: Tensor, log_scale: Tensor, *, k: float, offset: float) -> tuple[Tensor, Tensor]:
    """``lorentz_backward`` in Triton: one launch for gradients and partial sums, another that adds these."""
    op = "lorentz_backward"
    device = _check_lorentz(op, z, log_scale)
    same = grad.shape == z.shape and grad.dtype == z.dtype and grad.device == z.device
    contract, got = f"grad of z's shape {tuple(z.shape)}, dtype and device", f"{tuple(grad.shape)} of {grad.dtype}"
    require(same, op, contract, got, "Convert it.")
    grad_z, grad_scale = z.new_empty(z.shape), log_scale.new_zeros(log_scale.shape)
    if z.numel() == 0:
        return grad_z, grad_scale
    z, grad = _as_rows(z), _as_rows(grad)
    constants = _lorentz_constants(z, log_scale, grad, grad_z.view(z.shape))
    count = -(-z.shape[0] // constants[4])
    tiles = max(1, count // LORENTZ_PROGRAMS)
    programs = -(-count // tiles)
    with device_guard(device):
        partials = torch.empty(programs, dtype=torch.float64, device=device)
        lorentz_backward_kernel[(programs,)](
            *(grad.data_ptr(), grad.stride(0), partials, tiles),
            *(z.data_ptr(), log_scale.data_ptr(), grad_z.data_ptr(), *z.shape, z.stride(0), k, offset, *constants),
            **LAUNCH_OPTIONS,
        )
        sum_numbers_kernel[(1,)](
            *(partials, grad_scale.data_ptr(), programs, STORAGE[log_scale.dtype], NUMBERS_BLOCK), **LAUNCH_OPTIONS
        )
    return grad_z, grad_scale
