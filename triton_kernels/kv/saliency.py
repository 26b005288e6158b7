# SPDX-License-Identifier: Apache-2.0
"""How much attention tokens get from probes: the logarithms of the probes' sums, then the columns' sums.

Rows are the probes of a head's query heads, one query head after another. No probability outlives a tile.
"""

import triton
import triton.language as tl

from .functions import capped, load_rows

INTEGERS = ["q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "mask_stride"]
INTEGERS += ["heads", "rows", "probes", "length"]
SCALARS = ["a_q", "a_k", "a_positions", "a_mask", "a_lse", *INTEGERS, "scale", "softcap"]


@triton.jit
def load_mask(a_mask, i_batch, mask_stride, token, m_token, HAS_MASK: tl.constexpr):
    """Which of the tokens are no padding."""
    if HAS_MASK:
        p_mask = a_mask.to(tl.int64).to(tl.pointer_type(tl.int8)) + (i_batch * mask_stride + token)
        return m_token & (tl.load(p_mask, mask=m_token, other=0) != 0)
    else:
        return m_token


@triton.jit
def load_probes(
    a_q, q_batch, q_head, q_token, a_positions, a_mask, mask_stride, i_batch, i_head, row, rows, probes, length,
    HAS_MASK: tl.constexpr, STORAGE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries of rows, and how many tokens each sees, those that are padding included."""
    m_row = row < rows
    probe = row % probes
    head = i_head * (rows // probes) + row // probes
    o_row = i_batch * q_batch + head * q_head + probe.to(tl.int64) * q_token
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(a_q, o_row, m_row, channel, channel < WIDTH, STORAGE, VECTOR)
    position = tl.load(a_positions.to(tl.int64).to(tl.pointer_type(tl.int64)) + probe, mask=m_row, other=-1)
    own = load_mask(a_mask, i_batch, mask_stride, position, m_row & (position >= 0) & (position < length), HAS_MASK)
    return q, tl.where(own, position + 1, 0)


@triton.jit
def load_keys(
    a_k, k_batch, k_head, k_token, a_mask, mask_stride, i_batch, i_head, token, length,
    HAS_MASK: tl.constexpr, STORAGE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys of tokens, and which of them are no padding."""
    m_token = token < length
    channel = tl.arange(0, BLOCK_D)
    o_row = i_batch * k_batch + i_head * k_head + token * k_token
    k = load_rows(a_k, o_row, m_token, channel, channel < WIDTH, STORAGE, VECTOR)
    return k, load_mask(a_mask, i_batch, mask_stride, token, m_token, HAS_MASK)


@triton.jit
def logits_of(q, k, visible, token, held, scale, softcap, CAPPED: tl.constexpr, ARE_HALVES: tl.constexpr):
    """Of rows and tokens; -inf where a row does not see one. tf32 holds every 16-bit number."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32" if ARE_HALVES else "tf32x3") * scale
    if CAPPED:
        logits = capped(logits, softcap)
    return tl.where((token[None, :] < visible[:, None]) & held[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=SCALARS)
def log_sums_kernel(
    a_q: tl.int64,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_token: tl.int64,
    a_k: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_token: tl.int64,
    a_positions: tl.int64,
    a_mask: tl.int64,
    mask_stride: tl.int64,
    p_lse,
    heads: tl.int32,
    rows: tl.int32,
    probes: tl.int32,
    length: tl.int64,
    scale: tl.float32,
    softcap: tl.float32,
    HAS_MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    Q_STORAGE: tl.constexpr,
    STORAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program has BLOCK_R rows of a head and reads the keys that one of them sees. VECTOR channels are aligned."""
    ARE_HALVES: tl.constexpr = (Q_STORAGE != "fp32") and (STORAGE != "fp32")
    tiles = (rows + BLOCK_R - 1) // BLOCK_R
    i_head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    i_batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    q, visible = load_probes(
        a_q, q_batch, q_head, q_token, a_positions, a_mask, mask_stride, i_batch, i_head, row, rows, probes, length,
        HAS_MASK, Q_STORAGE, WIDTH, VECTOR, BLOCK_D,
    )  # fmt: skip
    most = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, tl.max(visible), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T).to(tl.int64)
        k, held = load_keys(
            a_k, k_batch, k_head, k_token, a_mask, mask_stride, i_batch, i_head, token, length,
            HAS_MASK, STORAGE, WIDTH, VECTOR, BLOCK_D,
        )  # fmt: skip
        logits = logits_of(q, k, visible, token, held, scale, softcap, CAPPED, ARE_HALVES)
        now = tl.maximum(most, tl.max(logits, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        most = now
    lse = tl.where(total == 0.0, float("-inf"), most + tl.log(total))
    tl.store(p_lse + ((i_batch * heads + i_head) * rows + row), lse, mask=row < rows)


@triton.jit(do_not_specialize=SCALARS)
def column_sums_kernel(
    a_q: tl.int64,
    q_batch: tl.int64,
    q_head: tl.int64,
    q_token: tl.int64,
    a_k: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_token: tl.int64,
    a_positions: tl.int64,
    a_mask: tl.int64,
    mask_stride: tl.int64,
    p_lse,
    heads: tl.int32,
    rows: tl.int32,
    probes: tl.int32,
    length: tl.int64,
    scale: tl.float32,
    softcap: tl.float32,
    p_sums,
    HAS_MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    Q_STORAGE: tl.constexpr,
    STORAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program has BLOCK_T tokens of a head and meets its rows in their order."""
    ARE_HALVES: tl.constexpr = (Q_STORAGE != "fp32") and (STORAGE != "fp32")
    tiles = (length + BLOCK_T - 1) // BLOCK_T
    i_head = tl.program_id(0) // tiles % heads
    i_batch = tl.program_id(0) // tiles // heads
    first = tl.program_id(0) % tiles * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    k, held = load_keys(
        a_k, k_batch, k_head, k_token, a_mask, mask_stride, i_batch, i_head, token, length,
        HAS_MASK, STORAGE, WIDTH, VECTOR, BLOCK_D,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_T,), tl.float32)
    for first_row in range(0, rows, BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        q, visible = load_probes(
            a_q, q_batch, q_head, q_token, a_positions, a_mask, mask_stride, i_batch, i_head, row, rows, probes,
            length, HAS_MASK, Q_STORAGE, WIDTH, VECTOR, BLOCK_D,
        )  # fmt: skip
        if tl.max(visible) > first:
            p_row = p_lse + ((i_batch * heads + i_head) * rows + row)
            lse = tl.load(p_row, mask=row < rows, other=float("-inf"))
            logits = logits_of(q, k, visible, token, held, scale, softcap, CAPPED, ARE_HALVES)
            seen = (lse != float("-inf"))[:, None]
            sums += tl.sum(tl.where(seen, tl.exp(logits - lse[:, None]), 0.0), 0)
    tl.store(p_sums + ((i_batch * heads + i_head) * length + token), sums, mask=token < length)
