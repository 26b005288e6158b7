# SPDX-License-Identifier: Apache-2.0
"""Decode attention on packed codes: programs compute the softmax of one split each, which ``merge.py`` puts together.

A program takes ROWS rows of one head of keys. Rows are the queries of all query heads that share it, one query head
after another. A split is some blocks of a segment, or the whole window. Scales (steps s and minima m) are applied to
rows of queries and of weights, not to elements:

    keys k^ = n s + m with scales per channel:    q . k^ = (q s) . n + q . m
    keys k^ = n s_t + m_t with scales per token:  q . k^ = s_t (q . n) + m_t sum(q)
    values v^ = c (n s_t + m_t):                  sum_t p_t v^_t = c (sum_t (p_t s_t) n_t + sum_t p_t m_t)

Codes n are exact in float16. The other operand is split into two float16 parts, so that products are as exact as in
float32. Tokens with several groups of scales are restored in float32 first.
"""

import triton
import triton.language as tl

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
    softmax_step,
    sum_parts,
)


@triton.jit
def part_address(part, i_batch, i_head):
    """The address of a head in a tensor. Strides are in bytes."""
    address, batch_stride, head_stride = part
    return integer(address) + i_batch * integer(batch_stride) + i_head * integer(head_stride)


@triton.jit
def row_offset(strides, i_batch, head, token):
    """The offsets of tokens in a tensor (batch, heads, tokens, channels), in elements."""
    batch_stride, head_stride, token_stride = strides
    return i_batch * integer(batch_stride) + head * integer(head_stride) + token.to(tl.int64) * integer(token_stride)


@triton.jit
def token_steps(p_scales, slot, m_slot):
    """Steps and minima [TILE] of tokens that have one of each."""
    p_step = p_scales + slot.to(tl.int64) * 2
    return load_halves(p_step, m_slot), load_halves(p_step + 1, m_slot)


