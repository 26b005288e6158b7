# SPDX-License-Identifier: Apache-2.0
"""The attention that tokens receive from probes, in two passes over the keys.

The first pass computes the log-sum of each row, which is the logarithm of the sum of exp of its logits; the second adds
the probabilities of each column. Rows are the probes of all query heads that share a head of keys, one query head after
another. Both passes compute the logits tile by tile and store none.
"""

import triton
import triton.language as tl

from .functions import capped, load_rows, softmax_step

INTEGERS = ["q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "mask_stride"]
INTEGERS += ["heads", "rows", "probes", "length"]
SCALARS = ["a_q", "a_k", "a_positions", "a_mask", "a_lse", *INTEGERS, "scale", "softcap"]


@triton.jit
def load_mask(a_mask, i_batch, mask_stride, token, m_token, HAS_MASK: tl.constexpr):
    """The mask of tokens that are not padding."""
    if HAS_MASK:
        p_mask = a_mask.to(tl.int64).to(tl.pointer_type(tl.int8)) + (i_batch * mask_stride + token)
        return m_token & (tl.load(p_mask, mask=m_token, other=0) != 0)
    else:
        return m_token


@triton.jit
def load_probes(
    a_q, q_batch, q_head, q_token, a_positions, a_mask, mask_stride, i_batch, i_head, row, rows, probes, length,
    HAS_MASK: tl.constexpr, STORAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries of rows, [BLOCK_R, BLOCK_D], and how many tokens each row sees, padding included, [BLOCK_R]."""
    # Row r is probe r % probes of query head r / probes of the group.
    m_row = row < rows
    probe = row % probes
    head = i_head * (rows // probes) + row // probes
    o_row = i_batch * q_batch + head * q_head + probe.to(tl.int64) * q_token
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(a_q, o_row, m_row, channel, channel < HEAD_DIM, STORAGE, VECTOR)
    # A probe sees the tokens up to its own, and none if its own is padding.
    position = tl.load(a_positions.to(tl.int64).to(tl.pointer_type(tl.int64)) + probe, mask=m_row, other=-1)
    own = load_mask(a_mask, i_batch, mask_stride, position, m_row & (position >= 0) & (position < length), HAS_MASK)
    return q, tl.where(own, position + 1, 0)


@triton.jit
def load_keys(
    a_k, k_batch, k_head, k_token, a_mask, mask_stride, i_batch, i_head, token, length,
    HAS_MASK: tl.constexpr, STORAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The keys of tokens, [BLOCK_T, BLOCK_D], and the mask of those that are not padding, [BLOCK_T]."""
    m_token = token < length
    channel = tl.arange(0, BLOCK_D)
    o_row = i_batch * k_batch + i_head * k_head + token * k_token
    k = load_rows(a_k, o_row, m_token, channel, channel < HEAD_DIM, STORAGE, VECTOR)
    return k, load_mask(a_mask, i_batch, mask_stride, token, m_token, HAS_MASK)


@triton.jit
def logits_of(q, k, visible, token, held, scale, softcap, CAPPED: tl.constexpr, ARE_HALVES: tl.constexpr):
    """Logits [BLOCK_R, BLOCK_T], -inf where a row does not see a token."""
    # tf32 represents every 16-bit number exactly; float32 takes three products of tf32 parts.
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
    HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Each program computes the log-sums of BLOCK_R rows of one head. VECTOR channels are aligned."""
    ARE_HALVES: tl.constexpr = (Q_STORAGE != "fp32") and (STORAGE != "fp32")
    # Sequence, head and tile of rows of the program.
    tiles = (rows + BLOCK_R - 1) // BLOCK_R
    i_head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    i_batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    # The queries [BLOCK_R, BLOCK_D] stay in registers.
    row = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    q, visible = load_probes(
        a_q, q_batch, q_head, q_token, a_positions, a_mask, mask_stride, i_batch, i_head, row, rows, probes, length,
        HAS_MASK, Q_STORAGE, HEAD_DIM, VECTOR, BLOCK_D,
    )  # fmt: skip
    row_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    # Online softmax over tiles of BLOCK_T keys, up to the last that one of the rows sees.
    for first in range(0, tl.max(visible), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T).to(tl.int64)
        k, held = load_keys(
            a_k, k_batch, k_head, k_token, a_mask, mask_stride, i_batch, i_head, token, length,
            HAS_MASK, STORAGE, HEAD_DIM, VECTOR, BLOCK_D,
        )  # fmt: skip
        logits = logits_of(q, k, visible, token, held, scale, softcap, CAPPED, ARE_HALVES)
        # The sum [BLOCK_R] goes on with the weights of this tile [BLOCK_R, BLOCK_T].
        _, row_max, _, total = softmax_step(logits, row_max, total)
    # A row that sees nothing gets -inf.
    lse = tl.where(total == 0.0, float("-inf"), row_max + tl.log(total))
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
    HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Each program adds up the probabilities of BLOCK_T tokens of one head, in the order of the rows."""
    ARE_HALVES: tl.constexpr = (Q_STORAGE != "fp32") and (STORAGE != "fp32")
    # Sequence, head and tile of tokens of the program.
    tiles = (length + BLOCK_T - 1) // BLOCK_T
    i_head = tl.program_id(0) // tiles % heads
    i_batch = tl.program_id(0) // tiles // heads
    # The keys [BLOCK_T, BLOCK_D] stay in registers.
    first = tl.program_id(0) % tiles * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)
    k, held = load_keys(
        a_k, k_batch, k_head, k_token, a_mask, mask_stride, i_batch, i_head, token, length,
        HAS_MASK, STORAGE, HEAD_DIM, VECTOR, BLOCK_D,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_T,), tl.float32)
    # Tile by tile of BLOCK_R rows. A tile whose rows all end before these tokens is skipped.
    for first_row in range(0, rows, BLOCK_R):
        row = first_row + tl.arange(0, BLOCK_R)
        q, visible = load_probes(
            a_q, q_batch, q_head, q_token, a_positions, a_mask, mask_stride, i_batch, i_head, row, rows, probes,
            length, HAS_MASK, Q_STORAGE, HEAD_DIM, VECTOR, BLOCK_D,
        )  # fmt: skip
        if tl.max(visible) > first:
            # Probabilities exp(logit - lse), [BLOCK_R, BLOCK_T]. A row that sees nothing has lse -inf and adds nothing.
            p_row = p_lse + ((i_batch * heads + i_head) * rows + row)
            lse = tl.load(p_row, mask=row < rows, other=float("-inf"))
            logits = logits_of(q, k, visible, token, held, scale, softcap, CAPPED, ARE_HALVES)
            seen = (lse != float("-inf"))[:, None]
            sums += tl.sum(tl.where(seen, tl.exp(logits - lse[:, None]), 0.0), 0)
    tl.store(p_sums + ((i_batch * heads + i_head) * length + token), sums, mask=token < length)
