# SPDX-License-Identifier: Apache-2.0
"""Shared by all kernels: storage types, exact scalars, rounding, random bits, and the ticket of the last program.

Kernels name storage types "fp32", "bf16" and "fp16", and compute in float32. They load and store bfloat16 as integers,
so that the bits equal those of ``csrc/common/dtype.h``, on a GPU and in the interpreter alike.
"""

import torch
import triton
import triton.language as tl

STORAGE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Kernels compute exactly what the source says: a multiplication and an addition are not fused.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# For sums of products, whose last bits need not match another implementation.
FUSED_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def is_interpreted() -> bool:
    """True if kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def double(x):
    """Returns a float64 argument as a scalar with all its digits. Plain arithmetic would treat it as a float32."""
    return tl.full((), x, tl.float64)


@triton.jit
def load_scalar(address, default):
    """Loads the float32 at an address, or returns the default if the address is null, as float64."""
    p_value = address.to(tl.pointer_type(tl.float32))
    return tl.load(p_value, mask=address != 0, other=default).to(tl.float64)


@triton.jit
def learning_rate(lr, a_lr):
    """The learning rate stored at ``a_lr``, or ``lr`` if that address is null, as float64."""
    rate = double(lr)
    if a_lr != 0:
        rate = load_scalar(a_lr.to(tl.int64), 0.0)
    return rate


@triton.jit
def gradient_factor(direction, a_grad_scale):
    """The factor for gradients: ``direction``, which is -1 to maximise, divided by the loss scale."""
    scale = load_scalar(a_grad_scale.to(tl.int64), 1.0).to(tl.float32)
    return double(direction).to(tl.float32) * tl.div_rn(1.0, scale)


@triton.jit
def element_pointer(address, index, STORAGE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to elements of a tensor, with the hint that they are aligned to ALIGNMENT bytes.

    The hint must be given here: Triton before 3.9 drops a hint on the return value of a function.
    """
    if STORAGE == "fp32":
        p_element = (address + index * 4).to(tl.pointer_type(tl.float32))
    elif STORAGE == "fp16":
        p_element = (address + index * 2).to(tl.pointer_type(tl.float16))
    else:
        p_element = (address + index * 2).to(tl.pointer_type(tl.int16))
    return tl.multiple_of(p_element, ALIGNMENT)


@triton.jit
def tile_pointers(address, start, STORAGE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to elements [start, start + BLOCK) of a tensor. A full tile is aligned to 16 bytes."""
    return element_pointer(address, start, STORAGE, 16 if FULL else 1) + tl.arange(0, BLOCK)


@triton.jit
def row_pointers(address, first, row, stride, column, STORAGE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to a tile: rows [R, 1] of some stride, and columns [1, C] that start at a multiple of VECTOR.

    ``first`` is the offset of the first row. The rows consist of aligned vectors of VECTOR elements.
    """
    ELEMENT: tl.constexpr = 4 if STORAGE == "fp32" else 2
    # The multiplication by VECTOR proves to the compiler that rows start at whole vectors.
    return element_pointer(address, first, STORAGE, VECTOR * ELEMENT) + (row * (stride // VECTOR * VECTOR) + column)


@triton.jit
def row_mask(row, column, rows, columns, VECTOR: tl.constexpr):
    """The mask of such a tile."""
    # The multiplication by VECTOR proves to the compiler that the mask cuts no vector.
    return (row < rows) & (column < columns // VECTOR * VECTOR)


@triton.jit
def load(p_tile, mask, STORAGE: tl.constexpr):
    """Elements as float32; zeros where masked. ``mask`` may be None."""
    if mask is None:
        x = tl.load(p_tile)
    else:
        x = tl.load(p_tile, mask=mask, other=0)
    if STORAGE == "bf16":
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def store(p_tile, x, mask, STORAGE: tl.constexpr):
    """Stores float32 values, rounded to nearest, ties to even."""
    if STORAGE == "bf16":
        tl.store(p_tile, bfloat16_bits(x), mask=mask)
    elif STORAGE == "fp16":
        tl.store(p_tile, x.to(tl.float16), mask=mask)
    else:
        tl.store(p_tile, x, mask=mask)


@triton.jit
def bfloat16_bits(x):
    """The upper half of a float32 rounded to nearest, ties to even; every NaN becomes the quiet one."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def bfloat16_bits_stochastic(x, random):
    """Rounds up with probability equal to the discarded fraction: ``random`` holds 16 uniform bits.

    Infinities and NaNs stay what they are, and no finite value is carried into infinity.
    """
    bits = x.to(tl.uint32, bitcast=True)
    up = bits + random
    finite = tl.where((up & 0x7F800000) == 0x7F800000, bits, up) >> 16
    return tl.where((bits & 0x7F800000) == 0x7F800000, bfloat16_bits(x), finite.to(tl.int16))


@triton.jit
def random_halves(seed, low, high, start, BLOCK: tl.constexpr):
    """16 random bits for each of the BLOCK elements from ``start``, a multiple of 8.

    Element i uses half i % 2 of word (i % 8) / 2 of the Philox4x32-10 block with the counter (i / 8, low, high).
    """
    counter = start // 8 + tl.arange(0, BLOCK // 8)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.uint64), c0, c1, zero + low.to(tl.uint32), zero + high.to(tl.uint32))
    # [BLOCK / 8, 2, 2]: join() adds a last axis, so the axes are the Philox block and bits 1 and 0 of the word's index.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit
def random_halves_anywhere(seed, low, high, start, BLOCK: tl.constexpr):
    """``random_halves`` from any ``start``: each element computes its Philox block."""
    i = start + tl.arange(0, BLOCK)
    counter = i // 8
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.uint64), c0, c1, zero + low.to(tl.uint32), zero + high.to(tl.uint32))
    lane = i % 8
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def maximum(a, b):
    """The larger of ``a`` and ``b``; NaN if either is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def one_plus_exp_negative(a):
    """1 + exp(-a) for a >= 0, with the polynomial of ``csrc/common/math.h`` and the same bits."""
    # exp(-a) = 2^x = 2^i 2^f. Adding 1.5 * 2^23 rounds x to the integer i and leaves i in the low bits.
    x = tl.where(a > 87.0, 87.0, a) * -1.44269504
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    e = f * 1.32695212e-3 + 9.67129134e-3
    e = e * f + 5.55071086e-2
    e = e * f + 2.40222469e-1
    e = e * f + 6.93147004e-1
    e = e * f + 1.0
    power = (shifted.to(tl.uint32, bitcast=True) << 23) + 0x3F800000
    return 1.0 + e * power.to(tl.float32, bitcast=True)


@triton.jit
def is_last_program(p_ticket, count):
    """True in the last of ``count`` programs that draw this ticket, which is then zero again.

    A barrier keeps a program from drawing before all its threads have finished their loads and stores. The last program
    can therefore read what the others stored, provided that its loads are volatile.
    """
    tl.debug_barrier()
    last = tl.atomic_add(p_ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(p_ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def square(x, mask):
    """Squares in float64, in which no float32 overflows; zeros where masked."""
    x = x.to(tl.float64)
    if mask is None:
        return x * x
    else:
        return tl.where(mask, x * x, 0.0)


@triton.jit
def sum_partials(p_first, count, BLOCK: tl.constexpr):
    """Adds one column of partial sums [count, 2] in float64, in an order that depends on ``count`` alone."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(p_first + i * 2, mask=i < count, other=0.0, volatile=True)
    return tl.sum(total)
