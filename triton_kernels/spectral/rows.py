# SPDX-License-Identifier: Apache-2.0
"""Kernels that pass once over rows of activations: the product with singular values, and HyboNet's map.

Rows have contiguous elements and any distance; VECTOR of them are aligned. Sums over rows are made part by part in a
fixed order, and those of the parts in another launch.
"""

import triton
import triton.language as tl

from .._common import element_pointer, load, store


@triton.jit
def tile_pointers(address, row, stride, column, STORAGE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to a tile of rows (BLOCK_R, 1) and columns (1, BLOCK_C), the first of which is a multiple of VECTOR."""
    WIDTH: tl.constexpr = 4 if STORAGE == "fp32" else 2
    return element_pointer(address, 0, STORAGE, VECTOR * WIDTH) + (row * (stride // VECTOR * VECTOR) + column)


@triton.jit
def tile_mask(row, column, rows, columns, VECTOR: tl.constexpr):
    # A multiplication by VECTOR shows that no vector is cut.
    return (row < rows) & (column < columns // VECTOR * VECTOR)


@triton.jit
def column_sums(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums (1, COLUMNS) of up to 255 rows, halves added to halves: tl.sum adds as threads happen to hold rows."""
    for k in tl.static_range(1, 8):
        if ROWS >> k > 0:
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
    """q *= s by columns, and sums of q * t before: a program does ``tiles`` tiles below each other.

    Row ``part`` of the partial sums, (parts, columns), is those of the rows from part * tiles * BLOCK_R on, in an order
    that depends on the number of rows alone.
    """
    i_part = (tl.program_id(0) // column_tiles).to(tl.int64)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    s = load(element_pointer(a_s, 0, STORAGE_S, 1) + column, column < columns, STORAGE_S)
    first = i_part * tiles * BLOCK_R
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, tl.minimum(first + tiles.to(tl.int64) * BLOCK_R, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        mask = tile_mask(row, column, rows, columns, VECTOR)
        p_q = tile_pointers(a_q, row, q_stride, column, STORAGE, VECTOR)
        q = load(p_q, mask, STORAGE)
        sums += q * load(tile_pointers(a_t, row, t_stride, column, STORAGE, VECTOR), mask, STORAGE)
        store(p_q, q * s, mask, STORAGE)
    p_sums = p_partials + i_part * columns + column
    tl.store(p_sums, column_sums(sums, BLOCK_R, BLOCK_C), mask=column < columns)


@triton.jit(do_not_specialize=["p_partials", "p_sums", "parts", "columns"])
def sum_parts_kernel(
    p_partials, p_sums, parts: tl.int64, columns: tl.int64, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Column sums of (parts, columns), BLOCK_C of them to a program."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < parts) & (column[None, :] < columns)
        sums += tl.load(p_partials + part * columns + column[None, :], mask=mask, other=0.0)
    tl.store(p_sums + column, tl.sum(sums, 0), mask=column < columns)


@triton.jit
def point(first, square, scale, k, offset):
    """Gate, time, clamped square and root of rows, from their first elements and the others' sums of squares."""
    one = tl.full(first.shape, 1.0, tl.float32)
    gate = tl.div_rn(one, 1.0 + tl.exp(-first))
    time = gate * scale + offset
    held = tl.where(square < 1e-8, 1e-8, square)  # NaN stays NaN
    least = tl.sqrt_rn(one * k)
    beyond = (time - least) * (time + least)
    return gate, time, held, tl.sqrt_rn(tl.div_rn(tl.where(beyond < 0.0, 0.0, beyond), held))


@triton.jit
def exponential(a_number, STORAGE: tl.constexpr):
    """exp of one number, rounded once."""
    return tl.exp(load(element_pointer(a_number, 0, STORAGE, 1), None, STORAGE).to(tl.float64)).to(tl.float32)


@triton.jit
def load_rows(
    address, row, stride, start, rows, columns,
    STORAGE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns from ``start`` on of rows (BLOCK_R, 1), with zero for the first of a row."""
    column = start + tl.arange(0, BLOCK_C)[None, :]
    mask = tile_mask(row, column, rows, columns, VECTOR)
    x = load(tile_pointers(address, row, stride, column, STORAGE, VECTOR), mask, STORAGE)
    return tl.where(column > 0, x, 0.0)


@triton.jit
def store_rows(
    address, row, start, rows, columns, x, first,
    STORAGE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Into contiguous rows, with ``first`` for the first of a row."""
    column = start + tl.arange(0, BLOCK_C)[None, :]
    mask = tile_mask(row, column, rows, columns, VECTOR)
    x = tl.where(column > 0, x, first[:, None])
    store(tile_pointers(address, row, columns, column, STORAGE, VECTOR), x, mask, STORAGE)


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
    """BLOCK_R rows to a program; rows longer than BLOCK_C (LONG) come a second time, from the cache."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = i_row[:, None]
    scale = exponential(a_log_scale, STORAGE_S)
    first = load(element_pointer(a_z, 0, STORAGE, 1) + i_row * z_stride, i_row < rows, STORAGE)
    x = load_rows(a_z, row, z_stride, 0, rows, columns, STORAGE, VECTOR, BLOCK_C)
    squares = x * x
    if LONG:
        for start in range(BLOCK_C, columns, BLOCK_C):
            z = load_rows(a_z, row, z_stride, start, rows, columns, STORAGE, VECTOR, BLOCK_C)
            squares += z * z
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
    """``tiles`` times BLOCK_R rows to a program, and the float64 sum of their parts of the gradient of log_scale."""
    scale = exponential(a_log_scale, STORAGE_S)
    sums = tl.zeros((BLOCK_R,), tl.float64)
    begin = tl.program_id(0).to(tl.int64) * tiles * BLOCK_R
    for tile in range(begin, tl.minimum(begin + tiles.to(tl.int64) * BLOCK_R, rows), BLOCK_R):
        i_row = tile + tl.arange(0, BLOCK_R)
        row, m_row = i_row[:, None], i_row < rows
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
        square, along = tl.sum(squares, 1), tl.sum(products, 1)
        gate, time, held, root = point(first, square, scale, k, offset)
        # d root / d time = time / (held root), d root / d z_i = -root z_i / held where the square is not clamped.
        grad_time = tl.where(root > 0.0, grad_first + tl.div_rn(along * time, held * root), grad_first)
        sums += tl.where(m_row, grad_time * gate * scale, 0.0).to(tl.float64)
        pull = tl.where(square > 1e-8, tl.div_rn(along * root, held), 0.0)[:, None]
        into_first = grad_time * scale * gate * (1.0 - gate)
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
