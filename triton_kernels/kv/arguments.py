# SPDX-License-Identifier: Apache-2.0
"""Arguments of the KV cache's kernels: the checks that memory safety needs, and how tensors are passed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..._errors import require
from ..._ops import kv as ops
from .._launch import require_device, require_dtypes

ANY = -1


def unspecialized(number: int) -> int:
    """Packs an integer that is passed within a tuple, so that Triton does not compile code for its value.

    Triton specialises integers in tuples, except odd ones of 64 bits. ``functions.integer`` unpacks it.
    """
    return 1 << 62 | number << 1 | 1


def strides(t: Tensor) -> tuple[int, ...]:
    """The strides of sequences, heads and tokens, in elements."""
    return tuple(unspecialized(t.stride(d)) for d in range(3))


def place(t: Tensor | None) -> tuple[int, ...]:
    """The address, and the strides of sequences and heads in bytes."""
    numbers = (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0) * t.itemsize, t.stride(1) * t.itemsize)
    return tuple(map(unspecialized, numbers))


def is_aligned(t: Tensor) -> bool:
    """True if the bytes of each head begin at a multiple of 16."""
    return not any(number % 16 for number in (t.data_ptr(), t.stride(0) * t.itemsize, t.stride(1) * t.itemsize))


def vector_of(*tensors: Tensor) -> int:
    """How many elements of a token one 16-byte access takes; 1 if a tensor is not aligned to 16 bytes."""
    widest = min(16 // t.itemsize for t in tensors)
    aligned = all(not t.data_ptr() % 16 and not any(n % widest for n in t.stride()[:3]) for t in tensors)
    return widest if aligned else 1


def check_tokens(op: str, role: str, t: Tensor) -> None:
    """Checks tokens (batch, heads, tokens, channels)."""
    dense = t.dim() == 4 and (t.numel() == 0 or t.stride(3) == 1)
    contract = f"{role} (batch, heads, tokens, channels) whose channels are neighbours"
    require(dense, op, contract, f"shape {tuple(t.shape)}", "Call .contiguous().")
    head_dim = t.shape[3]
    fits = 16 <= head_dim <= ops.MAX_HEAD_DIM and head_dim % 16 == 0
    require(fits, op, f"{role} of 16, 32, ..., {ops.MAX_HEAD_DIM} channels", head_dim, "Pad channels with zeros.")
    require_dtypes(op, [t])


def check_layout(op: str, role: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], dense: int) -> None:
    """Checks dtype and shape (ANY: any size), and that the tensor is contiguous from dimension ``dense`` on."""
    fits = t.dtype == dtype and t.dim() == len(shape)
    fits = fits and all(wanted in (ANY, n) for wanted, n in zip(shape, t.shape, strict=True))
    expected = 1
    for k in reversed(range(dense, t.dim())):
        fits = fits and (t.shape[k] == 1 or t.numel() == 0 or t.stride(k) == expected)
        expected *= t.shape[k]
    wanted = ", ".join("any" if n == ANY else str(n) for n in shape)
    contract = f"{role} ({wanted}) of {dtype}, dense from dimension {dense} on"
    require(fits, op, contract, f"{tuple(t.shape)} of {t.dtype}", "Make it so.")


@dataclass(frozen=True)
class Packed:
    """The layout of packed tokens. ``groups`` is 0 if scales belong to the channels of a block, not to tokens."""

    bits: int
    groups: int
    head_dim: int
    separable: bool

    @property
    def bytes(self) -> int:
        return self.head_dim * self.bits // 8

    @property
    def block_w(self) -> int:
        return triton.next_power_of_2(self.bytes)

    @classmethod
    def of(
        cls,
        op: str,
        codes: Tensor,
        scales: Tensor,
        channels: Tensor | None,
        blocks: int,
        like: Tensor,
        bits: int,
        axis: int,
    ) -> Packed:
        """Checks packed tokens that represent tokens with the shape of ``like``."""
        require(bits in ops.BITS, op, "bits 2, 4 or 8", bits, "Choose one of them.")
        require(axis in (0, 1), op, "axis 0 or 1", axis, "Choose one of them.")
        heads, head_dim = tuple(like.shape[:2]), like.shape[3]
        check_layout(op, "codes", codes, torch.uint8, (*heads, ANY, head_dim * bits // 8), 2)
        shape = (blocks, 2, head_dim) if axis == 0 else (codes.shape[2], 2, ANY)
        check_layout(op, "scales", scales, torch.float16, (*heads, *shape), 2)
        groups = scales.shape[4] if axis == 1 else 0
        divided = axis == 0 or (groups > 0 and head_dim % groups == 0)
        require(divided, op, f"groups that divide {head_dim}", groups, "Choose others.")
        if channels is not None:
            require(axis == 1, op, "no channels for axis 0", "some", "Leave them out.")
            check_layout(op, "channels", channels, torch.float16, (*heads, blocks, head_dim), 2)
        return cls(bits, groups, head_dim, channels is not None)


def check_blocks(op: str, starts: Tensor, counts: Tensor, batch: int, heads: int) -> int:
    """Checks the blocks and returns how many there are. Their values stay on the device and are not read."""
    check_layout(op, "counts", counts, torch.int32, (batch, heads, ANY), 2)
    check_layout(op, "starts", starts, torch.int32, (counts.shape[2] + 1,), 0)
    return counts.shape[2]


def check_queries(op: str, q: Tensor, k: Tensor) -> None:
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    contract = f"q of the keys' batch and channels and a multiple of their heads, {tuple(k.shape)}"
    require(fits, op, contract, tuple(q.shape), "Pass (batch, query heads, tokens, channels).")


def check_option(
    op: str, role: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], dense: int = 0
) -> int:
    """The address of an optional tensor; 0 if there is none."""
    if t is None:
        return 0
    check_layout(op, role, t, dtype, shape, dense)
    return t.data_ptr()


def check_device(op: str, *tensors: Tensor | None) -> torch.device:
    return require_device(op, [[t for t in tensors if t is not None]])
