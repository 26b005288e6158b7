# SPDX-License-Identifier: Apache-2.0
"""Conversions and random numbers against NumPy and Python integers. csrc/tests/common_test.cpp tries more values."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from .arrays import decode, encode

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def floats() -> np.ndarray:
    """Random bit patterns, and the boundaries of float16: overflow, normal, subnormal, and ties on both sides."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    edges = np.float32([0.0, 65504.0, 65519.99, 65520.0, np.inf, 1.0 + 2.0**-11, 1.0 + 3.0 * 2.0**-11])
    edges = np.append(edges, np.float32([2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24]))
    both = np.concatenate([bits.view(np.float32), edges, -edges])
    return both[~np.isnan(both)]


def test_float16(core: ModuleType) -> None:
    np.testing.assert_array_equal(core.float16_to_float(ALL_16_BITS), ALL_16_BITS.view(np.float16).astype(np.float32))
    x = floats()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(core.float_to_float16(x), x.astype(np.float16).view(np.uint16))


def test_bfloat16(core: ModuleType) -> None:
    np.testing.assert_array_equal(core.bfloat16_to_float(ALL_16_BITS), decode(ALL_16_BITS).astype(np.float32))
    x = floats()
    np.testing.assert_array_equal(core.float_to_bfloat16(x), encode(x, "bfloat16"))


def test_nan_stays_nan(core: ModuleType) -> None:
    nan = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFC00000]).view(np.float32)
    assert np.isnan(decode(core.float_to_bfloat16(nan))).all()
    assert np.isnan(decode(core.float_to_bfloat16_stochastic(nan, np.uint32(0xFFFF)))).all()
    assert np.isnan(core.float_to_float16(nan).view(np.float16)).all()


def philox(key: int, counter: int) -> list[int]:
    """Philox4x32-10 from its definition (Salmon et al., SC 2011, section 3.4), in Python integers."""
    mask = (1 << 32) - 1
    c = [counter >> 32 * i & mask for i in range(4)]
    k = [key & mask, key >> 32]
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k[0], product1 & mask, product0 >> 32 ^ c[3] ^ k[1], product0 & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return c


def test_philox(core: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        key, low, high = (int(x) for x in rng.integers(0, 1 << 64, 3, dtype=np.uint64))
        assert core.philox4x32(key, low, high) == philox(key, high << 64 | low)
