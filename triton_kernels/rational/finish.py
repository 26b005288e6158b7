# SPDX-License-Identifier: Apache-2.0
"""The gradients of coefficients and bias, from the partial sums that the backward pass has stored."""

import triton
import triton.language as tl

from .._common import element_pointer, load, store
from .functions import A

FINISH = ["p_partials", "a_grad_numerator", "a_grad_denominator", "a_grad_bias", "a_denominator"]
COUNTS = ["groups", "parts", "numerator_rows", "denominator_rows", "channels", "tile_parts"]


@triton.jit
def total(p_partials, coefficient, row, table_rows, groups, parts, BLOCK: tl.constexpr):
    """Adds the partial sums of a coefficient over the parts of its group, or of all groups that share the table."""
    # The parts of consecutive groups are contiguous, so that a shared table is a longer sum.
    count = tl.where(table_rows == 1, groups, 1) * parts
    p_first = p_partials + (coefficient.to(tl.int64) * groups + row) * parts
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(p_first + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(sums).to(tl.float32)


@triton.jit(do_not_specialize=FINISH + COUNTS)
def finish_kernel(
    p_partials,
    a_grad_numerator: tl.int64,
    a_grad_denominator: tl.int64,
    a_grad_bias: tl.int64,
    a_denominator: tl.int64,
    groups: tl.int32,
    parts: tl.int32,
    numerator_rows: tl.int32,
    denominator_rows: tl.int32,
    channels: tl.int64,
    tile_parts: tl.int32,
    FORM: tl.constexpr,
    COUNT_A: tl.constexpr,
    COUNT_B: tl.constexpr,
    STORAGE_A: tl.constexpr,
    STORAGE_B: tl.constexpr,
    STORAGE_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the partial sums in float64. One program takes one coefficient, or BLOCK channels of the bias.

    Programs are numbered by coefficients of the numerator, then of the denominator, then blocks of channels.
    """
    # The index among the coefficients of the denominator, then among the blocks of channels: negative before these.
    i = tl.program_id(0)
    i_denominator = i - numerator_rows * COUNT_A
    i_bias = i_denominator - denominator_rows * COUNT_B
    if i_denominator < 0:
        # Coefficient i % COUNT_A of table row i / COUNT_A.
        sum_a = total(p_partials, i % COUNT_A, i // COUNT_A, numerator_rows, groups, parts, BLOCK)
        store(element_pointer(a_grad_numerator, i.to(tl.int64), STORAGE_A, 1), sum_a, None, STORAGE_A)
    elif i_bias < 0:
        coefficient = COUNT_A + i_denominator % COUNT_B
        sum_b = total(p_partials, coefficient, i_denominator // COUNT_B, denominator_rows, groups, parts, BLOCK)
        at = i_denominator.to(tl.int64)
        # Form A has |b_k|, whose derivative is the sign of b_k.
        if FORM == A:
            sum_b = tl.where(
                load(element_pointer(a_denominator, at, STORAGE_B, 1), None, STORAGE_B) < 0.0, -sum_b, sum_b
            )
        store(element_pointer(a_grad_denominator, at, STORAGE_B, 1), sum_b, None, STORAGE_B)
    elif BIAS is not None:
        # The column sums of [tile_parts, channels].
        channel = i_bias.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_channel = channel < channels
        p_row = p_partials + (COUNT_A + COUNT_B) * groups.to(tl.int64) * parts + channel
        sums = tl.zeros((BLOCK,), tl.float64)
        for _ in range(tile_parts):
            sums += tl.load(p_row, mask=m_channel, other=0.0).to(tl.float64)
            p_row += channels
        store(element_pointer(a_grad_bias, channel, STORAGE_BIAS, 1), sums.to(tl.float32), m_channel, STORAGE_BIAS)
