# SPDX-License-Identifier: Apache-2.0
"""Tokens in coordinates of the bases of their heads, rotated before if asked for. The bases are read once for each tile
of rows: the tokens of all heads of x that share a basis."""

import triton
import triton.language as tl

from .._common import element_pointer, store
from .functions import integer, load_rows

STRIDES = ["x_batch", "x_head", "x_token", "out_batch", "out_head", "out_token"]
STRIDES += ["cos_batch", "cos_token", "sin_batch", "sin_token"]
SCALARS = ["a_x", "a_basis", "a_out", "a_cos", "a_sin", *STRIDES, "heads", "group", "length"]


@triton.jit
def rotated(
    x, a_x, o_row, m_row, channel, a_cos, o_cos, a_sin, o_sin, STORAGE: tl.constexpr, TURNS: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """The first ROTATED channels of x [BLOCK_R, BLOCK_D], halves turned against each other."""
    # Each channel's partner in the other half is loaded once more, from the cache.
    HALF: tl.constexpr = ROTATED // 2
    m_channel = channel < ROTATED
    partner = load_rows(
        a_x, o_row, m_row, tl.where(channel < HALF, channel + HALF, channel - HALF), m_channel, STORAGE, 1
    )
    cos = load_rows(a_cos, o_cos, m_row, channel, m_channel, TURNS, 1)
    sin = load_rows(a_sin, o_sin, m_row, channel, m_channel, TURNS, 1)
    turned = x * cos + tl.where((channel < HALF)[None, :], -partner, partner) * sin
    return tl.where(m_channel[None, :], turned, x)


@triton.jit(do_not_specialize=SCALARS)
def project_kernel(
    a_x: tl.int64,
    x_batch: tl.int64,
    x_head: tl.int64,
    x_token: tl.int64,
    a_basis: tl.int64,
    a_out: tl.int64,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_token: tl.int64,
    a_cos: tl.int64,
    cos_batch: tl.int64,
    cos_token: tl.int64,
    a_sin: tl.int64,
    sin_batch: tl.int64,
    sin_token: tl.int64,
    numbers,
    heads: tl.int32,
    group: tl.int32,
    length: tl.int32,
    STORAGE: tl.constexpr,
    TURNS: tl.constexpr,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Each program projects BLOCK_R rows of one sequence and one of ``heads`` heads, whose ``numbers`` x knows.
    VECTOR channels are aligned; of cosines and sines, 0 means that nothing is ROTATED."""
    # Sequence, head and tile of rows of the program. Rows are the tokens of the first of a head's `group` heads of x,
    # then those of the next.
    tiles = (group * length + BLOCK_R - 1) // BLOCK_R
    place = tl.program_id(0) // tiles % heads
    i_batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = row < group * length
    token = (row % length).to(tl.int64)
    head = integer(numbers[0])
    for i in tl.static_range(1, len(numbers)):
        head = tl.where(place == i, integer(numbers[i]), head)
    o_row = i_batch * x_batch + (head * group + row // length) * x_head + token * x_token
    o_cos, o_sin = i_batch * cos_batch + token * cos_token, i_batch * sin_batch + token * sin_token
    o_out = i_batch * out_batch + (place * group + row // length) * out_head + token * out_token
    a_own = a_basis + place.to(tl.int64) * (HEAD_DIM * RANK * 4)
    # BLOCK_N columns of the basis [HEAD_DIM, RANK] at a time. Three products of tf32 parts are as exact as float32.
    for first in range(0, RANK, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        m_column = column < RANK
        y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for begin in range(0, HEAD_DIM, BLOCK_D):
            channel = begin + tl.arange(0, BLOCK_D)
            m_channel = channel < HEAD_DIM
            x = load_rows(a_x, o_row, m_row, channel, m_channel, STORAGE, VECTOR)
            if ROTATED > 0:
                x = rotated(x, a_x, o_row, m_row, channel, a_cos, o_cos, a_sin, o_sin, STORAGE, TURNS, ROTATED)
            basis = load_rows(a_own, channel * RANK, m_channel, column, m_column, "fp32", 4)
            y = tl.dot(x, basis, y, input_precision="tf32x3")
        p_out = element_pointer(a_out, 0, STORAGE, 1) + (o_out[:, None] + column[None, :])
        store(p_out, y, m_row[:, None] & m_column[None, :], STORAGE)
