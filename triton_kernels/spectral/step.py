# SPDX-License-Identifier: Apache-2.0
"""AdamW with a constraint: rows of unit length, one in each program, or singular values that are not negative.

A row that fits a tile stays in registers between the update and its norm. A longer row is read twice, or three times
with ``project``. Each pass computes the update again, because a stored one would be rounded. All passes but the first
read from the cache.
"""

import triton
import triton.language as tl

from .._common import (
    bfloat16_bits_stochastic,
    double,
    gradient_factor,
    is_last_program,
    learning_rate,
    load,
    load_scalar,
    random_halves,
    random_halves_anywhere,
    square,
    store,
    tile_pointers,
)
from .._table import CHUNK_SIZE, ID, NUMEL, PARAM, STEP, WIDTH
from ..optim.rules import adamw_coefficients, adamw_update

VECTOR = tl.constexpr(8)  # elements, at least 16 bytes; rows of aligned tensors are whole vectors


@triton.jit
def tile_mask(start, end, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The mask [BLOCK] of the elements of a tile that are before ``end``."""
    left = end - start
    if ALIGNED:
        # The multiplication by VECTOR proves to the compiler that the mask cuts no vector.
        left = left // VECTOR * VECTOR
    return tl.arange(0, BLOCK) < left


@triton.jit
def load_tile(
    addresses, start, end, FIRST: tl.constexpr, LAST: tl.constexpr,
    STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loads elements [start, end) of tensors FIRST to LAST out of parameter, gradient and two moments: [BLOCK] each."""
    mask = tile_mask(start, end, ALIGNED, BLOCK)
    values = ()
    for k in tl.static_range(FIRST, LAST + 1):
        p_tile = tile_pointers(addresses[k], start, tl.constexpr(STORAGES[k]), ALIGNED, BLOCK)
        values = values + (load(p_tile, mask, tl.constexpr(STORAGES[k])),)
    return values


@triton.jit
def store_tile(
    addresses, start, end, p, s, rounding,
    STOCHASTIC: tl.constexpr, STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores elements [start, end) of the parameter and of its states, but not of the gradient.

    With STOCHASTIC the parameter is bfloat16, rounded by random bits: ``rounding`` is their seed, and the counter's
    words that stand for the tensor and the step.
    """
    mask = tile_mask(start, end, ALIGNED, BLOCK)
    values = (p, p) + s
    for k in tl.static_range(4):
        if k != 1:
            p_tile = tile_pointers(addresses[k], start, tl.constexpr(STORAGES[k]), ALIGNED, BLOCK)
            if k == 0 and STOCHASTIC:
                seed, low, high = rounding
                if ALIGNED:
                    random = random_halves(seed, low, high, start, BLOCK)
                else:
                    random = random_halves_anywhere(seed, low, high, start, BLOCK)
                tl.store(p_tile, bfloat16_bits_stochastic(p, random), mask=mask)
            else:
                store(p_tile, values[k], mask, tl.constexpr(STORAGES[k]))


@triton.jit
def products(g, p):
    """Products in float64, in which those of float32 numbers are exact."""
    return g.to(tl.float64) * p.to(tl.float64)


@triton.jit
def inverse_norm(squares):
    """The factor that makes a row with this sum of squares a unit vector; 1 for zeros, NaN for a row with a NaN."""
    return tl.where(squares == 0.0, 1.0, 1.0 / tl.sqrt(squares)).to(tl.float32)


@triton.jit
def update_short_row(
    addresses, begin, end, c, factor, rounding,
    ROWS: tl.constexpr, PROJECT: tl.constexpr, STOCHASTIC: tl.constexpr,
    STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates a row, or a stretch of singular values, that fits one tile [BLOCK]."""
    # Load parameter, gradient and both moments, each [BLOCK] in float32.
    p, g, m, v = load_tile(addresses, begin, end, 0, 3, STORAGES, ALIGNED, BLOCK)
    g = g * factor
    # Remove the gradient's part along the row.
    if ROWS and PROJECT:
        g = g - tl.sum(products(g, p)).to(tl.float32) * p
    # Update, then apply the constraint before anything is rounded to storage.
    p, s = adamw_update(c, p, g, (m, v))
    if ROWS:
        p = p * inverse_norm(tl.sum(square(p, tile_mask(begin, end, ALIGNED, BLOCK))))
    else:
        p = tl.where(p < 0.0, 0.0, p)  # NaN stays NaN
    store_tile(addresses, begin, end, p, s, rounding, STOCHASTIC, STORAGES, ALIGNED, BLOCK)


@triton.jit
def updated_tile(
    addresses, start, end, c, factor, along,
    PROJECT: tl.constexpr, STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes AdamW on a tile [BLOCK], after removing the part ``along`` the row from the gradient."""
    p, g, m, v = load_tile(addresses, start, end, 0, 3, STORAGES, ALIGNED, BLOCK)
    g = g * factor
    if PROJECT:
        g = g - along * p
    return adamw_update(c, p, g, (m, v))


@triton.jit
def update_long_row(
    addresses, begin, end, c, factor, rounding,
    PROJECT: tl.constexpr, STOCHASTIC: tl.constexpr,
    STORAGES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates a row of any length, tile by tile, in two or three passes."""
    # First pass, with PROJECT only: the dot product of gradient and row. Partial sums are [BLOCK] in float64.
    along = 0.0
    if PROJECT:
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            p, g = load_tile(addresses, start, end, 0, 1, STORAGES, ALIGNED, BLOCK)
            sums += products(g * factor, p)
        along = tl.sum(sums).to(tl.float32)
    # Second pass: the norm of the updated row, of which nothing is stored yet.
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        p, s = updated_tile(addresses, start, end, c, factor, along, PROJECT, STORAGES, ALIGNED, BLOCK)
        squares += square(p, tile_mask(start, end, ALIGNED, BLOCK))
    # Third pass: the same update again, this time normalised and stored.
    inverse = inverse_norm(tl.sum(squares))
    for start in range(begin, end, BLOCK):
        p, s = updated_tile(addresses, start, end, c, factor, along, PROJECT, STORAGES, ALIGNED, BLOCK)
        store_tile(addresses, start, end, p * inverse, s, rounding, STOCHASTIC, STORAGES, ALIGNED, BLOCK)


@triton.jit
def count_step(p_record, p_ticket):
    """Counts the step of a tensor in the last of its programs."""
    # Read the record again here, so that it does not occupy registers during the update.
    numel = tl.load(p_record + NUMEL)
    if is_last_program(p_ticket, tl.maximum(tl.cdiv(numel, tl.load(p_record + CHUNK_SIZE)), 1)):
        p_step = tl.load(p_record + STEP).to(tl.pointer_type(tl.float32))
        tl.store(p_step, tl.load(p_step) + 1.0)


POINTERS = ["p_records", "p_chunks", "p_tickets"]
HYPER = ["beta1", "beta2", "eps", "weight_decay", "log_beta1", "log_beta2"]
SCALARS = ["lr", "direction", "a_lr", "a_grad_scale", "a_found_inf", "seed"]


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
    seed: tl.int64,
    STORAGES: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    PROJECT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of all tensors of a table. Each program takes a chunk: a row (ROWS), or a stretch of singular values.

    The scalars are those of ``optim.step_kernel``.
    """
    # A step with non-finite gradients changes nothing, step counts included.
    if load_scalar(a_found_inf.to(tl.int64), 0.0) != 0.0:
        return

    # Find the program's tensor and the addresses of its parameter, gradient and two moments.
    chunk = tl.load(p_chunks + tl.program_id(0))
    i_tensor = chunk >> 32
    p_record = p_records + i_tensor * WIDTH
    numel = tl.load(p_record + NUMEL)
    size = tl.load(p_record + CHUNK_SIZE)
    addresses = ()
    for k in tl.static_range(4):
        addresses = addresses + (tl.load(p_record + PARAM + k),)

    # Coefficients in float64 from hyperparameters and the steps finished so far, as float32 scalars.
    finished = load_scalar(tl.load(p_record + STEP), 0.0)
    h = [tl.full((), x, tl.float64) for x in (beta1, beta2, eps, weight_decay, log_beta1, log_beta2)]
    c = adamw_coefficients(h, learning_rate(lr, a_lr), finished + 1.0, double(1.0), ())
    factor = gradient_factor(direction, a_grad_scale)

    # The random bits of an element depend on seed, tensor id, step and its place in the tensor alone.
    rounding = (seed, tl.load(p_record + ID), finished.to(tl.int64))
    # Update elements [begin, end): a whole row, or a stretch of up to `size` singular values.
    begin = (chunk & 0xFFFFFFFF) * size
    end = tl.minimum(begin + size, numel)
    if LONG:
        update_long_row(addresses, begin, end, c, factor, rounding, PROJECT, STOCHASTIC, STORAGES, ALIGNED, BLOCK)
    else:
        update_short_row(
            addresses, begin, end, c, factor, rounding, ROWS, PROJECT, STOCHASTIC, STORAGES, ALIGNED, BLOCK
        )

    count_step(p_records + i_tensor * WIDTH, p_tickets + i_tensor)
