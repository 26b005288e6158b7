# SPDX-License-Identifier: Apache-2.0
"""Draws the singular vectors to train next, one layer in each program, and swaps them with the active ones.

Records, rows of int64, describe layers and pairs of tensors, storage types included. So one launch serves them all, and
no combination of dtypes needs code of its own. This happens once in hundreds of steps, so speed matters less.
"""

import triton
import triton.language as tl

from ..._ops.spectral import BLOCK as BLOCK_COLUMNS
from .._common import double, element_pointer, load, store

# Storage types as they stand in records.
STORAGES = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3}
FLOAT32, BFLOAT16, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)

SHARED = tl.constexpr(BLOCK_COLUMNS)  # columns that share a factor


@triton.jit
def load_any(address, offset, mask, storage):
    """Loads elements of a storage type known at run time only, as float32; zeros where masked."""
    if storage == FLOAT32:
        x = load(element_pointer(address, 0, "fp32", 4) + offset, mask, "fp32")
    elif storage == BFLOAT16:
        x = load(element_pointer(address, 0, "bf16", 2) + offset, mask, "bf16")
    else:
        x = load(element_pointer(address, 0, "fp16", 2) + offset, mask, "fp16")
    return x


@triton.jit
def store_any(address, offset, x, mask, storage):
    """Stores float32 values in a storage type known at run time only."""
    if storage == FLOAT32:
        store(element_pointer(address, 0, "fp32", 4) + offset, x, mask, "fp32")
    elif storage == BFLOAT16:
        store(element_pointer(address, 0, "bf16", 2) + offset, x, mask, "bf16")
    else:
        store(element_pointer(address, 0, "fp16", 2) + offset, x, mask, "fp16")


@triton.jit
def weights(a_s, storage, start, count, BLOCK: tl.constexpr):
    """Singular values [BLOCK] as weights in float64. Negative, infinite and NaN values have the weight 0."""
    place = start + tl.arange(0, BLOCK)
    s = load_any(a_s, place, place < count, storage)
    return tl.where((s > 0.0) & (s < float("inf")), s, 0.0).to(tl.float64)


