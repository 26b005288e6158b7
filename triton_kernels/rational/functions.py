# SPDX-License-Identifier: Apache-2.0
"""Rational activations on a tile in registers: the function, its coefficients and its random numbers.

The mathematics is that of ``csrc/rational/rational.h``. Products are fused with additions only where the code says
``fma``.
"""

import triton
import triton.language as tl

from .._common import element_pointer, load

A, B, C, D = (tl.constexpr(form) for form in range(4))
_NUMERATOR, _DENOMINATOR = tl.constexpr(1), tl.constexpr(2)  # streams of random numbers; dropout uses 0


@triton.jit
def polynomial(c, x):
    """c[0] + c[1] x + ..., of degree one or more, and its derivative, both by Horner's rule."""
    DEGREE: tl.constexpr = len(c) - 1
    slope = c[DEGREE]
    value = tl.fma(x, slope, c[DEGREE - 1])
    for k in tl.static_range(2, DEGREE + 1):
        slope = tl.fma(slope, x, value)
        value = tl.fma(value, x, c[DEGREE - k])
    return value, slope


@triton.jit
def inner_polynomial(b, x, FORM: tl.constexpr):
    """The polynomial inside the denominator's absolute value (form A: the denominator itself), and its derivative."""
    if FORM == A:
        return polynomial(b, tl.abs(x))
    else:
        return polynomial(b, x)


@triton.jit
def denominator_of(inside, FORM: tl.constexpr):
    if FORM == A:
        return inside
    elif FORM == C:
        return tl.abs(inside) + 0.1
    else:
        return tl.abs(inside) + 1.0


@triton.jit
def read_coefficients(address, first, COUNT: tl.constexpr, STORAGE: tl.constexpr):
    """A tuple of COUNT float32 scalars."""
    c = ()
    for k in tl.static_range(COUNT):
        c = c + (load(element_pointer(address, first + k, STORAGE, 1), None, STORAGE),)
    return c


@triton.jit
def read_denominator(address, first, COUNT: tl.constexpr, FORM: tl.constexpr, STORAGE: tl.constexpr):
    """Coefficients b from the constant up. Only form C stores the constant; form A takes absolute values."""
    b = read_coefficients(address, first, COUNT, STORAGE)
    if FORM == C:
        return b
    elif FORM == A:
        absolute = (tl.full((), 1.0, tl.float32),)
        for k in tl.static_range(COUNT):
            absolute = absolute + (tl.abs(b[k]),)
        return absolute
    else:
        return (tl.full((), 0.0, tl.float32),) + b


@triton.jit
def random_words(seed, counter, stream):
    """The Philox4x32-10 blocks with the counters (counter, stream)."""
    c0 = counter.to(tl.uint32)
    zero = tl.zeros_like(c0)
    return tl.philox(seed, c0, (counter >> 32).to(tl.uint32), zero + stream, zero)


@triton.jit
def noise(seed, element, stream, COUNT: tl.constexpr):
    """COUNT factors in [0.9, 1.1) for every element, each from 16 random bits."""
    words = random_words(seed, element, stream)
    factors = ()
    for k in tl.static_range(COUNT):
        half = (words[k // 2] >> (16 * (k % 2))) & 0xFFFF
        factors = factors + (0.9 + half.to(tl.float32) * (0.2 / 65536.0),)
    return factors


@triton.jit
def draw_noise(seed, element, COUNT_A: tl.constexpr, COUNT_B: tl.constexpr):
    """Factors for a and for b. The constant of b has the factor 1."""
    one = (tl.full((), 1.0, tl.float32),)
    return noise(seed, element, _NUMERATOR, COUNT_A), one + noise(seed, element, _DENOMINATOR, COUNT_B - 1)


@triton.jit
def multiply(c, factors):
    products = ()
    for k in tl.static_range(len(c)):
        products = products + (c[k] * factors[k],)
    return products


@triton.jit
def are_kept(seed, first, threshold, DROPOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mask of elements of a tile that dropout keeps. ``first`` [BLOCK_R, 1]: the index of each row's first element.

    One Philox block serves eight elements. DROPOUT is "blocks" if tiles consist of whole blocks, and "elements" if each
    element must compute the block that it lies in.
    """
    # Element i uses half i % 2 of word (i % 8) / 2.
    if DROPOUT == "blocks":
        w0, w1, w2, w3 = random_words(seed, first // 8 + tl.arange(0, BLOCK_C // 8)[None, :], 0)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        half = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_R, BLOCK_C))
    else:
        element = first + tl.arange(0, BLOCK_C)[None, :]
        w0, w1, w2, w3 = random_words(seed, element // 8, 0)
        low = tl.where(element & 2 != 0, w1, w0)
        high = tl.where(element & 2 != 0, w3, w2)
        word = tl.where(element & 4 != 0, high, low)
        half = tl.where(element & 1 != 0, word >> 16, word & 0xFFFF)
    return half.to(tl.int32) >= threshold


@triton.jit
def add_powers(sums, weight, x):
    """Adds weight * x^k to sum k."""
    new = (sums[0] + weight,)
    power = x
    for k in tl.static_range(1, len(sums)):
        new = new + (tl.fma(weight, power, sums[k]),)
        power = power * x
    return new


@triton.jit
def add_noisy_powers(sums, weight, x, factors):
    """Adds weight * x^k * factor k to sum k."""
    new = ()
    for k in tl.static_range(len(sums)):
        new = new + (tl.fma(weight, factors[k], sums[k]),)
        weight = weight * x
    return new
