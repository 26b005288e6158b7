# SPDX-License-Identifier: Apache-2.0
"""Shared by the kernels of the KV cache: packed codes, plane by plane, and float32 products on 16-bit tensor cores.

The D channels of a row form P = 8 / bits planes of W = D / P channels: byte w holds the codes of channels p * W + w of
all planes p. A row in registers is a tuple of P tiles, one for each plane. They are BLOCK_W wide, which is W rounded up
to a power of two.
"""

import triton
import triton.language as tl

from .._common import element_pointer, load

LARGEST = tl.constexpr(65504.0)  # of float16
ROWS = tl.constexpr(8)  # of queries in a program; in two float16 parts they fill the 16 rows of a tensor core's tile


@triton.jit
def integer(packed):
    """Unpacks what ``arguments.unspecialized`` packed."""
    return (packed.to(tl.int64) & 0x3FFFFFFFFFFFFFFF) >> 1


@triton.jit
def int_pointer(address):
    return address.to(tl.int64).to(tl.pointer_type(tl.int32))


@triton.jit
def half_pointer(address):
    return element_pointer(address.to(tl.int64), 0, "fp16", 2)


@triton.jit
def byte_pointer(address, ALIGNMENT: tl.constexpr):
    """The hint must be given here: Triton before 3.9 drops a hint on the return value of a function."""
    return tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(tl.uint8)), ALIGNMENT)


@triton.jit
def load_halves(p_first, mask):
    return tl.load(p_first, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(address, o_row, m_row, channel, m_channel, STORAGE: tl.constexpr, VECTOR: tl.constexpr):
    """A tile [rows, channels] in float32, zeros where masked. Rows consist of aligned vectors of VECTOR elements."""
    ELEMENT: tl.constexpr = 4 if STORAGE == "fp32" else 2
    # The multiplication by VECTOR proves to the compiler that rows start at whole vectors.
    o_tile = (o_row // VECTOR * VECTOR)[:, None] + channel[None, :]
    p_tile = element_pointer(address, 0, STORAGE, VECTOR * ELEMENT) + o_tile
    return load(p_tile, m_row[:, None] & m_channel[None, :], STORAGE)


@triton.jit
def load_bytes(p_codes, slot, m_slot, BYTES: tl.constexpr, BLOCK_W: tl.constexpr):
    """Packed codes of a tile of slots, [TILE, BLOCK_W], zeros where masked."""
    byte = tl.arange(0, BLOCK_W)[None, :]
    mask = m_slot[:, None] & (byte < BYTES)
    return tl.load(p_codes + (slot[:, None].to(tl.int64) * BYTES + byte), mask=mask, other=0)


@triton.jit
def raised_codes(packed, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Codes of one plane times 2^(BITS * PLANE), exact in float16. The bits keep their place in the byte.

    The last bit of the mantissa counts 1 in float16 numbers from 1024 to 2047. So codes are put into the mantissa of
    1024 (0x6400), and 1024 is subtracted.
    """
    bits = packed.to(tl.int16)
    if BITS < 8:
        bits = bits & (((1 << BITS) - 1) << (PLANE * BITS))
    return (bits | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def unit_of(largest):
    """A power of two that scales magnitudes up to ``largest`` to less than 2^15, and its inverse."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    # These limits keep the unit and its inverse normal numbers, with room for the factors 2^(-BITS * p).
    exponent = tl.minimum(tl.maximum(exponent, 27), 253)
    unit = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return unit, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def high_and_low(x):
    """Splits x into the nearest float16 and the one nearest to the remainder: 22 bits, or an error of 2^-25."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def two_parts(x):
    """Splits rows [ROWS, N] of float32 into [2 * ROWS, N] of float16, the high parts before the low parts."""
    high, low = high_and_low(x)
    N: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), (2 * ROWS, N))


@triton.jit
def sum_parts(product):
    """Adds the products of the high parts and of the low parts: [2 * ROWS, N] to [ROWS, N]."""
    N: tl.constexpr = product.shape[1]
    return tl.sum(tl.reshape(product, (2, ROWS, N)), 0)


@triton.jit
def in_two_parts(planes, BITS: tl.constexpr):
    """Splits rows of float32 into two parts, [2 * ROWS, N] for each plane. Also returns the factor [ROWS] of products.

    The parts are scaled by a power of two for each row, and by 2^(-BITS * p) for plane p, which raised codes undo. The
    error is at most 2^-22 of an element, or 2^-33 of the largest of its row.
    """
    largest = tl.max(tl.abs(planes[0]), 1)
    for p in tl.static_range(1, len(planes)):
        largest = tl.maximum(largest, tl.max(tl.abs(planes[p]), 1))
    unit, factor = unit_of(largest)
    parts = ()
    for p in tl.static_range(len(planes)):
        parts = parts + (two_parts(planes[p] * (unit * 2.0 ** (-BITS * p))[:, None]),)
    return parts, factor


@triton.jit
def token_parts(tokens):
    """Splits tokens [TILE, N] of float32 into high and low parts, and returns the factor [TILE] of their products.

    Each token is scaled by a power of two of its own. So a token that a query does not see cannot change the bits of
    the others.
    """
    unit, factor = unit_of(tl.max(tl.abs(tokens), 1))
    high, low = high_and_low(tokens * unit[:, None])
    return high, low, factor


@triton.jit
def dot_keys(q, k, ARE_HALVES: tl.constexpr):
    """q [ROWS, N] times k [TILE, N] transposed, both float32. The high part is enough for k stored in 16 bits."""
    parts, q_factor = in_two_parts((q,), 8)
    high, low, factor = token_parts(k)
    product = tl.dot(parts[0], tl.trans(high))
    if not ARE_HALVES:
        product = tl.dot(parts[0], tl.trans(low), product)
    return sum_parts(product) * q_factor[:, None] * factor[None, :]


@triton.jit
def dot_values(weights, v, ARE_HALVES: tl.constexpr):
    """weights [ROWS, TILE] times v [TILE, N], both float32. The high part is enough for v stored in 16 bits."""
    high, low, factor = token_parts(v)
    # The sum runs over tokens, so their factors must go into the weights.
    parts, weights_factor = in_two_parts((weights * factor[None, :],), 8)
    product = tl.dot(parts[0], high)
    if not ARE_HALVES:
        product = tl.dot(parts[0], low, product)
    return sum_parts(product) * weights_factor[:, None]


@triton.jit
def tanh(x):
    """tanh to within 2 ulp, if exp is as good: by its series where 1 - exp(-2x) would cancel."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    s = x * x
    series = s * -8.8632355e-3 + 2.1869488e-2
    series = series * s - 5.3968254e-2
    series = series * s + 1.3333334e-1
    series = series * s - 3.3333334e-1
    y = tl.where(a < 0.3, a + a * (s * series), large)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def capped(logits, softcap):
    return softcap * tanh(logits / softcap)


@triton.jit
def softmax_step(logits, row_max, total):
    """Online softmax: logits [rows, tokens] become weights exp(logit - row max).

    Returns the weights, the new row max, the factor of what was summed before, and the new sum of weights.
    """
    now = tl.maximum(row_max, tl.max(logits, 1))
    # A row that has seen no token subtracts 0, which avoids -inf - -inf.
    shift = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp(logits - shift[:, None])
    alpha = tl.exp(row_max - shift)
    return p, now, alpha, total * alpha + tl.sum(p, 1)