@triton.jit
def race_times(p, seed, place, stream):
    """Race times -log(number) / p, with 52 random bits for each place, as the bits of a float64.

    The bits of positive numbers have the order of the numbers. The places with the earliest times are drawn, which
    samples without replacement in proportion to p.
    """
    low = place.to(tl.uint32)
    high = (place >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, _, _ = tl.philox(
        seed.to(tl.uint64), low, high, zero + stream.to(tl.uint32), zero + (stream >> 32).to(tl.uint32)
    )
    bits = (w1.to(tl.int64) << 20) | (w0 >> 12).to(tl.int64)
    # Adding half of the last bit keeps the number inside (0, 1).
    number = (bits.to(tl.float64) + 0.5) * 2.2204460492503131e-16
    return (-tl.log(number) / p).to(tl.int64, bitcast=True)


@triton.jit
def count_earlier(p_times, count, time, BLOCK: tl.constexpr):
    """How many times are earlier than ``time``."""
    earlier = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        t = tl.load(p_times + place, mask=place < count, other=0x7FFFFFFFFFFFFFFF, volatile=True)
        earlier += (t < time).to(tl.int32)
    return tl.sum(earlier)


@triton.jit
def time_of_last(p_times, count, rank, BLOCK: tl.constexpr):
    """The rank-th earliest time: the largest number that fewer than ``rank`` times are below."""
    # Set bits from the highest down, and keep each one with which fewer than `rank` times are earlier.
    time = tl.full((), 0, tl.int64)
    for i_bit in range(63):
        later = time | (tl.full((), 1, tl.int64) << (62 - i_bit))
        time = tl.where(count_earlier(p_times, count, later, BLOCK) < rank, later, time)
    return time


# The columns of a record of draw_kernel. EXCHANGE: address of the result; FIRST: where the layer's scratch begins.
S, S_STORAGE, COUNT, RANK, STREAM, EXCHANGE, FIRST = (tl.constexpr(i) for i in range(7))
DRAW_WIDTH = tl.constexpr(7)


@triton.jit(do_not_specialize=["p_records", "p_scratch", "seed", "uniform"])
def draw_kernel(p_records, p_scratch, seed: tl.int64, uniform: tl.float64, BLOCK: tl.constexpr):
    """Draws ``rank`` of the ``count`` places of one layer in each program, and pairs leaving places with coming rows.

    The first ``rank`` places are active, the others frozen. An active place that is not drawn leaves, a frozen one that
    is drawn comes. Scratch of a layer, int64: count times, rank places that leave, rank rows that come.
    """
    p_record = p_records + tl.program_id(0).to(tl.int64) * DRAW_WIDTH
    a_s, storage = tl.load(p_record + S), tl.load(p_record + S_STORAGE)
    count, rank, stream = tl.load(p_record + COUNT), tl.load(p_record + RANK), tl.load(p_record + STREAM)
    p_exchange = tl.load(p_record + EXCHANGE).to(tl.pointer_type(tl.int64))
    p_times = p_scratch + tl.load(p_record + FIRST)
    p_leaving = p_times + count
    p_coming = p_leaving + rank

    # Draw a race time for every place, with probability p in proportion to the weight, mixed with a uniform share.
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        sums += weights(a_s, storage, start, count, BLOCK)
    total = tl.sum(sums)
    share, even = double(uniform), 1.0 / count.to(tl.float64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        weight = weights(a_s, storage, start, count, BLOCK)
        proportion = tl.where(total > 0.0, weight / tl.where(total > 0.0, total, 1.0), even)
        p = share * even + (1.0 - share) * proportion
        tl.store(p_times + place, race_times(p, seed.to(tl.int64), place, stream), mask=place < count)
    # All threads read the times that others have stored.
    tl.debug_barrier()

    # Find the time of the last place that is drawn. Of equal times, the lower places are drawn.
    last = time_of_last(p_times, count, rank, BLOCK)
    ties_left = rank - count_earlier(p_times, count, last, BLOCK)
    ties, leaving, coming = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        m_place = place < count
        time = tl.load(p_times + place, mask=m_place, other=0x7FFFFFFFFFFFFFFF, volatile=True)
        tie = m_place & (time == last)
        is_drawn = (time < last) | (tie & (ties + tl.cumsum(tie.to(tl.int32), 0) <= ties_left))
        ties += tl.sum(tie.to(tl.int32))
        # Drawn active places stay (-1). The others are listed in order, by the running count of each kind.
        is_active = place < rank
        tl.store(p_exchange + place, tl.full((BLOCK,), -1, tl.int64), mask=is_active & is_drawn)
        leaves = is_active & (is_drawn == 0)
        tl.store(p_leaving + (leaving - 1) + tl.cumsum(leaves.to(tl.int32), 0), place, mask=leaves)
        leaving += tl.sum(leaves.to(tl.int32))
        comes = m_place & is_drawn & (place >= rank)
        tl.store(p_coming + (coming - 1) + tl.cumsum(comes.to(tl.int32), 0), place - rank, mask=comes)
        coming += tl.sum(comes.to(tl.int32))
    tl.debug_barrier()

    # Pair the lists: as many come as leave.
    for start in range(0, leaving, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = tl.load(p_leaving + i, mask=i < leaving, other=0, volatile=True)
        row = tl.load(p_coming + i, mask=i < leaving, other=0, volatile=True)
        tl.store(p_exchange + place, row, mask=i < leaving)


@triton.jit
def encode(x):
    """int8 codes of numbers [groups, SHARED], and the factor [groups] of each group, bit for bit those of
    ``csrc/spectral/swap.h``: a NaN makes its group's factor NaN, and has the code 0."""
    # tl.max may drop a NaN, and a NaN's bits differ between machines.
    largest = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(tl.abs(x), 1))
    factor = tl.div_rn(largest, 127.0)
    inverse = tl.where(factor > 0.0, tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor), 0.0)
    scaled = x * inverse[:, None]
    held = tl.where(scaled < -127.0, -127.0, tl.where(scaled > 127.0, 127.0, scaled))
    held = tl.where(scaled == scaled, held, 0.0)
    # Round to nearest even: adding 1.5 * 2^23 leaves the integer in the low bits.
    return ((held + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8), factor


@triton.jit
def swap_tile(
    a_active, active_storage, slot, a_frozen, frozen_storage, row, a_factors, start, columns, GROUPS: tl.constexpr
):
    """Exchanges columns [start, start + GROUPS * SHARED) of an active and of a frozen row."""
    # [GROUPS, SHARED]: the columns of a group share a factor.
    column = start + tl.arange(0, GROUPS)[:, None] * SHARED + tl.arange(0, SHARED)[None, :]
    mask = column < columns
    o_active, o_frozen = slot * columns + column, row * columns + column
    group = start // SHARED + tl.arange(0, GROUPS)
    m_group = group * SHARED < columns
    p_codes = a_frozen.to(tl.pointer_type(tl.int8)) + o_frozen
    p_factors = a_factors.to(tl.pointer_type(tl.float32)) + row * tl.cdiv(columns, SHARED) + group

    # Read both rows before either is written.
    leaving = load_any(a_active, o_active, mask, active_storage)
    if frozen_storage == INT8:
        factor = tl.load(p_factors, mask=m_group, other=0.0)
        coming = tl.load(p_codes, mask=mask, other=0).to(tl.float32) * factor[:, None]
    else:
        coming = load_any(a_frozen, o_frozen, mask, frozen_storage)
    # Without this barrier a thread could overwrite what another one has yet to read.
    tl.debug_barrier()
    store_any(a_active, o_active, coming, mask, active_storage)
    if frozen_storage == INT8:
        codes, factor = encode(leaving)
        tl.store(p_codes, codes, mask=mask)
        tl.store(p_factors, factor, mask=m_group)
    else:
        store_any(a_frozen, o_frozen, leaving, mask, frozen_storage)


# The columns of a record of swap_kernel. A vector counts as a matrix of one column.
ACTIVE, ACTIVE_STORAGE, FROZEN, FROZEN_STORAGE, FACTORS, CHANGE, SLOTS, COLUMNS, FROZEN_ROWS = (
    tl.constexpr(i) for i in range(9)
)
SWAP_WIDTH = tl.constexpr(9)


@triton.jit(do_not_specialize=["p_records"])
def swap_kernel(p_records, GROUPS: tl.constexpr):
    """Swaps the rows of one pair of tensors. Programs (pair, 0), (pair, 1), ... take the active rows in turn."""
    p_record = p_records + tl.program_id(0).to(tl.int64) * SWAP_WIDTH
    a_active, active_storage = tl.load(p_record + ACTIVE), tl.load(p_record + ACTIVE_STORAGE)
    a_frozen, frozen_storage = tl.load(p_record + FROZEN), tl.load(p_record + FROZEN_STORAGE)
    p_change = tl.load(p_record + CHANGE).to(tl.pointer_type(tl.int64))
    a_factors, slots, columns = tl.load(p_record + FACTORS), tl.load(p_record + SLOTS), tl.load(p_record + COLUMNS)
    frozen_rows = tl.load(p_record + FROZEN_ROWS)
    for slot in range(tl.program_id(1).to(tl.int64), slots, tl.num_programs(1)):
        # The frozen row that comes to this place, or -1 where the active row stays.
        row = tl.load(p_change + slot)
        if (row >= 0) & (row < frozen_rows):
            for start in range(0, columns, GROUPS * SHARED):
                # fmt: off
                swap_tile(
                    a_active, active_storage, slot, a_frozen, frozen_storage, row, a_factors, start, columns, GROUPS)
                # fmt: on
