# SPDX-License-Identifier: Apache-2.0
"""Attention over packed codes: programs of a head's blocks or of its window, then the sums of what they leave.

A program has ROWS of the queries that share a head of keys. Steps and minima meet no element: with keys
k^ = n s + m per channel, q . k^ = (q s) . n + q . m; with keys per token, q . k^ = (q . n) s_t + (sum of q) m_t; with
values v^ = c (n s_t + m_t), sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t). What multiplies codes is split in
two float16 numbers, so that products are as good as float32's. Other layouts are restored in float32 first.
"""

import triton
import triton.language as tl

from .._common import element_pointer, store
from .functions import (
    ROWS,
    byte_pointer,
    capped,
    dot_keys,
    dot_values,
    half_pointer,
    in_two_parts,
    int_pointer,
    integer,
    load_bytes,
    load_halves,
    load_rows,
    raised_codes,
    sum_parts,
)


@triton.jit
def part_address(part, i_batch, i_head):
    """Of a head in a tensor given as address, stride of sequences and stride of heads, in bytes."""
    return integer(part[0]) + i_batch * integer(part[1]) + i_head * integer(part[2])


@triton.jit
def row_offset(strides, i_batch, head, token):
    """Of tokens in a tensor (batch, heads, tokens, channels)."""
    return i_batch * integer(strides[0]) + head * integer(strides[1]) + token.to(tl.int64) * integer(strides[2])


@triton.jit
def weigh(logits, most, total):
    """Turns logits into weights relative to the largest yet: weights, that maximum, what sums before are scaled by,
    and the new sum of weights. Sums of nothing stay zero."""
    now = tl.maximum(most, tl.max(logits, 1))
    shift = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp(logits - shift[:, None])
    alpha = tl.exp(most - shift)
    return p, now, alpha, total * alpha + tl.sum(p, 1)


@triton.jit
def token_steps(p_scales, slot, m_slot):
    """Steps and minima of tokens that have one of each."""
    p_step = p_scales + slot.to(tl.int64) * 2
    return load_halves(p_step, m_slot), load_halves(p_step + 1, m_slot)


