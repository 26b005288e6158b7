# SPDX-License-Identifier: Apache-2.0
"""Draws the singular vectors that are to be trained, a program to a layer, and exchanges them with those that were.

Layers and pairs are told of by records, rows of int64, storage types among them: one launch does all, and nothing is
compiled again. It happens once in hundreds of steps.
"""

import triton
import triton.language as tl

from ..._ops.spectral import BLOCK as BLOCK_COLUMNS
from .._common import double, element_pointer, load, store

# Numbers of storage types in records.
STORAGES = {"fp32": 0, "bf16": 1, "fp16": 2, "int8": 3}
FLOAT32, BFLOAT16, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)

SHARED = tl.constexpr(BLOCK_COLUMNS)  # columns that share a factor


@triton.jit
def load_any(address, offset, mask, storage):
    """Elements of a storage type that is known only here, as float32; zeros where masked."""
    if storage == FLOAT32:
        x = load(element_pointer(address, 0, "fp32", 4) + offset, mask, "fp32")
    elif storage == BFLOAT16:
        x = load(element_pointer(address, 0, "bf16", 2) + offset, mask, "bf16")
    else:
        x = load(element_pointer(address, 0, "fp16", 2) + offset, mask, "fp16")
    return x


@triton.jit
def store_any(address, offset, x, mask, storage):
    if storage == FLOAT32:
        store(element_pointer(address, 0, "fp32", 4) + offset, x, mask, "fp32")
    elif storage == BFLOAT16:
        store(element_pointer(address, 0, "bf16", 2) + offset, x, mask, "bf16")
    else:
        store(element_pointer(address, 0, "fp16", 2) + offset, x, mask, "fp16")


@triton.jit
def weights(a_s, storage, start, count, BLOCK: tl.constexpr):
    """Singular values in float64, where nothing that is negative, infinite or NaN weighs anything."""
    place = start + tl.arange(0, BLOCK)
    s = load_any(a_s, place, place < count, storage)
    return tl.where((s > 0.0) & (s < float("inf")), s, 0.0).to(tl.float64)


