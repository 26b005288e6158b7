# SPDX-License-Identifier: Apache-2.0
"""Quantisation of tokens to packed codes, and the way back. Each program takes one block of one head.

The arithmetic is that of ``csrc/kv/codec.h``, to the same bits. Tiles are [TILE, P, BLOCK_W], with an axis for the P
planes: the codes of P channels of a token, the width of a plane apart, share a byte.
"""

import triton
import triton.language as tl

from .._common import element_pointer, load, store
from .functions import LARGEST, byte_pointer, half_pointer, int_pointer, load_halves

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def half_at_most(x):
    """The largest float16 that is not above x, for |x| <= 65504; zeros are positive."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    # The bits of the next smaller float16. Those of negative numbers grow with the magnitude.
    below = tl.where(bits > 0, bits - 1, tl.where(nearest == 0.0, -0x7FFF, bits + 1)).to(tl.int16)
    result = tl.where(nearest.to(tl.float32) > x, below, bits)
    # -0x8000 is -0.
    return tl.where(result == -0x8000, 0, result).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def half_at_least(x):
    """The smallest float16 that is not below x, for |x| <= 65504; zeros are positive."""
    # Flip the sign of the result for -x, except of zero.
    opposite = half_at_most(-x).to(tl.int16, bitcast=True)
    return tl.where(opposite == 0, 0, opposite ^ -0x8000).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def clamped(x):
    """Limits x to the range of float16. NaN stays NaN."""
    return tl.where(x < -LARGEST, -LARGEST, tl.where(x > LARGEST, LARGEST, x))


@triton.jit
def steps(low, high, finite, BITS: tl.constexpr):
    """The float16 steps and minima that cover [low, high]; NaN where a group is not finite."""
    # The minimum is rounded down and the step up, so that no element is off by more than half a step.
    minimum = half_at_most(low)
    levels = tl.full(low.shape, (1 << BITS) - 1, tl.float32)
    step = half_at_least(tl.div_rn(high - minimum.to(tl.float32), levels))
    return tl.where(finite, step, float("nan")).to(tl.float16), tl.where(finite, minimum, float("nan")).to(tl.float16)


@triton.jit
def encode(y, step, minimum, BITS: tl.constexpr):
    """The nearest codes, ties to even; 0 for NaN."""
    # A step of 0 (no spread) or NaN (an invalid group) gives codes of 0.
    step = step.to(tl.float32)
    inverse = tl.where(step > 0.0, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step), 0.0)
    n = (y - minimum.to(tl.float32)) * inverse
    # Limit n to the codes. Comparisons with NaN are false, which makes it 0.
    n = tl.where(n > 0.0, n, 0.0)
    n = tl.where(n < (1 << BITS) - 1.0, n, (1 << BITS) - 1.0)
    # Adding 1.5 * 2^23 rounds n to an integer and leaves it in the low bits.
    return (n + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def is_finite(x):
    """False for infinities and NaN, which times 0 are NaN."""
    return x * 0.0 == 0.0


@triton.jit
def token_pointers(p_tokens, p_index, slot, m_slot, token_stride, channel, HAS_INDEX: tl.constexpr):
    """Pointers [TILE, P, BLOCK_W] to the tokens of slots: token index[slot], or token number slot without an index."""
    token = tl.load(p_index + slot, mask=m_slot, other=0) if HAS_INDEX else slot
    return p_tokens + (token.to(tl.int64) * token_stride)[:, None, None] + channel[None, :, :]


@triton.jit
def load_tile(
    p_tokens, p_index, first, end, token_stride, channel, m_channel,
    HAS_INDEX: tl.constexpr, STORAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Loads the tokens of the slots from ``first`` on as float32, zeros where masked. Returns the mask too."""
    slot = first + tl.arange(0, TILE)
    m_slot = slot < end
    mask = m_slot[:, None, None] & m_channel[None, :, :]
    return load(token_pointers(p_tokens, p_index, slot, m_slot, token_stride, channel, HAS_INDEX), mask, STORAGE), mask