@triton.jit
def restored(
    packed, p_scales, slot, m_slot,
    PLANE: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """n * step + minimum of one plane in float32, [TILE, BLOCK_W], for tokens with groups; zeros where masked."""
    BYTES: tl.constexpr = HEAD_DIM * BITS // 8
    byte = tl.arange(0, BLOCK_W)
    group = (PLANE * BYTES + byte) // (HEAD_DIM // GROUPS)
    mask = m_slot[:, None] & (byte < BYTES)[None, :]
    # [TILE, BLOCK_W]: the step of each channel's group. A token has GROUPS steps, then GROUPS minima.
    p_step = p_scales + (slot[:, None].to(tl.int64) * (2 * GROUPS) + group[None, :])
    n = raised_codes(packed, PLANE, BITS).to(tl.float32) * 2.0 ** (-BITS * PLANE)
    return n * load_halves(p_step, mask) + load_halves(p_step + GROUPS, mask)


@triton.jit
def key_logits(
    q, q_parts, q_factor, q_bias, p_codes, p_scales, slot, m_slot,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """q . k^ for a tile of slots, [ROWS, TILE].

    q_parts and q_bias [ROWS] are made of q and sum(q) for scales per token, of q s and q . m for scales per channel.
    """
    # [TILE, BLOCK_W]: a byte has the codes of one channel of each plane.
    packed = load_bytes(p_codes, slot, m_slot, HEAD_DIM * BITS // 8, BLOCK_W)
    if GROUPS <= 1:
        # q . n on tensor cores, [2 * ROWS, TILE]: one product for each plane, all into the same sums.
        product = tl.dot(q_parts[0], tl.trans(raised_codes(packed, 0, BITS)))
        for p in tl.static_range(1, len(q)):
            product = tl.dot(q_parts[p], tl.trans(raised_codes(packed, p, BITS)), product)
        logits = sum_parts(product) * q_factor[:, None]
        if GROUPS == 0:
            # (q s) . n + q . m
            logits += q_bias[:, None]
        else:
            # s_t (q . n) + m_t sum(q)
            step, minimum = token_steps(p_scales, slot, m_slot)
            logits = logits * step[None, :] + q_bias[:, None] * minimum[None, :]
    else:
        # The scales of several groups do not factor out of the product.
        logits = tl.zeros((ROWS, packed.shape[0]), tl.float32)
        for p in tl.static_range(len(q)):
            k = restored(packed, p_scales, slot, m_slot, p, HEAD_DIM, BITS, GROUPS, BLOCK_W)
            logits += dot_keys(q[p], k, False)
    return logits


@triton.jit
def add_values(
    acc, alpha, weights, factors, p_codes, p_scales, slot, m_slot,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """acc * alpha + c * sum_t weights_t (n_t s_t + m_t) for a tile of slots, one [ROWS, BLOCK_W] for each plane."""
    packed = load_bytes(p_codes, slot, m_slot, HEAD_DIM * BITS // 8, BLOCK_W)
    # On codes, if tokens have one scale: products on tensor cores, [2 * ROWS, BLOCK_W] for each plane.
    if GROUPS == 1:
        # Apply the steps to the weights [ROWS, TILE]. The minima add the same bias [ROWS, 1] to every channel.
        step, minimum = token_steps(p_scales, slot, m_slot)
        parts, factor = in_two_parts((weights * step[None, :],), BITS)
        bias = tl.sum(weights * minimum[None, :], 1)[:, None]
    result = ()
    for p in tl.static_range(len(acc)):
        if GROUPS == 1:
            # The same weights serve all planes, so 2^(-BITS * p) is applied to the product.
            product = sum_parts(tl.dot(parts[0], raised_codes(packed, p, BITS)))
            sums = product * (factor * 2.0 ** (-BITS * p))[:, None] + bias
        else:
            v = restored(packed, p_scales, slot, m_slot, p, HEAD_DIM, BITS, GROUPS, BLOCK_W)
            sums = dot_values(weights, v, False)
        result = result + (acc[p] * alpha[:, None] + sums * factors[p][None, :],)
    return result


@triton.jit
def store_partial(p_partials, i_partial, acc, row_max, total, rows, VALUE_DIM: tl.constexpr, BYTES: tl.constexpr):
    """Stores the unfinished softmax of a program: for each row, VALUE_DIM weighted values, row max, sum of weights."""
    # Partial results are [programs, ROWS, VALUE_DIM + 2] in float32; rows beyond the last are not written.
    row = tl.arange(0, ROWS)
    p_row = p_partials + (i_partial.to(tl.int64) * ROWS + row) * (VALUE_DIM + 2)
    m_row = row < rows
    for p in tl.static_range(len(acc)):
        # Plane p has the channels from p * BYTES on.
        byte = tl.arange(0, acc[p].shape[1])
        p_sums = p_row[:, None] + (p * BYTES + byte)[None, :]
        tl.store(p_sums, acc[p], mask=m_row[:, None] & (byte < BYTES)[None, :])
    tl.store(p_row + VALUE_DIM, row_max, mask=m_row)
    tl.store(p_row + (VALUE_DIM + 1), total, mask=m_row)


@triton.jit
def attend_blocks(
    a_q, o_query, m_row, scale, softcap, segment, p_first, i_batch, i_head, i_split,
    p_partials, i_partial, rows,
    LAYOUTS: tl.constexpr, SEGMENT: tl.constexpr, HAS_FIRST: tl.constexpr, CAPPED: tl.constexpr,
    Q_STORAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attends to one split of a segment, at most ``each`` consecutive blocks, and stores the unfinished softmax.

    A layout has bits, groups of keys (0: scales per channel) and of values, whether values have channel factors, the
    BLOCK_W of keys and of values, and the alignment of codes in bytes.
    """
    BITS: tl.constexpr = LAYOUTS[SEGMENT][0]
    GROUPS: tl.constexpr = LAYOUTS[SEGMENT][1]
    V_GROUPS: tl.constexpr = LAYOUTS[SEGMENT][2]
    SEPARABLE: tl.constexpr = LAYOUTS[SEGMENT][3]
    BLOCK_W: tl.constexpr = LAYOUTS[SEGMENT][4]
    V_BLOCK_W: tl.constexpr = LAYOUTS[SEGMENT][5]
    ALIGNMENT: tl.constexpr = LAYOUTS[SEGMENT][6]
    PLANES: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = HEAD_DIM // PLANES
    V_BYTES: tl.constexpr = VALUE_DIM // PLANES
    byte = tl.arange(0, BLOCK_W)
    v_byte = tl.arange(0, V_BLOCK_W)
    # Pointers to this head. Each of the first six entries is an address and the strides of sequences and heads.
    key_codes, key_scales, value_codes, value_scales, channels, counts, a_starts, blocks, each, _ = segment
    p_key_codes = byte_pointer(part_address(key_codes, i_batch, i_head), ALIGNMENT)
    p_key_scales = half_pointer(part_address(key_scales, i_batch, i_head))
    p_value_codes = byte_pointer(part_address(value_codes, i_batch, i_head), ALIGNMENT)
    p_value_scales = half_pointer(part_address(value_scales, i_batch, i_head))
    p_channels = half_pointer(part_address(channels, i_batch, i_head))
    p_starts = int_pointer(integer(a_starts))
    p_counts = int_pointer(part_address(counts, i_batch, i_head))
    each = integer(each)
    seen = tl.load(p_first) if HAS_FIRST else 0  # the first slot that is visible

    # Load the queries, one [ROWS, BLOCK_W] for each plane, and clear the sums, one [ROWS, V_BLOCK_W] for each plane.
    # q_bias is sum(q), by which the minima of tokens are multiplied.
    q = ()
    acc = ()
    q_bias = tl.zeros((ROWS,), tl.float32)
    for p in tl.static_range(PLANES):
        channel, m_channel = p * BYTES + byte, byte < BYTES
        plane = load_rows(a_q, o_query, m_row, channel, m_channel, Q_STORAGE, 1) * scale
        q = q + (plane,)
        q_bias += tl.sum(plane, 1)
        acc = acc + (tl.zeros((ROWS, V_BLOCK_W), tl.float32),)
    if GROUPS != 0:
        # Scales per token leave the queries as they are: split them once for all blocks.
        q_parts, q_factor = in_two_parts(q, BITS)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # Block by block, because channel scales and channel factors belong to a block.
    for i_block in range(i_split * each, tl.minimum((i_split + 1) * each, integer(blocks))):
        # The visible tokens of the block are in the slots [start, end).
        start = tl.load(p_starts + i_block)
        end = start + tl.load(p_counts + i_block)
        start = tl.maximum(start, seen)
        if start < end:
            # Apply the channel scales to the queries: q s for each plane, [ROWS, BLOCK_W], and q . m, [ROWS].
            if GROUPS == 0:
                folded = ()
                q_bias = tl.zeros((ROWS,), tl.float32)
                for p in tl.static_range(PLANES):
                    p_step = p_key_scales + (i_block * 2 * HEAD_DIM + p * BYTES + byte)
                    q_bias += tl.sum(q[p] * load_halves(p_step + HEAD_DIM, byte < BYTES)[None, :], 1)
                    folded = folded + (q[p] * load_halves(p_step, byte < BYTES)[None, :],)
                q_parts, q_factor = in_two_parts(folded, BITS)
            # The channel factors c of the values for each plane, [V_BLOCK_W].
            factors = ()
            for p in tl.static_range(PLANES):
                if SEPARABLE:
                    p_factor = p_channels + (i_block * VALUE_DIM + p * V_BYTES + v_byte)
                    factors = factors + (load_halves(p_factor, v_byte < V_BYTES),)
                else:
                    factors = factors + (tl.full((V_BLOCK_W,), 1.0, tl.float32),)
            # Tile by tile: logits [ROWS, TILE], online softmax, weighted values. Slots past the end get weight 0.
            for first in range(start, end, TILE):
                slot = first + tl.arange(0, TILE)
                m_slot = slot < end
                logits = key_logits(
                    q, q_parts, q_factor, q_bias, p_key_codes, p_key_scales, slot, m_slot,
                    HEAD_DIM, BITS, GROUPS, BLOCK_W,
                )  # fmt: skip
                if CAPPED:
                    logits = capped(logits, softcap)
                logits = tl.where(m_slot[None, :], logits, float("-inf"))
                weights, row_max, alpha, total = softmax_step(logits, row_max, total)
                acc = add_values(
                    acc, alpha, weights, factors, p_value_codes, p_value_scales, slot, m_slot,
                    VALUE_DIM, BITS, V_GROUPS, V_BLOCK_W,
                )  # fmt: skip
    store_partial(p_partials, i_partial, acc, row_max, total, rows, VALUE_DIM, V_BYTES)


@triton.jit
def attend_window(
    a_q, o_query, query, m_row, queries, scale, softcap,
    a_window_k, k_strides, a_window_v, v_strides, p_window, i_batch, i_head, p_partials, i_partial, rows,
    CAPPED: tl.constexpr, Q_STORAGE: tl.constexpr, STORAGE: tl.constexpr, VECTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attends to the window, whose tokens are not compressed, and stores the unfinished softmax."""
    # Load the queries [ROWS, BLOCK_D] and clear the weighted values [ROWS, BLOCK_V].
    channel = tl.arange(0, BLOCK_D)
    v_channel = tl.arange(0, BLOCK_V)
    m_channel, m_v_channel = channel < HEAD_DIM, v_channel < VALUE_DIM
    q = load_rows(a_q, o_query, m_row, channel, m_channel, Q_STORAGE, 1) * scale
    start = tl.load(p_window)
    end = tl.load(p_window + 1)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
    # Tile by tile: keys [TILE, BLOCK_D], logits [ROWS, TILE], values [TILE, BLOCK_V].
    for first in tl.range(start, end, TILE, num_stages=1):
        slot = first + tl.arange(0, TILE)
        m_slot = slot < end
        o_slot = row_offset(k_strides, i_batch, i_head, slot)
        k = load_rows(a_window_k, o_slot, m_slot, channel, m_channel, STORAGE, VECTOR)
        logits = dot_keys(q, k, STORAGE != "fp32")
        if CAPPED:
            logits = capped(logits, softcap)
        # The last slots are the queries' own tokens: a query does not see those of the queries after it.
        visible = slot[None, :] < (end - (queries - 1 - query))[:, None]
        logits = tl.where(visible & m_slot[None, :], logits, float("-inf"))
        weights, row_max, alpha, total = softmax_step(logits, row_max, total)
        o_slot = row_offset(v_strides, i_batch, i_head, slot)
        v = load_rows(a_window_v, o_slot, m_slot, v_channel, m_v_channel, STORAGE, VECTOR)
        acc = acc * alpha[:, None] + dot_values(weights, v, STORAGE != "fp32")
    store_partial(p_partials, i_partial, (acc,), row_max, total, rows, VALUE_DIM, VALUE_DIM)


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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each program attends with ROWS rows of one head to one split. The last split is the window."""
    # Sequence, head, tile of rows and split of the program.
    i_partial = tl.program_id(0)
    i_split = i_partial % splits
    i_tile = i_partial // splits % row_tiles
    i_head = (i_partial // splits // row_tiles % heads).to(tl.int64)
    i_batch = (i_partial // splits // row_tiles // heads).to(tl.int64)
    # Offsets [ROWS] of the queries: row r is query r % queries of query head r / queries of the group.
    rows = group * queries - i_tile * ROWS
    m_row = tl.arange(0, ROWS) < rows
    row = i_tile * ROWS + tl.arange(0, ROWS)
    query = row % queries
    o_query = row_offset(q_strides, i_batch, i_head * group + row // queries, query)
    # Find the segment of the split. i_split counts from the first split of segment i. It becomes negative after the
    # right segment, so that at the end it is 0 for the window alone.
    for i in tl.static_range(len(LAYOUTS)):
        count = integer(segments[i][-1]).to(tl.int32)  # splits
        if (i_split >= 0) & (i_split < count):
            p_first = int_pointer(a_first) + ((i * batch + i_batch) * heads + i_head)
            attend_blocks(
                a_q, o_query, m_row, scale, softcap, segments[i], p_first,
                i_batch, i_head, i_split, p_partials, i_partial, rows,
                LAYOUTS, i, HAS_FIRST, CAPPED, Q_STORAGE, HEAD_DIM, VALUE_DIM, TILE,
            )  # fmt: skip
        i_split -= count
    if i_split == 0:
        p_window = int_pointer(a_window) + i_batch * window_stride
        attend_window(
            a_q, o_query, query, m_row, queries, scale, softcap,
            a_window_k, k_strides, a_window_v, v_strides, p_window, i_batch, i_head, p_partials, i_partial, rows,
            CAPPED, Q_STORAGE, WINDOW_STORAGE, VECTOR, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, TILE,
        )  # fmt: skip
