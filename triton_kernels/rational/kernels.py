# SPDX-License-Identifier: Apache-2.0
"""Rational activations on tiles in registers: forward and backward, whose partial sums ``finish.py`` adds up.

Tensors are (rows, channels, columns): element (r, c, i) is at r * outer_stride + c * channel_stride + i. A program
belongs to one group of channels, whose coefficients it reads once. It works on some units, and in each unit on some
tiles of [BLOCK_R, BLOCK_C] rows and columns. The units are the channels of the group; where BIAS is "columns", the
columns are themselves the channels of the group, and a unit is a tile of columns. A program finishes one unit before
it starts the next, so that it needs accumulators for the bias gradient of one unit only.
"""

import triton
import triton.language as tl

from .._common import element_pointer, load, row_mask, row_pointers, store
from .functions import (
    A,
    D,
    add_noisy_powers,
    add_powers,
    are_kept,
    denominator_of,
    draw_noise,
    inner_polynomial,
    multiply,
    polynomial,
    read_coefficients,
    read_denominator,
)


@triton.jit
def span(i_part, units, tiles, unit_parts, tile_parts):
    """Begin and end of the units, and of the tiles, of a part. The sizes of parts differ by one at most."""
    # Part i of n has the units [i * units / n, (i + 1) * units / n).
    unit = units.to(tl.int64) * (i_part % unit_parts)
    tile = tiles.to(tl.int64) * (i_part // unit_parts)
    return unit // unit_parts, (unit + units) // unit_parts, tile // tile_parts, (tile + tiles) // tile_parts


@triton.jit
def unit_channel(i_group, unit, group_size, BIAS: tl.constexpr):
    """The channel at which a unit's pointers start. Where columns are channels, that is the first of the group."""
    first = i_group.to(tl.int64) * group_size
    return first if BIAS == "columns" else first + unit


@triton.jit
def tile_place(unit, tile, column_tiles, BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows [BLOCK_R, 1] of a tile, and its first column."""
    # A unit that is a tile of columns has one tile for each tile of rows. Other units count tiles row by row.
    i_row, i_column = tile, unit
    if BIAS != "columns":
        i_row = tl.cast(tile, tl.int32) // column_tiles
        i_column = tl.cast(tile, tl.int32) % column_tiles
    row = tl.cast(i_row, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    return row, tl.cast(i_column, tl.int64) * BLOCK_C


@triton.jit
def pointers(address, channel, row, column, strides, STORAGE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to a tile of a channel. Strides are those of rows and of channels."""
    return row_pointers(address, channel * strides[1], row, strides[0], column, STORAGE, VECTOR)


@triton.jit
def load_bias(a_bias, channel, unit, columns, BIAS: tl.constexpr, STORAGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bias of a unit: [1, BLOCK_C] where columns are channels, else a scalar."""
    if BIAS == "columns":
        column = tl.cast(unit, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        return load(element_pointer(a_bias, channel, STORAGE, 1) + column, column < columns, STORAGE)
    else:
        return load(element_pointer(a_bias, channel, STORAGE, 1), None, STORAGE)


@triton.jit
def load_seed(a_seed):
    return tl.load(a_seed.to(tl.pointer_type(tl.int64))).to(tl.uint64)


ADDRESSES = ["a_x", "a_gate", "a_y", "a_numerator", "a_denominator", "a_bias", "a_seed"]
GEOMETRY = [
    *("rows", "columns", "groups", "group_size", "x_outer", "x_channel", "gate_outer", "gate_channel"),
    *("y_outer", "y_channel", "numerator_stride", "denominator_stride", "threshold", "keep_scale"),
    *("units", "tiles", "column_tiles", "unit_parts", "tile_parts"),
]
BACKWARD = ["a_grad", "a_grad_gate", "p_partials", "grad_outer", "grad_channel"]


@triton.jit(do_not_specialize=ADDRESSES + GEOMETRY)
def forward_kernel(
    a_x: tl.int64,
    a_gate: tl.int64,
    a_y: tl.int64,
    a_numerator: tl.int64,
    a_denominator: tl.int64,
    a_bias: tl.int64,
    a_seed: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    groups: tl.int32,
    group_size: tl.int64,
    x_outer: tl.int64,
    x_channel: tl.int64,
    gate_outer: tl.int64,
    gate_channel: tl.int64,
    y_outer: tl.int64,
    y_channel: tl.int64,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    threshold: tl.int32,
    keep_scale: tl.float32,
    units: tl.int32,
    tiles: tl.int32,
    column_tiles: tl.int32,
    unit_parts: tl.int32,
    tile_parts: tl.int32,
    FORM: tl.constexpr,
    COUNT_A: tl.constexpr,
    COUNT_B: tl.constexpr,
    STORAGE: tl.constexpr,
    STORAGE_A: tl.constexpr,
    STORAGE_B: tl.constexpr,
    STORAGE_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = dropout(P(x + bias) / Q(x + bias)) * gate. COUNT_A and COUNT_B: how many coefficients a group stores."""
    # Load the coefficients of the group, which stay in registers. A stride of 0 shares one table among all groups.
    i_group = tl.program_id(0) % groups
    a = read_coefficients(a_numerator, i_group * numerator_stride, COUNT_A, STORAGE_A)
    b = read_denominator(a_denominator, i_group * denominator_stride, COUNT_B, FORM, STORAGE_B)
    if FORM == D or DROPOUT is not None:
        seed = load_seed(a_seed)
    # Unit by unit, and tile by tile within it.
    unit_begin, unit_end, begin, end = span(tl.program_id(0) // groups, units, tiles, unit_parts, tile_parts)
    for unit in range(unit_begin, unit_end):
        channel = unit_channel(i_group, unit, group_size, BIAS)
        if BIAS is not None:
            bias = load_bias(a_bias, channel, unit, columns, BIAS, STORAGE_BIAS, BLOCK_C)
        for tile in range(begin, end):
            # Load x, [BLOCK_R, BLOCK_C].
            row, first = tile_place(unit, tile, column_tiles, BIAS, BLOCK_R, BLOCK_C)
            column = first + tl.arange(0, BLOCK_C)[None, :]
            m_tile = row_mask(row, column, rows, columns, VECTOR)
            x = load(pointers(a_x, channel, row, column, (x_outer, x_channel), STORAGE, VECTOR), m_tile, STORAGE)
            if BIAS is not None:
                x += bias
            # [BLOCK_R, 1]: the offsets in y of the rows' first elements, which count the random numbers.
            first += channel * y_channel + row * y_outer
            # P(x), and the polynomial inside Q(x). Form D multiplies the coefficients by noise for every element.
            if FORM == D:
                noise_a, noise_b = draw_noise(seed, first + tl.arange(0, BLOCK_C)[None, :], len(a), len(b))
                p, _ = polynomial(multiply(a, noise_a), x)
                q, _ = inner_polynomial(multiply(b, noise_b), x, FORM)
            else:
                p, _ = polynomial(a, x)
                q, _ = inner_polynomial(b, x, FORM)
            # Divide, drop, multiply by the gate, and store y.
            y = p / denominator_of(q, FORM)
            if DROPOUT is not None:
                y = tl.where(are_kept(seed, first, threshold, DROPOUT, BLOCK_R, BLOCK_C), y * keep_scale, 0.0)
            if HAS_GATE:
                p_gate = pointers(a_gate, channel, row, column, (gate_outer, gate_channel), STORAGE, VECTOR)
                y *= load(p_gate, m_tile, STORAGE)
            store(pointers(a_y, channel, row, column, (y_outer, y_channel), STORAGE, VECTOR), y, m_tile, STORAGE)


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tuple of COUNT tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((BLOCK_R, BLOCK_C), tl.float32),)
    return tiles


@triton.jit(do_not_specialize=ADDRESSES + GEOMETRY + BACKWARD)
def backward_kernel(
    a_grad: tl.int64,
    a_grad_gate: tl.int64,
    p_partials,
    grad_outer: tl.int64,
    grad_channel: tl.int64,
    a_x: tl.int64,
    a_gate: tl.int64,
    a_y: tl.int64,
    a_numerator: tl.int64,
    a_denominator: tl.int64,
    a_bias: tl.int64,
    a_seed: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    groups: tl.int32,
    group_size: tl.int64,
    x_outer: tl.int64,
    x_channel: tl.int64,
    gate_outer: tl.int64,
    gate_channel: tl.int64,
    y_outer: tl.int64,
    y_channel: tl.int64,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    threshold: tl.int32,
    keep_scale: tl.float32,
    units: tl.int32,
    tiles: tl.int32,
    column_tiles: tl.int32,
    unit_parts: tl.int32,
    tile_parts: tl.int32,
    FORM: tl.constexpr,
    COUNT_A: tl.constexpr,
    COUNT_B: tl.constexpr,
    STORAGE: tl.constexpr,
    STORAGE_A: tl.constexpr,
    STORAGE_B: tl.constexpr,
    STORAGE_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Stores the gradients of x (at ``a_y``) and of the gate, and partial sums of those of coefficients and bias.

    With r = 1/Q, f = P r and g' = g r: dx = g' (P' - f Q'), da_k = g' x^k, db_k = -f g' dQ/db_k.
    """
    i_group = tl.program_id(0) % groups
    i_part = tl.program_id(0) // groups
    parts = unit_parts * tile_parts
    # The coefficients of the group. Only form C stores the constant b_0, so others sum the terms of b from b_1 on.
    a = read_coefficients(a_numerator, i_group * numerator_stride, COUNT_A, STORAGE_A)
    b = read_denominator(a_denominator, i_group * denominator_stride, COUNT_B, FORM, STORAGE_B)
    FIRST_B: tl.constexpr = len(b) - COUNT_B
    if FORM == D or DROPOUT is not None:
        seed = load_seed(a_seed)
    # An accumulator [BLOCK_R, BLOCK_C] for each coefficient, kept over all units and reduced once at the end.
    sums_a = zeros(len(a), BLOCK_R, BLOCK_C)
    sums_b = zeros(COUNT_B, BLOCK_R, BLOCK_C)
    # Unit by unit, each with accumulators [BLOCK_R, BLOCK_C] of its own for the bias, and tile by tile within it.
    unit_begin, unit_end, begin, end = span(i_part, units, tiles, unit_parts, tile_parts)
    for unit in range(unit_begin, unit_end):
        channel = unit_channel(i_group, unit, group_size, BIAS)
        if BIAS is not None:
            bias = load_bias(a_bias, channel, unit, columns, BIAS, STORAGE_BIAS, BLOCK_C)
            bias_sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for tile in range(begin, end):
            row, first = tile_place(unit, tile, column_tiles, BIAS, BLOCK_R, BLOCK_C)
            column = first + tl.arange(0, BLOCK_C)[None, :]
            m_tile = row_mask(row, column, rows, columns, VECTOR)
            # Load x and the gradient of y, [BLOCK_R, BLOCK_C]. Where masked, both are 0 and add nothing to the sums.
            x = load(pointers(a_x, channel, row, column, (x_outer, x_channel), STORAGE, VECTOR), m_tile, STORAGE)
            if BIAS is not None:
                x = tl.where(m_tile, x + bias, 0.0)
            p_grad = pointers(a_grad, channel, row, column, (grad_outer, grad_channel), STORAGE, VECTOR)
            grad = load(p_grad, m_tile, STORAGE)
            # Repeat the dropout of the forward pass: the same offsets give the same random numbers.
            first += channel * y_channel + row * y_outer
            if DROPOUT is not None:
                kept = are_kept(seed, first, threshold, DROPOUT, BLOCK_R, BLOCK_C)
                grad = tl.where(kept, grad * keep_scale, 0.0)

            # f = P / Q, and the derivatives of P and Q.
            if FORM == D:
                noise_a, noise_b = draw_noise(seed, first + tl.arange(0, BLOCK_C)[None, :], len(a), len(b))
                p, dp = polynomial(multiply(a, noise_a), x)
                q, dq = inner_polynomial(multiply(b, noise_b), x, FORM)
            else:
                p, dp = polynomial(a, x)
                q, dq = inner_polynomial(b, x, FORM)
            inside = x if FORM == A else q  # what Q takes the absolute value of: its sign is in the derivatives
            dq = tl.where(inside < 0.0, -dq, dq)
            r = 1.0 / denominator_of(q, FORM)
            f = p * r
            # The gate's gradient is grad * f; that of f is grad * gate.
            if HAS_GATE:
                p_gate = pointers(a_gate, channel, row, column, (gate_outer, gate_channel), STORAGE, VECTOR)
                p_grad_gate = pointers(a_grad_gate, channel, row, column, (y_outer, y_channel), STORAGE, VECTOR)
                store(p_grad_gate, grad * f, m_tile, STORAGE)
                grad *= load(p_gate, m_tile, STORAGE)
            # dx = g' (P' - f Q')
            scaled = grad * r
            dx = scaled * tl.fma(-f, dq, dp)
            store(pointers(a_y, channel, row, column, (y_outer, y_channel), STORAGE, VECTOR), dx, m_tile, STORAGE)

            # Add the terms of the coefficients: g' x^k for a_k. For b_k they are -f g' |x|^k in form A, where
            # finish_kernel applies the sign of b_k, else -f g' x^k with the sign of the polynomial inside Q.
            weight = -f * scaled
            if FORM != A:
                weight = tl.where(inside < 0.0, -weight, weight)
            z = tl.abs(x) if FORM == A else x
            if FIRST_B == 1:
                weight_b = weight * z
            else:
                weight_b = weight
            if FORM == D:
                sums_a = add_noisy_powers(sums_a, scaled, x, noise_a)
                sums_b = add_noisy_powers(sums_b, weight_b, z, noise_b[1:])
            else:
                sums_a = add_powers(sums_a, scaled, x)
                sums_b = add_powers(sums_b, weight_b, z)
            if BIAS is not None:
                bias_sums += dx

        if BIAS is not None:
            # The bias gradient of the unit: [tile parts, channels] behind the partial sums of the coefficients.
            p_row = p_partials + (COUNT_A + COUNT_B) * groups.to(tl.int64) * parts
            p_row += (i_part // unit_parts).to(tl.int64) * groups * group_size + channel
            # Its sums run over rows where columns are channels, else over the whole tile.
            if BIAS == "columns":
                column = unit * BLOCK_C + tl.arange(0, BLOCK_C)
                tl.store(p_row + column, tl.sum(bias_sums, axis=0), mask=column < columns)
            else:
                tl.store(p_row, tl.sum(bias_sums))
    # The partial sums of the coefficients: [COUNT_A + COUNT_B, groups, parts].
    p_part = p_partials + i_group * parts + i_part
    for k in tl.static_range(COUNT_A):
        tl.store(p_part + k * groups.to(tl.int64) * parts, tl.sum(sums_a[k]))
    for k in tl.static_range(COUNT_B):
        tl.store(p_part + (COUNT_A + k) * groups.to(tl.int64) * parts, tl.sum(sums_b[k]))