@triton.jit
def store_codes(
    p_codes, codes, first, end, BYTES: tl.constexpr, BITS: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr
):
    """Packs codes [TILE, P, BLOCK_W] into bytes [TILE, BLOCK_W] and stores them in the slots before ``end``."""
    slot = first + tl.arange(0, TILE)
    byte = tl.arange(0, BLOCK_W)
    shift = tl.arange(0, 8 // BITS)[None, :, None] * BITS
    # The planes have disjoint bits, so adding them combines them.
    packed = tl.sum(codes << shift, 1).to(tl.uint8)
    p_bytes = p_codes + (slot.to(tl.int64) * BYTES)[:, None] + byte[None, :]
    tl.store(p_bytes, packed, mask=(slot < end)[:, None] & (byte < BYTES)[None, :])


@triton.jit
def quantize_channels(
    p_tokens, p_index, token_stride, p_codes, p_scales, start, end, block_end, channel, m_channel,
    HAS_INDEX: tl.constexpr, STORAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
    BLOCK_W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantises a block with a step and a minimum for each channel."""
    PLANES: tl.constexpr = 8 // BITS
    # First pass: the range of each channel over the tokens, [P, BLOCK_W], and whether all its values are finite.
    low = tl.full((PLANES, BLOCK_W), INFINITY, tl.float32)
    high = tl.full((PLANES, BLOCK_W), -INFINITY, tl.float32)
    finite = tl.full((PLANES, BLOCK_W), 1, tl.int32)
    for first in range(start, end, TILE):
        x, mask = load_tile(p_tokens, p_index, first, end, token_stride, channel, m_channel, HAS_INDEX, STORAGE, TILE)
        y = clamped(x)
        low = tl.minimum(low, tl.min(tl.where(mask, y, INFINITY), 0))
        high = tl.maximum(high, tl.max(tl.where(mask, y, -INFINITY), 0))
        finite = tl.minimum(finite, tl.min(is_finite(x).to(tl.int32), 0))
    # A block without tokens gets steps and minima of 0.
    if start == end:
        low = tl.zeros((PLANES, BLOCK_W), tl.float32)
        high = low
    step, minimum = steps(low, high, finite == 1, BITS)
    # The scales of a block are its HEAD_DIM steps, then its HEAD_DIM minima.
    tl.store(p_scales + channel, step, mask=m_channel)
    tl.store(p_scales + HEAD_DIM + channel, minimum, mask=m_channel)
    # Second pass, from the cache: the codes [TILE, P, BLOCK_W]. Slots of the block that hold no token get codes of 0.
    for first in range(start, block_end, TILE):
        x, mask = load_tile(p_tokens, p_index, first, end, token_stride, channel, m_channel, HAS_INDEX, STORAGE, TILE)
        codes = tl.where(mask, encode(clamped(x), step[None, :, :], minimum[None, :, :], BITS), 0)
        store_codes(p_codes, codes, first, block_end, HEAD_DIM * BITS // 8, BITS, BLOCK_W, TILE)


@triton.jit
def channel_factors(
    p_tokens, p_index, token_stride, p_channels, start, end, channel, m_channel,
    HAS_INDEX: tl.constexpr, STORAGE: tl.constexpr, PLANES: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores and returns channel factors [P, BLOCK_W]: the root of a channel's largest finite magnitude, 1 for 0."""
    most = tl.zeros((PLANES, BLOCK_W), tl.float32)
    for first in range(start, end, TILE):
        x, _ = load_tile(p_tokens, p_index, first, end, token_stride, channel, m_channel, HAS_INDEX, STORAGE, TILE)
        most = tl.maximum(most, tl.max(tl.where(is_finite(x), tl.abs(clamped(x)), 0.0), 0))
    factor = tl.sqrt_rn(most).to(tl.float16)
    factor = tl.where(factor == 0.0, 1.0, factor).to(tl.float16)
    tl.store(p_channels + channel, factor, mask=m_channel)
    return factor


@triton.jit
def quantize_tokens(
    p_tokens, p_index, token_stride, p_codes, p_scales, p_channels, start, end, block_end, channel, m_channel,
    HAS_INDEX: tl.constexpr, STORAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    SEPARABLE: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantises a block with a step and a minimum for each token and group of channels."""
    PLANES: tl.constexpr = 8 // BITS
    # First pass, only with channel factors: they depend on all tokens of the block.
    if SEPARABLE:
        factor = channel_factors(
            p_tokens, p_index, token_stride, p_channels, start, end, channel, m_channel,
            HAS_INDEX, STORAGE, PLANES, BLOCK_W, TILE,
        )  # fmt: skip
        inverse = tl.div_rn(tl.full((PLANES, BLOCK_W), 1.0, tl.float32), factor.to(tl.float32))[None, :, :]
    # Second pass: a tile of tokens has all that its steps depend on, so it is encoded at once.
    group = channel // (HEAD_DIM // GROUPS)
    for first in range(start, block_end, TILE):
        x, mask = load_tile(p_tokens, p_index, first, end, token_stride, channel, m_channel, HAS_INDEX, STORAGE, TILE)
        y = clamped(x)
        if SEPARABLE:
            y = y * inverse
        step = tl.zeros((TILE, PLANES, BLOCK_W), tl.float16)
        minimum = tl.zeros((TILE, PLANES, BLOCK_W), tl.float16)
        slot = first + tl.arange(0, TILE)
        # Group by group: its range in each token, [TILE], then its step and minimum, spread over the group's channels.
        for g in range(GROUPS):
            inside = mask & (group == g)[None, :, :]
            low = tl.min(tl.min(tl.where(inside, y, INFINITY), 2), 1)
            high = tl.max(tl.max(tl.where(inside, y, -INFINITY), 2), 1)
            finite = tl.min(tl.min((is_finite(x) | (group != g)[None, :, :]).to(tl.int32), 2), 1)
            # Slots without a token get steps and minima of 0.
            held = slot < end
            own_step, own_minimum = steps(tl.where(held, low, 0.0), tl.where(held, high, 0.0), finite == 1, BITS)
            # The scales of a token are its GROUPS steps, then its GROUPS minima.
            p_step = p_scales + slot.to(tl.int64) * (2 * GROUPS) + g
            tl.store(p_step, own_step, mask=slot < block_end)
            tl.store(p_step + GROUPS, own_minimum, mask=slot < block_end)
            step = tl.where(inside, own_step[:, None, None], step)
            minimum = tl.where(inside, own_minimum[:, None, None], minimum)
        codes = tl.where(mask, encode(y, step, minimum, BITS), 0)
        store_codes(p_codes, codes, first, block_end, HEAD_DIM * BITS // 8, BITS, BLOCK_W, TILE)


@triton.jit
def dequantize_block(
    p_tokens, p_index, token_stride, p_codes, p_scales, p_channels, start, end, channel, m_channel,
    HAS_INDEX: tl.constexpr, STORAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    SEPARABLE: tl.constexpr, BLOCK_W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Restores the tokens of a block: c * (code * step + minimum)."""
    BYTES: tl.constexpr = HEAD_DIM * BITS // 8
    byte = tl.arange(0, BLOCK_W)[None, :]
    shift = tl.arange(0, 8 // BITS)[None, :, None] * BITS
    # Channel scales and channel factors, [1, P, BLOCK_W], are loaded once for the block.
    if GROUPS == 0:
        step = load_halves(p_scales + channel, m_channel)[None, :, :]
        minimum = load_halves(p_scales + HEAD_DIM + channel, m_channel)[None, :, :]
    if SEPARABLE:
        factor = load_halves(p_channels + channel, m_channel)[None, :, :]
    for first in range(start, end, TILE):
        slot = first + tl.arange(0, TILE)
        m_slot = slot < end
        mask = m_slot[:, None, None] & m_channel[None, :, :]
        # Bytes [TILE, BLOCK_W] become codes [TILE, P, BLOCK_W].
        p_bytes = p_codes + (slot.to(tl.int64) * BYTES)[:, None] + byte
        packed = tl.load(p_bytes, mask=m_slot[:, None] & (byte < BYTES), other=0).to(tl.int32)
        n = ((packed[:, None, :] >> shift) & ((1 << BITS) - 1)).to(tl.float32)
        if GROUPS > 0:
            # Scales per token, loaded for each of their channels.
            group = channel // (HEAD_DIM // GROUPS)
            p_step = p_scales + (slot.to(tl.int64) * (2 * GROUPS))[:, None, None] + group[None, :, :]
            step = load_halves(p_step, mask)
            minimum = load_halves(p_step + GROUPS, mask)
        # The product of 8 and 11 bits is exact, so that there is one rounding, as in a fused operation.
        x = n * step + minimum
        if SEPARABLE:
            x = x * factor
        store(token_pointers(p_tokens, p_index, slot, m_slot, token_stride, channel, HAS_INDEX), x, mask, STORAGE)


ADDRESSES = ["a_tokens", "a_index", "a_codes", "a_scales", "a_channels", "a_starts", "a_counts"]
SIZES = ["heads", "blocks", "token_stride"]
SIZES += [
    f"{name}_{by}" for name in ("tokens", "index", "codes", "scales", "channels", "counts") for by in ("batch", "head")
]


@triton.jit(do_not_specialize=ADDRESSES + SIZES)
def codec_kernel(
    a_tokens: tl.int64,
    a_index: tl.int64,
    a_codes: tl.int64,
    a_scales: tl.int64,
    a_channels: tl.int64,
    a_starts: tl.int64,
    a_counts: tl.int64,
    tokens_batch: tl.int64,
    tokens_head: tl.int64,
    token_stride: tl.int64,
    index_batch: tl.int64,
    index_head: tl.int64,
    codes_batch: tl.int64,
    codes_head: tl.int64,
    scales_batch: tl.int64,
    scales_head: tl.int64,
    channels_batch: tl.int64,
    channels_head: tl.int64,
    counts_batch: tl.int64,
    counts_head: tl.int64,
    heads: tl.int32,
    blocks: tl.int32,
    QUANTIZE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    STORAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SEPARABLE: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantises or restores one block of one head in each program.

    Quantising reads tokens from memory once. Where scales or factors belong to channels, it reads them again from the
    cache. VECTOR elements of a token and ALIGNMENT bytes of its codes are aligned.
    """
    BYTES: tl.constexpr = HEAD_DIM * BITS // 8
    ELEMENT: tl.constexpr = 4 if STORAGE == "fp32" else 2
    # Programs are numbered by sequence, head and block, the block fastest.
    i_block = (tl.program_id(0) % blocks).to(tl.int64)
    i_head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    i_batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    # [P, BLOCK_W]: the channels whose codes share byte w stand in column w.
    byte = tl.arange(0, BLOCK_W)[None, :]
    channel = tl.arange(0, 8 // BITS)[:, None] * BYTES + byte
    m_channel = byte < BYTES  # [1, BLOCK_W], the same for all planes
    # Pointers to this head; scales per channel and channel factors belong to the block.
    o_tokens = i_batch * tokens_batch + i_head * tokens_head
    p_tokens = element_pointer(a_tokens, o_tokens, STORAGE, VECTOR * ELEMENT)
    # The multiplication by VECTOR proves to the compiler that tokens start at whole vectors.
    token_stride = token_stride // VECTOR * VECTOR
    p_index = int_pointer(a_index) + (i_batch * index_batch + i_head * index_head)
    p_codes = byte_pointer(a_codes + (i_batch * codes_batch + i_head * codes_head), ALIGNMENT)
    p_scales = half_pointer(a_scales) + (i_batch * scales_batch + i_head * scales_head)
    if GROUPS == 0:
        p_scales += i_block * (2 * HEAD_DIM)
    p_channels = half_pointer(a_channels) + (i_batch * channels_batch + i_head * channels_head + i_block * HEAD_DIM)
    # The block has the slots [start, block_end), of which those before `end` hold a token.
    p_start = int_pointer(a_starts) + i_block
    start = tl.load(p_start)
    end = start + tl.load(int_pointer(a_counts) + (i_batch * counts_batch + i_head * counts_head + i_block))
    block_end = tl.load(p_start + 1)
    if not QUANTIZE:
        dequantize_block(
            p_tokens, p_index, token_stride, p_codes, p_scales, p_channels, start, end, channel, m_channel,
            HAS_INDEX, STORAGE, HEAD_DIM, BITS, GROUPS, SEPARABLE, BLOCK_W, TILE,
        )  # fmt: skip
    elif GROUPS == 0:
        quantize_channels(
            p_tokens, p_index, token_stride, p_codes, p_scales, start, end, block_end, channel, m_channel,
            HAS_INDEX, STORAGE, HEAD_DIM, BITS, BLOCK_W, TILE,
        )  # fmt: skip
    else:
        quantize_tokens(
            p_tokens, p_index, token_stride, p_codes, p_scales, p_channels, start, end, block_end, channel, m_channel,
            HAS_INDEX, STORAGE, HEAD_DIM, BITS, GROUPS, SEPARABLE, BLOCK_W, TILE,
        )  # fmt: skip
