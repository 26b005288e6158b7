# SPDX-License-Identifier: Apache-2.0
"""The splits of decode attention, each an unfinished softmax that ``decode.py`` has stored, become one result."""

import triton
import triton.language as tl

from .._common import element_pointer, store
from .functions import ROWS


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
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Each program merges the splits of one query for BLOCK_V channels, in a fixed order."""
    # The query's row in the partial results of its first split, [row tiles, splits, ROWS, VALUE_DIM + 2].
    i_row = tl.program_id(0)
    i_tile = i_row // rows * row_tiles + i_row % rows // ROWS
    SIZE: tl.constexpr = VALUE_DIM + 2
    p_row = p_partials + (i_tile.to(tl.int64) * splits * ROWS + i_row % rows % ROWS) * SIZE
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_channel = channel < VALUE_DIM
    # The sink is one more logit without a value.
    sink = tl.full((), float("-inf"), tl.float32)
    if a_sinks != 0:
        sink = tl.load(a_sinks.to(tl.int64).to(tl.pointer_type(tl.float32)) + i_row // queries % query_heads)

    # First pass: the row max of all splits and the sink.
    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        p_split = p_row + split.to(tl.int64) * (ROWS * SIZE)
        largest = tl.maximum(largest, tl.load(p_split + VALUE_DIM, mask=split < splits, other=float("-inf")))
    row_max = tl.maximum(tl.max(largest), sink)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    # Second pass: scale the sums of BLOCK_S splits from their own row max to the common one, then add them: the sums of
    # weights [BLOCK_S], and the weighted values [BLOCK_S, BLOCK_V].
    totals = tl.zeros((BLOCK_S,), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        m_split = split < splits
        p_split = p_row + split.to(tl.int64) * (ROWS * SIZE)
        factor = tl.exp(tl.load(p_split + VALUE_DIM, mask=m_split, other=float("-inf")) - shift)
        totals += factor * tl.load(p_split + (VALUE_DIM + 1), mask=m_split, other=0.0)
        mask = m_split[:, None] & m_channel[None, :]
        acc += tl.sum(factor[:, None] * tl.load(p_split[:, None] + channel[None, :], mask=mask, other=0.0), 0)
    # Normalise. A row that sees nothing gives 0, and -inf as the logarithm of its sum.
    total = tl.sum(totals) + tl.exp(sink - shift)
    p_out = element_pointer(a_out, i_row.to(tl.int64) * VALUE_DIM, STORAGE, 1) + channel
    store(p_out, acc * tl.where(total == 0.0, 0.0, 1.0 / total), m_channel, STORAGE)
    if tl.program_id(1) == 0:
        tl.store(p_lse + i_row, tl.where(total == 0.0, float("-inf"), row_max + tl.log(total)))