@triton.jit
def restored(
    packed, p_scales, slot, m_slot,
    PLANE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A plane's n * step + minimum in float32, for steps of tokens and of groups of channels; zeros where masked."""
    BYTES: tl.constexpr = WIDTH * BITS // 8
    byte = tl.arange(0, BLOCK_W)
    group = (PLANE * BYTES + byte) // (WIDTH // GROUPS)
    mask = m_slot[:, None] & (byte < BYTES)[None, :]
    p_step = p_scales + (slot[:, None].to(tl.int64) * (2 * GROUPS) + group[None, :])
    n = raised_codes(packed, PLANE, BITS).to(tl.float32) * 2.0 ** (-BITS * PLANE)
    return n * load_halves(p_step, mask) + load_halves(p_step + GROUPS, mask)


@triton.jit
def key_logits(
    q, q_parts, q_factor, q_bias, p_codes, p_scales, slot, m_slot,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """q . k^ for a tile of slots, (ROWS, TILE). Where steps belong to a block, parts and bias have them already."""
    packed = load_bytes(p_codes, slot, m_slot, WIDTH * BITS // 8, BLOCK_W)
    if GROUPS <= 1:
        product = tl.dot(q_parts[0], tl.trans(raised_codes(packed, 0, BITS)))
        for p in tl.static_range(1, len(q)):
            product = tl.dot(q_parts[p], tl.trans(raised_codes(packed, p, BITS)), product)
        logits = sum_parts(product) * q_factor[:, None]
        if GROUPS == 0:
            logits += q_bias[:, None]
        else:
            step, minimum = token_steps(p_scales, slot, m_slot)
            logits = logits * step[None, :] + q_bias[:, None] * minimum[None, :]
    else:
        logits = tl.zeros((ROWS, packed.shape[0]), tl.float32)
        for p in tl.static_range(len(q)):
            k = restored(packed, p_scales, slot, m_slot, p, WIDTH, BITS, GROUPS, BLOCK_W)
            logits += dot_keys(q[p], k, False)
    return logits


@triton.jit
def add_values(
    acc, alpha, weights, factors, p_codes, p_scales, slot, m_slot,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """acc * alpha + c * sum_t weights_t (n_t s_t + m_t), plane by plane, for a tile of slots."""
    packed = load_bytes(p_codes, slot, m_slot, WIDTH * BITS // 8, BLOCK_W)
    if GROUPS == 1:
        step, minimum = token_steps(p_scales, slot, m_slot)
        parts, factor = in_two_parts((weights * step[None, :],), BITS)
        bias = tl.sum(weights * minimum[None, :], 1)[:, None]
    result = ()
    for p in tl.static_range(len(acc)):
        if GROUPS == 1:
            product = sum_parts(tl.dot(parts[0], raised_codes(packed, p, BITS)))
            sums = product * (factor * 2.0 ** (-BITS * p))[:, None] + bias
        else:
            v = restored(packed, p_scales, slot, m_slot, p, WIDTH, BITS, GROUPS, BLOCK_W)
            sums = dot_values(weights, v, False)
        result = result + (acc[p] * alpha[:, None] + sums * factors[p][None, :],)
    return result


@triton.jit
def store_partial(p_partials, i_partial, acc, most, total, rows, VALUE_WIDTH: tl.constexpr, BYTES: tl.constexpr):
    """A program's rows: VALUE_WIDTH sums each, the largest logit and the sum of weights."""
    row = tl.arange(0, ROWS)
    p_row = p_partials + (i_partial.to(tl.int64) * ROWS + row) * (VALUE_WIDTH + 2)
    m_row = row < rows
    for p in tl.static_range(len(acc)):
        byte = tl.arange(0, acc[p].shape[1])
        p_sums = p_row[:, None] + (p * BYTES + byte)[None, :]
        tl.store(p_sums, acc[p], mask=m_row[:, None] & (byte < BYTES)[None, :])
    tl.store(p_row + VALUE_WIDTH, most, mask=m_row)
    tl.store(p_row + (VALUE_WIDTH + 1), total, mask=m_row)


@triton.jit
def attend_blocks(
    a_q, o_query, m_row, scale, softcap, segment, p_first, i_batch, i_head, i_split,
    p_partials, i_partial, rows,
    LAYOUTS: tl.constexpr, SEGMENT: tl.constexpr, HAS_FIRST: tl.constexpr, CAPPED: tl.constexpr,
    Q_STORAGE: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A split of a segment: some consecutive blocks. Layouts are bits, groups of keys (0: steps of blocks) and of
    values, whether values have channel factors, the BLOCK_W of keys and of values, and the alignment of codes."""
    BITS: tl.constexpr = LAYOUTS[SEGMENT][0]
    GROUPS: tl.constexpr = LAYOUTS[SEGMENT][1]
    V_GROUPS: tl.constexpr = LAYOUTS[SEGMENT][2]
    SEPARABLE: tl.constexpr = LAYOUTS[SEGMENT][3]
    BLOCK_W: tl.constexpr = LAYOUTS[SEGMENT][4]
    V_BLOCK_W: tl.constexpr = LAYOUTS[SEGMENT][5]
    ALIGNMENT: tl.constexpr = LAYOUTS[SEGMENT][6]
    PLANES: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH // PLANES
    V_BYTES: tl.constexpr = VALUE_WIDTH // PLANES
    byte = tl.arange(0, BLOCK_W)
    v_byte = tl.arange(0, V_BLOCK_W)
    p_key_codes = byte_pointer(part_address(segment[0], i_batch, i_head), ALIGNMENT)
    p_key_scales = half_pointer(part_address(segment[1], i_batch, i_head))
    p_value_codes = byte_pointer(part_address(segment[2], i_batch, i_head), ALIGNMENT)
    p_value_scales = half_pointer(part_address(segment[3], i_batch, i_head))
    p_channels = half_pointer(part_address(segment[4], i_batch, i_head))
    p_starts = int_pointer(integer(segment[5]))
    p_counts = int_pointer(integer(segment[6]) + i_batch * integer(segment[7]))
    seen = tl.load(p_first) if HAS_FIRST else 0

    q = ()
    acc = ()
    q_bias = tl.zeros((ROWS,), tl.float32)
    for p in tl.static_range(PLANES):
        channel, m_channel = p * BYTES + byte, byte < BYTES
        plane = load_rows(a_q, o_query, m_row, channel, m_channel, Q_STORAGE, 1) * scale
        q = q + (plane,)
        q_bias += tl.sum(plane, 1)
        acc = acc + (tl.zeros((ROWS, V_BLOCK_W), tl.float32),)
    if GROUPS != 0:  # steps of blocks are multiplied in first
        q_parts, q_factor = in_two_parts(q, BITS)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    each = integer(segment[9])
    for i_block in range(i_split * each, tl.minimum((i_split + 1) * each, integer(segment[8]))):
        start = tl.load(p_starts + i_block)
        end = start + tl.load(p_counts + i_block)
        start = tl.maximum(start, seen)
        if start < end:
            if GROUPS == 0:
                folded = ()
                q_bias = tl.zeros((ROWS,), tl.float32)
                for p in tl.static_range(PLANES):
                    p_step = p_key_scales + (i_block * 2 * WIDTH + p * BYTES + byte)
                    q_bias += tl.sum(q[p] * load_halves(p_step + WIDTH, byte < BYTES)[None, :], 1)
                    folded = folded + (q[p] * load_halves(p_step, byte < BYTES)[None, :],)
                q_parts, q_factor = in_two_parts(folded, BITS)
            factors = ()
            for p in tl.static_range(PLANES):
                if SEPARABLE:
                    p_factor = p_channels + (i_block * VALUE_WIDTH + p * V_BYTES + v_byte)
                    factors = factors + (load_halves(p_factor, v_byte < V_BYTES),)
                else:
                    factors = factors + (tl.full((V_BLOCK_W,), 1.0, tl.float32),)
            for first in range(start, end, TILE):
                slot = first + tl.arange(0, TILE)
                m_slot = slot < end
                logits = key_logits(
                    q, q_parts, q_factor, q_bias, p_key_codes, p_key_scales, slot, m_slot,
                    WIDTH, BITS, GROUPS, BLOCK_W,
                )  # fmt: skip
                if CAPPED:
                    logits = capped(logits, softcap)
                logits = tl.where(m_slot[None, :], logits, float("-inf"))
                weights, most, alpha, total = weigh(logits, most, total)
                acc = add_values(
                    acc, alpha, weights, factors, p_value_codes, p_value_scales, slot, m_slot,
                    VALUE_WIDTH, BITS, V_GROUPS, V_BLOCK_W,
                )  # fmt: skip
    store_partial(p_partials, i_partial, acc, most, total, rows, VALUE_WIDTH, V_BYTES)


@triton.jit
def attend_window(
    a_q, o_query, query, m_row, queries, scale, softcap,
    a_window_k, k_strides, a_window_v, v_strides, p_window, i_batch, i_head, p_partials, i_partial, rows,
    CAPPED: tl.constexpr, Q_STORAGE: tl.constexpr, STORAGE: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    v_channel = tl.arange(0, BLOCK_V)
    m_channel, m_v_channel = channel < WIDTH, v_channel < VALUE_WIDTH
    q = load_rows(a_q, o_query, m_row, channel, m_channel, Q_STORAGE, 1) * scale
    start = tl.load(p_window)
    end = tl.load(p_window + 1)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for first in tl.range(start, end, TILE, num_stages=1):
        slot = first + tl.arange(0, TILE)
        m_slot = slot < end
        o_slot = row_offset(k_strides, i_batch, i_head, slot)
        k = load_rows(a_window_k, o_slot, m_slot, channel, m_channel, STORAGE, VECTOR)
        logits = dot_keys(q, k, STORAGE != "fp32")
        if CAPPED:
            logits = capped(logits, softcap)
        visible = slot[None, :] < (end - (queries - 1 - query))[:, None]
        logits = tl.where(visible & m_slot[None, :], logits, float("-inf"))
        weights, most, alpha, total = weigh(logits, most, total)
        o_slot = row_offset(v_strides, i_batch, i_head, slot)
        v = load_rows(a_window_v, o_slot, m_slot, v_channel, m_v_channel, STORAGE, VECTOR)
        acc = acc * alpha[:, None] + dot_values(weights, v, STORAGE != "fp32")
    store_partial(p_partials, i_partial, (acc,), most, total, rows, VALUE_WIDTH, VALUE_WIDTH)


SCALARS = ["a_q", "a_window_k", "a_window_v", "a_window", "window_stride", "a_first", "batch", "heads", "group"]
SCALARS += ["queries", "row_tiles", "splits", "scale", "softcap"]


@triton.jit(do_not_specialize=SCALARS)
def decode_kernel(
    a_q: tl.int64,
    q_strides,
    segments,
    a_window_k: tl.int64,
    k_strides,
    a_window_v: tl.int64,
    v_strides,
    a_window: tl.int64,
    window_stride: tl.int64,
    a_first: tl.int64,
    p_partials,
    batch: tl.int64,
    heads: tl.int32,
    group: tl.int32,
    queries: tl.int32,
    row_tiles: tl.int32,
    splits: tl.int32,
    scale: tl.float32,
    softcap: tl.float32,
    LAYOUTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    CAPPED: tl.constexpr,
    Q_STORAGE: tl.constexpr,
    WINDOW_STORAGE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program has ROWS queries of a head, and a split: some blocks of a segment, or, the last one, the window."""
    i_partial = tl.program_id(0)
    i_split = i_partial % splits
    i_tile = i_partial // splits % row_tiles
    i_head = (i_partial // splits // row_tiles % heads).to(tl.int64)
    i_batch = (i_partial // splits // row_tiles // heads).to(tl.int64)
    rows = group * queries - i_tile * ROWS
    m_row = tl.arange(0, ROWS) < rows
    row = i_tile * ROWS + tl.arange(0, ROWS)
    query = row % queries
    o_query = row_offset(q_strides, i_batch, i_head * group + row // queries, query)
    for i in tl.static_range(len(LAYOUTS)):
        count = integer(segments[i][10]).to(tl.int32)
        if (i_split >= 0) & (i_split < count):
            p_first = int_pointer(a_first) + ((i * batch + i_batch) * heads + i_head)
            attend_blocks(
                a_q, o_query, m_row, scale, softcap, segments[i], p_first,
                i_batch, i_head, i_split, p_partials, i_partial, rows,
                LAYOUTS, i, HAS_FIRST, CAPPED, Q_STORAGE, WIDTH, VALUE_WIDTH, TILE,
            )  # fmt: skip
        i_split -= count
    if i_split == 0:
        p_window = int_pointer(a_window) + i_batch * window_stride
        attend_window(
            a_q, o_query, query, m_row, queries, scale, softcap,
            a_window_k, k_strides, a_window_v, v_strides, p_window, i_batch, i_head, p_partials, i_partial, rows,
            CAPPED, Q_STORAGE, WINDOW_STORAGE, VECTOR, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["a_sinks", "a_out", "rows", "queries", "query_heads", "row_tiles", "splits"])
def merge_kernel(
    p_partials,
    a_sinks: tl.int64,
    a_out: tl.int64,
    p_lse,
    rows: tl.int32,
    queries: tl.int32,
    query_heads: tl.int32,
    row_tiles: tl.int32,
    splits: tl.int32,
    STORAGE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program has BLOCK_V channels of one query: its splits' sums, scaled to the largest logit, in a fixed order."""
    i_row = tl.program_id(0)
    i_tile = i_row // rows * row_tiles + i_row % rows // ROWS
    SIZE: tl.constexpr = VALUE_WIDTH + 2
    p_row = p_partials + (i_tile.to(tl.int64) * splits * ROWS + i_row % rows % ROWS) * SIZE
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_channel = channel < VALUE_WIDTH
    sink = tl.full((), float("-inf"), tl.float32)
    if a_sinks != 0:
        sink = tl.load(a_sinks.to(tl.int64).to(tl.pointer_type(tl.float32)) + i_row // queries % query_heads)

    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        p_split = p_row + split.to(tl.int64) * (ROWS * SIZE)
        largest = tl.maximum(largest, tl.load(p_split + VALUE_WIDTH, mask=split < splits, other=float("-inf")))
    most = tl.maximum(tl.max(largest), sink)
    shift = tl.where(most == float("-inf"), 0.0, most)
    totals = tl.zeros((BLOCK_S,), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        m_split = split < splits
        p_split = p_row + split.to(tl.int64) * (ROWS * SIZE)
        factor = tl.exp(tl.load(p_split + VALUE_WIDTH, mask=m_split, other=float("-inf")) - shift)
        totals += factor * tl.load(p_split + (VALUE_WIDTH + 1), mask=m_split, other=0.0)
        mask = m_split[:, None] & m_channel[None, :]
        acc += tl.sum(factor[:, None] * tl.load(p_split[:, None] + channel[None, :], mask=mask, other=0.0), 0)
    total = tl.sum(totals) + tl.exp(sink - shift)
    p_out = element_pointer(a_out, i_row.to(tl.int64) * VALUE_WIDTH, STORAGE, 1) + channel
    store(p_out, acc * tl.where(total == 0.0, 0.0, 1.0 / total), m_channel, STORAGE)
    if tl.program_id(1) == 0:
        tl.store(p_lse + i_row, tl.where(total == 0.0, float("-inf"), most + tl.log(total)))
