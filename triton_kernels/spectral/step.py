# SPDX-License-Identifier: Apache-2.0
"""AdamW within a constraint: rows of unit length, a program to a row, or singular values that are not negative.

A row that fits a tile stays in registers between the update and its norm. A longer one is read twice, three times with
``project``, and updated anew each time: what is written depends on nothing that was rounded, and comes from the cache.
"""

import triton
import triton.language as tl

from .._common import (
    double,
    gradient_factor,
    is_last_program,
    learning_rate,
    load,
    load_scalar,
    square,
    store,
    tile_pointers,
)
from .._table import CHUNK_SIZE, NUMEL, PARAM, STEP, WIDTH
from ..optim.rules import adamw_coefficients, adamw_update

VECTOR = tl.constexpr(8)  # elements, 16 bytes at least, of which no aligned tensor has a part


@triton.jit
def tile_mask(start, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    left = end - start
    if ALIGNED:
        # A multiplication by VECTOR shows that no vector is cut.
        left = left // VECTOR * VECTOR
    return tl.arange(0, BLOCK) < left


@triton.jit
def load_tile(
    addresses, start, end, FIRST: tl.constexpr, LAST: tl.constexpr,
    STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements [start, end) of the tensors from FIRST to LAST: of parameter, gradient and two moments."""
    mask = tile_mask(start, end, ALIGNED, BLOCK)
    values = ()
    for k in tl.static_range(FIRST, LAST + 1):
        p_tile = tile_pointers(addresses[k], start, tl.constexpr(STORAGES[k]), ALIGNED, BLOCK)
        values = values + (load(p_tile, mask, tl.constexpr(STORAGES[k])),)
    return values


@triton.jit
def store_tile(
    addresses, start, end, p, s, STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    mask = tile_mask(start, end, ALIGNED, BLOCK)
    values = (p, p) + s
    for k in tl.static_range(4):
        if k != 1:
            p_tile = tile_pointers(addresses[k], start, tl.constexpr(STORAGES[k]), ALIGNED, BLOCK)
            store(p_tile, values[k], mask, tl.constexpr(STORAGES[k]))


@triton.jit
def products(g, p):
    return g.to(tl.float64) * p.to(tl.float64)


@triton.jit
def inverse_norm(squares):
    """What makes a row of this sum of squares a unit vector; a row of zeros stays, one with a NaN becomes NaN."""
    return tl.where(squares == 0.0, 1.0, 1.0 / tl.sqrt(squares)).to(tl.float32)


@triton.jit
def update_short_row(
    addresses, begin, end, c, factor,
    ROWS: tl.constexpr, PROJECT: tl.constexpr, STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row, or a stretch of singular values, in one tile."""
    p, g, m, v = load_tile(addresses, begin, end, 0, 3, STORAGES, ALIGNED, BLOCK)
    g = g * factor
    if ROWS and PROJECT:
        g = g - tl.sum(products(g, p)).to(tl.float32) * p
    p, s = adamw_update(c, p, g, (m, v))
    if ROWS:
        p = p * inverse_norm(tl.sum(square(p, tile_mask(begin, end, ALIGNED, BLOCK))))
    else:
        p = tl.where(p < 0.0, 0.0, p)  # NaN stays NaN
    store_tile(addresses, begin, end, p, s, STORAGES, ALIGNED, BLOCK)


@triton.jit
def updated_tile(
    addresses, start, end, c, factor, along,
    PROJECT: tl.constexpr, STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile after AdamW, with the part ``along`` the row taken from the gradient."""
    p, g, m, v = load_tile(addresses, start, end, 0, 3, STORAGES, ALIGNED, BLOCK)
    g = g * factor
    if PROJECT:
        g = g - along * p
    return adamw_update(c, p, g, (m, v))


@triton.jit
def update_long_row(
    addresses, begin, end, c, factor,
    PROJECT: tl.constexpr, STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of any length, tile by tile."""
    along = 0.0
    if PROJECT:
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            p, g = load_tile(addresses, start, end, 0, 1, STORAGES, ALIGNED, BLOCK)
            sums += products(g * factor, p)
        along = tl.sum(sums).to(tl.float32)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        p, s = updated_tile(addresses, start, end, c, factor, along, PROJECT, STORAGES, ALIGNED, BLOCK)
        squares += square(p, tile_mask(start, end, ALIGNED, BLOCK))
    inverse = inverse_norm(tl.sum(squares))
    for start in range(begin, end, BLOCK):
        p, s = updated_tile(addresses, start, end, c, factor, along, PROJECT, STORAGES, ALIGNED, BLOCK)
        store_tile(addresses, start, end, p * inverse, s, STORAGES, ALIGNED, BLOCK)


@triton.jit
def count_step(p_record, p_ticket):
    """Once all programs of a tensor have drawn their ticket. It reads again what need not stay in registers so long."""
    numel = tl.load(p_record + NUMEL)
    if is_last_program(p_ticket, tl.maximum(tl.cdiv(numel, tl.load(p_record + CHUNK_SIZE)), 1)):
        p_step = tl.load(p_record + STEP).to(tl.pointer_type(tl.float32))
        tl.store(p_step, tl.load(p_step) + 1.0)


POINTERS = ["p_records", "p_chunks", "p_tickets"]
HYPER = ["beta1", "beta2", "eps", "weight_decay", "log_beta1", "log_beta2"]
SCALARS = ["lr", "direction", "a_lr", "a_grad_scale", "a_found_inf"]


@triton.jit(do_not_specialize=POINTERS + HYPER + SCALARS)
def step_kernel(
    p_records,
    p_chunks,
    p_tickets,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    lr: tl.float64,
    direction: tl.float64,
    a_lr: tl.int64,
    a_grad_scale: tl.int64,
    a_found_inf: tl.int64,
    STORAGES: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    PROJECT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of all tensors of a table, whose chunks are rows (ROWS) or stretches of BLOCK singular values.

    Scalars as in ``optim.step_kernel``. The last program of a tensor counts its step.
    """
    if load_scalar(a_found_inf.to(tl.int64), 0.0) != 0.0:
        return

    chunk = tl.load(p_chunks + tl.program_id(0))
    i_tensor = chunk >> 32
    p_record = p_records + i_tensor * WIDTH
    numel = tl.load(p_record + NUMEL)
    size = tl.load(p_record + CHUNK_SIZE)
    addresses = ()
    for k in tl.static_range(4):
        addresses = addresses + (tl.load(p_record + PARAM + k),)

    finished = load_scalar(tl.load(p_record + STEP), 0.0)
    h = [tl.full((), x, tl.float64) for x in (beta1, beta2, eps, weight_decay, log_beta1, log_beta2)]
    c = adamw_coefficients(h, learning_rate(lr, a_lr), finished + 1.0, double(1.0), ())
    factor = gradient_factor(direction, a_grad_scale)

    begin = (chunk & 0xFFFFFFFF) * size
    end = tl.minimum(begin + size, numel)
    if LONG:
        update_long_row(addresses, begin, end, c, factor, PROJECT, STORAGES, ALIGNED, BLOCK)
    else:
        update_short_row(addresses, begin, end, c, factor, ROWS, PROJECT, STORAGES, ALIGNED, BLOCK)

    count_step(p_records + i_tensor * WIDTH, p_tickets + i_tensor)
