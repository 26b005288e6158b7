# SPDX-License-Identifier: Apache-2.0
"""What kernels share: storage types, exact scalars, rounding, random bits, and the ticket that finds the last program.

Storage types go by name ("fp32", "bf16", "fp16") and arithmetic is float32. bfloat16 is read and written as integers:
the bits are then the ones that ``csrc/common/dtype.h`` gives, on a GPU and in the interpreter alike.
"""

import torch
import triton
import triton.language as tl

STORAGE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Kernels compute what the source says: with these options a multiplication and an addition stay two roundings.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Sums of products, whose last bits no other implementation shares.
FUSED_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def double(x):
    """A float64 scalar with all digits of a float64 argument, which arithmetic would otherwise take for a float32."""
    return tl.full((), x, tl.float64)


@triton.jit
def load_scalar(address, default):
    """The float32 at an address, or the default where the address is null, as float64."""
    p_value = address.to(tl.pointer_type(tl.float32))
    return tl.load(p_value, mask=address != 0, other=default).to(tl.float64)


@triton.jit
def learning_rate(lr, a_lr):
    """That at an address, or ``lr`` where the address is null; float64."""
    rate = double(lr)
    if a_lr != 0:
        rate = load_scalar(a_lr.to(tl.int64), 0.0)
    return rate


@triton.jit
def gradient_factor(direction, a_grad_scale):
    """What gradients are multiplied by: ``direction``, which is -1 to maximize, over the loss scale."""
    scale = load_scalar(a_grad_scale.to(tl.int64), 1.0).to(tl.float32)
    return double(direction).to(tl.float32) * tl.div_rn(1.0, scale)


@triton.jit
def element_pointer(address, index, STORAGE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointers to elements of a tensor, known to be aligned to so many bytes.

    The hint stands here: Triton before 3.9 forgets one that is given to what a function returned.
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
    """Pointers to elements [start, start + BLOCK) of a tensor, aligned to 16 bytes where the tile is full."""
    return element_pointer(address, start, STORAGE, 16 if FULL else 1) + tl.arange(0, BLOCK)


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
    """16 random bits for each of BLOCK elements from ``start`` on, a multiple of 8.

    Element i has half i % 2 of word (i % 8) / 2 of the Philox4x32-10 block with the counter (i / 8, low, high).
    """
    counter = start // 8 + tl.arange(0, BLOCK // 8)
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.uint64), c0, c1, zero + low.to(tl.uint32), zero + high.to(tl.uint32))
    # join() adds a last dimension: the axes of `words` are the block, bit 1 and bit 0 of the word's number.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit
def sign(x):
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def maximum(a, b):
    """The larger one, or ``a`` where it is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def one_plus_exp_negative(a):
    """1 + exp(-a) for a >= 0, by the polynomial of ``csrc/common/math.h``, to the same bits."""
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

    All threads of a program are past their loads and stores when it draws. What a program stored before, the last one
    can load, if it loads volatile.
    """
    tl.debug_barrier()
    last = tl.atomic_add(p_ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(p_ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def square(x, mask):
    """Squares in float64, where no float32 overflows; zero where masked."""
    x = x.to(tl.float64)
    if mask is None:
        return x * x
    else:
        return tl.where(mask, x * x, 0.0)


@triton.jit
def sum_partials(p_first, count, BLOCK: tl.constexpr):
    """Sum of every second of 2 * count float64 values, in an order that depends on ``count`` alone."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(p_first + i * 2, mask=i < count, other=0.0, volatile=True)
    return tl.sum(total)