@triton.jit
def race_times(p, seed, place, stream):
    """-log(number) / p with the 52 random bits of each place, as the bits of a float64.

    Positive numbers are in the order of their bits.
    """
    low = place.to(tl.uint32)
    high = (place >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, _, _ = tl.philox(
        seed.to(tl.uint64), low, high, zero + stream.to(tl.uint32), zero + (stream >> 32).to(tl.uint32)
    )
    bits = (w1.to(tl.int64) << 20) | (w0 >> 12).to(tl.int64)
    # Half of the last bit keeps the number inside (0, 1).
    number = (bits.to(tl.float64) + 0.5) * 2.2204460492503131e-16
    return (-tl.log(number) / p).to(tl.int64, bitcast=True)


@triton.jit
def count_earlier(p_times, count, time, BLOCK: tl.constexpr):
    earlier = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        t = tl.load(p_times + place, mask=place < count, other=0x7FFFFFFFFFFFFFFF, volatile=True)
        earlier += (t < time).to(tl.int32)
    return tl.sum(earlier)


@triton.jit
def time_of_last(p_times, count, rank, BLOCK: tl.constexpr):
    """The rank-th earliest time, bit by bit: the largest that is later than fewer than ``rank``."""
    time = tl.full((), 0, tl.int64)
    for i_bit in range(63):
        later = time | (tl.full((), 1, tl.int64) << (62 - i_bit))
        time = tl.where(count_earlier(p_times, count, later, BLOCK) < rank, later, time)
    return time


# Of a record of draw_kernel: the singular values, and where the result goes; ``first`` is the layer's scratch.
S, S_STORAGE, COUNT, RANK, STREAM, EXCHANGE, FIRST = (tl.constexpr(i) for i in range(7))
DRAW_WIDTH = tl.constexpr(7)


@triton.jit(do_not_specialize=["p_records", "p_scratch", "seed", "uniform"])
def draw_kernel(p_records, p_scratch, seed: tl.int64, uniform: tl.float64, BLOCK: tl.constexpr):
    """Draws ``rank`` of a layer's ``count`` places, and pairs those that leave the active ones with those that come.

    Scratch: int64, count times, then rank places that leave, then rank rows that come.
    """
    p_record = p_records + tl.program_id(0).to(tl.int64) * DRAW_WIDTH
    a_s, storage = tl.load(p_record + S), tl.load(p_record + S_STORAGE)
    count, rank, stream = tl.load(p_record + COUNT), tl.load(p_record + RANK), tl.load(p_record + STREAM)
    p_exchange = tl.load(p_record + EXCHANGE).to(tl.pointer_type(tl.int64))
    p_times = p_scratch + tl.load(p_record + FIRST)
    p_leaving = p_times + count
    p_coming = p_leaving + rank

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
    tl.debug_barrier()

    last = time_of_last(p_times, count, rank, BLOCK)
    ties_left = rank - count_earlier(p_times, count, last, BLOCK)  # of equal times, the lower places are drawn
    ties, leaving, coming = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        m_place = place < count
        time = tl.load(p_times + place, mask=m_place, other=0x7FFFFFFFFFFFFFFF, volatile=True)
        tie = m_place & (time == last)
        is_drawn = (time < last) | (tie & (ties + tl.cumsum(tie.to(tl.int32), 0) <= ties_left))
        ties += tl.sum(tie.to(tl.int32))
        is_active = place < rank
        tl.store(p_exchange + place, tl.full((BLOCK,), -1, tl.int64), mask=is_active & is_drawn)
        leaves = is_active & (is_drawn == 0)
        tl.store(p_leaving + (leaving - 1) + tl.cumsum(leaves.to(tl.int32), 0), place, mask=leaves)
        leaving += tl.sum(leaves.to(tl.int32))
        comes = m_place & is_drawn & (place >= rank)
        tl.store(p_coming + (coming - 1) + tl.cumsum(comes.to(tl.int32), 0), place - rank, mask=comes)
        coming += tl.sum(comes.to(tl.int32))
    tl.debug_barrier()

    for start in range(0, leaving, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = tl.load(p_leaving + i, mask=i < leaving, other=0, volatile=True)
        row = tl.load(p_coming + i, mask=i < leaving, other=0, volatile=True)
        tl.store(p_exchange + place, row, mask=i < leaving)


@triton.jit
def encode(x):
    """int8 codes of (groups, SHARED) numbers and the groups' factors, bit for bit as ``spectral/swap.h``."""
    factor = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    inverse = tl.where(factor > 0.0, tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor), 0.0)
    scaled = x * inverse[:, None]
    held = tl.where(scaled < -127.0, -127.0, tl.where(scaled > 127.0, 127.0, scaled))
    # To nearest even: adding 1.5 * 2^23 leaves the integer in the low bits.
    return ((held + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8), factor


@triton.jit
def swap_tile(
    a_active, active_storage, slot, a_frozen, frozen_storage, row, a_factors, start, columns, GROUPS: tl.constexpr
):
    """Exchanges columns [start, start + GROUPS * SHARED) of two rows."""
    column = start + tl.arange(0, GROUPS)[:, None] * SHARED + tl.arange(0, SHARED)[None, :]
    mask = column < columns
    o_active, o_frozen = slot * columns + column, row * columns + column
    group = start // SHARED + tl.arange(0, GROUPS)
    m_group = group * SHARED < columns
    p_codes = a_frozen.to(tl.pointer_type(tl.int8)) + o_frozen
    p_factors = a_factors.to(tl.pointer_type(tl.float32)) + row * tl.cdiv(columns, SHARED) + group

    leaving = load_any(a_active, o_active, mask, active_storage)
    if frozen_storage == INT8:
        factor = tl.load(p_factors, mask=m_group, other=0.0)
        coming = tl.load(p_codes, mask=mask, other=0).to(tl.float32) * factor[:, None]
    else:
        coming = load_any(a_frozen, o_frozen, mask, frozen_storage)
    # No thread overwrites what another one has yet to read.
    tl.debug_barrier()
    store_any(a_active, o_active, coming, mask, active_storage)
    if frozen_storage == INT8:
        codes, factor = encode(leaving)
        tl.store(p_codes, codes, mask=mask)
        tl.store(p_factors, factor, mask=m_group)
    else:
        store_any(a_frozen, o_frozen, leaving, mask, frozen_storage)


# Of a record of swap_kernel. Vectors count as matrices of one column.
ACTIVE, ACTIVE_STORAGE, FROZEN, FROZEN_STORAGE, FACTORS, CHANGE, SLOTS, COLUMNS, FROZEN_ROWS = (
    tl.constexpr(i) for i in range(9)
)
SWAP_WIDTH = tl.constexpr(9)


@triton.jit(do_not_specialize=["p_records"])
def swap_kernel(p_records, GROUPS: tl.constexpr):
    """The programs (pair, 0), (pair, 1), ... take turns with the places of a pair's active rows."""
    p_record = p_records + tl.program_id(0).to(tl.int64) * SWAP_WIDTH
    a_active, active_storage = tl.load(p_record + ACTIVE), tl.load(p_record + ACTIVE_STORAGE)
    a_frozen, frozen_storage = tl.load(p_record + FROZEN), tl.load(p_record + FROZEN_STORAGE)
    p_change = tl.load(p_record + CHANGE).to(tl.pointer_type(tl.int64))
    a_factors, slots, columns = tl.load(p_record + FACTORS), tl.load(p_record + SLOTS), tl.load(p_record + COLUMNS)
    frozen_rows = tl.load(p_record + FROZEN_ROWS)
    for slot in range(tl.program_id(1).to(tl.int64), slots, tl.num_programs(1)):
        row = tl.load(p_change + slot)
        if (row >= 0) & (row < frozen_rows):
            for start in range(0, columns, GROUPS * SHARED):
                # fmt: off
                swap_tile(
                    a_active, active_storage, slot, a_frozen, frozen_storage, row, a_factors, start, columns, GROUPS)
                # fmt: on
