# SPDX-License-Identifier: Apache-2.0
"""Arrays as tensors are stored: bfloat16 is uint16 here, since NumPy has none."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.generic]
DTYPES = ["float32", "bfloat16", "float16"]


def encode(values: ArrayLike, dtype: str) -> Array:
    """Rounds to the nearest, ties to even."""
    single = np.asarray(values, np.float32)
    if dtype != "bfloat16":
        return single.astype(dtype)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16)


def decode(array: Array) -> NDArray[np.float64]:
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs become quiet ones
        return array.astype(np.float64)


def assert_same_bits(a: list[Array], b: list[Array]) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        unsigned = f"u{x.itemsize}"
        different = np.flatnonzero(x.view(unsigned) != y.view(unsigned)).tolist()
        assert not different, f"array {i}: {len(different)} of {x.size} elements differ, the first is {different[0]}"
