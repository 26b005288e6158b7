# SPDX-License-Identifier: Apache-2.0
"""Kernels that pass once over rows of activations: the product with singular values, and HyboNet's map.

The elements of a row are contiguous, in aligned vectors of VECTOR elements; the stride of rows is free. Programs sum
over their rows in a fixed order, and a second launch adds these partial sums.
"""

import triton
import triton.language as tl

from .._common import element_pointer, load, row_mask, row_pointers, store


@triton.jit
def column_sums(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Column sums [1, COLUMNS] of up to 128 rows, a power of two, in a fixed order: one half is added to the other.

    The order of tl.sum depends on how rows are distributed among threads.
    """
    for k in tl.static_range(1, 8):
        if ROWS >> k > 0:
            # [2n, COLUMNS] becomes [n, COLUMNS], n = ROWS >> k.
            halves = tl.reshape(x, (2, ROWS >> k, COLUMNS))
            upper, lower = tl.split(tl.permute(halves, (1, 2, 0)))
            x = upper + lower
    return x


SCALE_NUMBERS = ["rows", "columns", "q_stride", "t_stride", "column_tiles", "tiles"]


@triton.jit(do_not_specialize=["a_q", "a_t", "a_s", "p_partials", *SCALE_NUMBERS])
def scale_kernel(
    a_q: tl.int64,
    a_t: tl.int64,
    a_s: tl.int64,
    p_partials,
    rows: tl.int64,
    columns: tl.int64,
    q_stride: tl.int64,
    t_stride: tl.int64,
    column_tiles: tl.int32,
    tiles: tl.int32,
    STORAGE: tl.constexpr,
    STORAGE_S: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Multiplies the columns of q by s in place, and sums q * t, with q from before, over the rows of each part.

    Each program takes ``tiles`` tiles [BLOCK_R, BLOCK_C], one below the other: a part of the rows in BLOCK_C columns.
    The partial sums are [parts, columns]. Their order depends on the number of rows alone.
    """
    # The part of the rows, and the columns [1, BLOCK_C], of the program.
    i_part = (tl.program_id(0) // column_tiles).to(tl.int64)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    # The singular values [1, BLOCK_C] stay in registers.
    s = load(element_pointer(a_s, 0, STORAGE_S, 1) + column, column < columns, STORAGE_S)
    # Tile by tile: q and t are read once, q is written once. Sums stay apart for BLOCK_R rows.
    first = i_part * tiles * BLOCK_R
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, tl.minimum(first + tiles.to(tl.int64) * BLOCK_R, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        mask = row_mask(row, column, rows, columns, VECTOR)
        p_q = row_pointers(a_q, 0, row, q_stride, column, STORAGE, VECTOR)
        q = load(p_q, mask, STORAGE)
        sums += q * load(row_pointers(a_t, 0, row, t_stride, column, STORAGE, VECTOR), mask, STORAGE)
        store(p_q, q * s, mask, STORAGE)
    # Reduce [BLOCK_R, BLOCK_C] to [1, BLOCK_C].
    p_sums = p_partials + i_part * columns + column
    tl.store(p_sums, column_sums(sums, BLOCK_R, BLOCK_C), mask=column < columns)


@triton.jit(do_not_specialize=["p_partials", "p_sums", "parts", "columns"])
def sum_parts_kernel(
    p_partials, p_sums, parts: tl.int64, columns: tl.int64, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Adds partial sums [parts, columns]. Each program takes BLOCK_C columns."""
    # BLOCK_P parts at a time into [BLOCK_P, BLOCK_C], reduced once at the end.
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < parts) & (column[None, :] < columns)
        sums += tl.load(p_partials + part * columns + column[None, :], mask=mask, other=0.0)
    tl.store(p_sums + column, tl.sum(sums, 0), mask=column < columns)


@triton.jit
def point(first, square, scale, k, offset):
    """Gate, time, clamped square and root of rows, all [BLOCK_R]. ``square``: |z_1..|^2, the elements after the first.

    gate = sigmoid(z_0), time = gate scale + offset, root = sqrt(max(time^2 - k, 0) / max(square, 1e-8)).
    """
    one = tl.full(first.shape, 1.0, tl.float32)
    gate = tl.div_rn(one, 1.0 + tl.exp(-first))
    time = gate * scale + offset
    held = tl.where(square < 1e-8, 1e-8, square)  # NaN stays NaN
    least = tl.sqrt_rn(one * k)
    # time^2 - k in factors, which do not cancel as the difference of squares would.
    beyond = (time - least) * (time + least)
    return gate, time, held, tl.sqrt_rn(tl.div_rn(tl.where(beyond < 0.0, 0.0, beyond), held))


@triton.jit
def exponential(a_number, STORAGE: tl.constexpr):
    """exp of one number, computed in float64 and rounded once."""
    return tl.exp(load(element_pointer(a_number, 0, STORAGE, 1), None, STORAGE).to(tl.float64)).to(tl.float32)


@triton.jit
def load_rows(
    address, row, stride, start, rows, columns,
    STORAGE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loads [BLOCK_R, BLOCK_C] from column ``start`` on, with 0 for the first element of a row."""
    column = start + tl.arange(0, BLOCK_C)[None, :]
    mask = row_mask(row, column, rows, columns, VECTOR)
    x = load(row_pointers(address, 0, row, stride, column, STORAGE, VECTOR), mask, STORAGE)
    return tl.where(column > 0, x, 0.0)


@triton.jit
def store_rows(
    address, row, start, rows, columns, x, first,
    STORAGE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Stores x [BLOCK_R, BLOCK_C] to contiguous rows, with ``first`` [BLOCK_R] for the first element of a row."""
    column = start + tl.arange(0, BLOCK_C)[None, :]
    mask = row_mask(row, column, rows, columns, VECTOR)
    x = tl.where(column > 0, x, first[:, None])
    store(row_pointers(address, 0, row, columns, column, STORAGE, VECTOR), x, mask, STORAGE)


LORENTZ = ["a_z", "a_log_scale", "a_out", "rows", "columns", "z_stride", "k", "offset"]


@triton.jit(do_not_specialize=LORENTZ)
def lorentz_kernel(
    a_z: tl.int64,
    a_log_scale: tl.int64,
    a_out: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    z_stride: tl.int64,
    k: tl.float32,
    offset: tl.float32,
    STORAGE: tl.constexpr,
    STORAGE_S: tl.constexpr,
    VECTOR: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """HyboNet's map of BLOCK_R rows in each program. Rows longer than BLOCK_C (LONG) are read again from the cache."""
    # The rows [BLOCK_R] of the program.
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = i_row[:, None]
    scale = exponential(a_log_scale, STORAGE_S)
    # The first elements [BLOCK_R], and the sums of squares of the others, which the first tile has whole unless LONG.
    first = load(element_pointer(a_z, 0, STORAGE, 1) + i_row * z_stride, i_row < rows, STORAGE)
    x = load_rows(a_z, row, z_stride, 0, rows, columns, STORAGE, VECTOR, BLOCK_C)
    squares = x * x
    if LONG:
        for start in range(BLOCK_C, columns, BLOCK_C):
            z = load_rows(a_z, row, z_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
            squares += z * z
    # Store the time, and the other elements times root. The first tile is still in registers.
    _, time, _, root = point(first, tl.sum(squares, 1), scale, k, offset)
    store_rows(a_out, row, 0, rows, columns, x * root[:, None], time, STORAGE, VECTOR, BLOCK_C)
    if LONG:
        for start in range(BLOCK_C, columns, BLOCK_C):
            x = load_rows(a_z, row, z_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
            store_rows(a_out, row, start, rows, columns, x * root[:, None], time, STORAGE, VECTOR, BLOCK_C)


@triton.jit(do_not_specialize=[*LORENTZ, "a_grad", "grad_stride", "p_partials", "tiles"])
def lorentz_backward_kernel(
    a_grad: tl.int64,
    grad_stride: tl.int64,
    p_partials,
    tiles: tl.int32,
    a_z: tl.int64,
    a_log_scale: tl.int64,
    a_out: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    z_stride: tl.int64,
    k: tl.float32,
    offset: tl.float32,
    STORAGE: tl.constexpr,
    STORAGE_S: tl.constexpr,
    VECTOR: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of z for ``tiles`` * BLOCK_R rows in each program, and a partial sum of the gradient of log_scale."""
    scale = exponential(a_log_scale, STORAGE_S)
    # Tile by tile of BLOCK_R rows. Sums of the gradient of log_scale stay apart for each of them.
    sums = tl.zeros((BLOCK_R,), tl.float64)
    begin = tl.program_id(0).to(tl.int64) * tiles * BLOCK_R
    for tile in range(begin, tl.minimum(begin + tiles.to(tl.int64) * BLOCK_R, rows), BLOCK_R):
        i_row = tile + tl.arange(0, BLOCK_R)
        row, m_row = i_row[:, None], i_row < rows
        # First pass over the rows: z and grad, their first elements [BLOCK_R] apart from the others [BLOCK_R, BLOCK_C].
        # The first tile of both stays in registers for the second pass.
        first = load(element_pointer(a_z, 0, STORAGE, 1) + i_row * z_stride, m_row, STORAGE)
        grad_first = load(element_pointer(a_grad, 0, STORAGE, 1) + i_row * grad_stride, m_row, STORAGE)
        x = load_rows(a_z, row, z_stride, 0, rows, columns, STORAGE, VECTOR, BLOCK_C)
        g = load_rows(a_grad, row, grad_stride, 0, rows, columns, STORAGE, VECTOR, BLOCK_C)
        squares, products = x * x, g * x
        if LONG:
            for start in range(BLOCK_C, columns, BLOCK_C):
                z = load_rows(a_z, row, z_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
                squares += z * z
                products += z * load_rows(a_grad, row, grad_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
        # [BLOCK_R]: |z_1..|^2, and the sum of grad_i z_i over the same elements.
        square, along = tl.sum(squares, 1), tl.sum(products, 1)
        gate, time, held, root = point(first, square, scale, k, offset)
        # d root / d time = time / (held root), or 0 where root is 0. d root / d z_i = -root z_i / held, or 0 where the
        # square is clamped.
        grad_time = tl.where(root > 0.0, grad_first + tl.div_rn(along * time, held * root), grad_first)
        # time = gate e^log_scale + offset: d time / d log_scale = gate scale.
        sums += tl.where(m_row, grad_time * gate * scale, 0.0).to(tl.float64)
        pull = tl.where(square > 1e-8, tl.div_rn(along * root, held), 0.0)[:, None]
        into_first = grad_time * scale * gate * (1.0 - gate)
        # Second pass: the gradient of z_i is grad_i root - pull z_i, that of z_0 goes through the gate.
        out = g * root[:, None] - pull * x
        store_rows(a_out, row, 0, rows, columns, out, into_first, STORAGE, VECTOR, BLOCK_C)
        if LONG:
            for start in range(BLOCK_C, columns, BLOCK_C):
                x = load_rows(a_z, row, z_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
                g = load_rows(a_grad, row, grad_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
                out = g * root[:, None] - pull * x
                store_rows(a_out, row, start, rows, columns, out, into_first, STORAGE, VECTOR, BLOCK_C)
    tl.store(p_partials + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=["p_partials", "a_sum", "count"])
def sum_numbers_kernel(p_partials, a_sum: tl.int64, count: tl.int64, STORAGE: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds ``count`` float64 numbers."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(p_partials + i, mask=i < count, other=0.0)
    store(element_pointer(a_sum, 0, STORAGE, 1), tl.sum(sums).to(tl.float32), None, STORAGE)
