# SPDX-License-Identifier: Apache-2.0
"""Device tables: the addresses of all tensors of a launch, and the part of a tensor that each program owns.

A tensor is cut into chunks of CHUNK elements, or of the size in its record, and each program owns one chunk. An empty
tensor has one empty chunk, whose program counts its step. A table depends on addresses, shapes and dtypes alone, so
callers keep it until one of these changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._errors import require
from ._common import LAUNCH_OPTIONS
from ._launch import is_capturing

CHUNK = 16384
BLOCK = 512
MAX_STATES = 4

# The columns of a record, which is a row of int64.
PARAM = tl.constexpr(0)  # the addresses: parameter, gradient, states
STEP = tl.constexpr(2 + MAX_STATES)
SCALE = tl.constexpr(3 + MAX_STATES)
NUMEL = tl.constexpr(4 + MAX_STATES)
ID = tl.constexpr(5 + MAX_STATES)
IS_ALIGNED = tl.constexpr(6 + MAX_STATES)
FIRST_CHUNK = tl.constexpr(7 + MAX_STATES)
CHUNK_SIZE = tl.constexpr(8 + MAX_STATES)
OFFSET = tl.constexpr(9 + MAX_STATES)
INDEX = tl.constexpr(10 + MAX_STATES)
WIDTH = tl.constexpr(11 + MAX_STATES)


@dataclass(frozen=True)
class Record:
    """The row of one tensor. ``addresses``: parameter, gradient and states, which kernels access as vectors.

    A ``chunk_size`` of 0 stands for CHUNK elements. ``offset`` is the place of the first element in the whole tensor,
    and ``index`` that of the tensor in the caller's list, whose other tensors may be in other tables.
    """

    addresses: tuple[int, ...]
    numel: int
    step: int = 0
    scale: int = 0
    id: int = 0
    chunk_size: int = 0
    offset: int = 0
    index: int = 0

    @property
    def chunk_count(self) -> int:
        return max(1, -(-self.numel // (self.chunk_size or CHUNK)))

    def row(self, first_chunk: int) -> list[int]:
        unused = [0] * (2 + MAX_STATES - len(self.addresses))
        is_aligned = all(address % 16 == 0 for address in self.addresses)
        tail = [self.step, self.scale, self.numel, self.id, int(is_aligned), first_chunk, self.chunk_size or CHUNK]
        return [*self.addresses, *unused, *tail, self.offset, self.index]


@dataclass(frozen=True)
class Table:
    """The records and chunks of a list of tensors, and scratch memory for its kernels, all on the device."""

    records: Tensor  # int64 [tensors, WIDTH]
    chunks: Tensor  # int64 [chunks]: index of the tensor in the upper 32 bits, of its chunk in the lower
    tickets: Tensor  # int32 [tensors], zero between launches
    partials: Tensor  # float64 [chunks, 2]
    chunk: int  # elements of a chunk, unless the record has a size of its own

    @property
    def chunk_count(self) -> int:
        return self.chunks.numel()


@triton.jit(do_not_specialize=["p_records", "p_chunks"])
def list_chunks_kernel(p_records, p_chunks, BLOCK: tl.constexpr):
    """Fills Table.chunks. Each program lists the chunks of one tensor."""
    i_tensor = tl.program_id(0).to(tl.int64)
    p_record = p_records + i_tensor * WIDTH
    count = tl.maximum(tl.cdiv(tl.load(p_record + NUMEL), tl.load(p_record + CHUNK_SIZE)), 1)
    p_first = p_chunks + tl.load(p_record + FIRST_CHUNK)
    for start in range(0, count, BLOCK):
        i_chunk = start + tl.arange(0, BLOCK)
        tl.store(p_first + i_chunk, (i_tensor << 32) + i_chunk, mask=i_chunk < count)


def make_table(records: Sequence[Record], device: torch.device) -> Table:
    """Uploads the records and lists their chunks on the current stream, without waiting for it."""
    words: list[int] = []
    chunk_count = 0
    for record in records:
        words += record.row(chunk_count)
        chunk_count += record.chunk_count
    table = Table(
        records=upload(words, device),
        chunks=torch.empty(chunk_count, dtype=torch.int64, device=device),
        tickets=torch.zeros(len(records), dtype=torch.int32, device=device),
        partials=torch.empty(chunk_count, 2, dtype=torch.float64, device=device),
        chunk=CHUNK,
    )
    list_chunks_kernel[(len(records),)](table.records, table.chunks, BLOCK, **LAUNCH_OPTIONS)
    return table


def upload(words: list[int], device: torch.device) -> Tensor:
    """Copies words to an int64 tensor on the device.

    A CUDA graph must contain the words, because host memory that it copied from would have to outlive it. While one is
    captured, they are therefore the scalars of a foreach operation, whose kernels take them by value as arguments.
    """
    if is_capturing(device):
        uploaded = torch.zeros(len(words), dtype=torch.int64, device=device)
        torch._foreach_add_(uploaded.unbind(), words)
        return uploaded
    host = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
    return host.to(device, non_blocking=True)


def is_dense(t: Tensor) -> bool:
    """True if the elements fill one stretch of memory without gaps, each at an offset of its own."""
    if t.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != filled:
            return t.numel() == 0
        filled *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if both tensors have equal indices at equal offsets."""
    if a.shape != b.shape:
        return False
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(size == 1 or x == y for size, x, y in strides)


def laid_out_like(op: str, grad: Tensor, param: Tensor) -> Tensor:
    """Returns the gradient, or a copy of it in the layout of its parameter."""
    got = f"{tuple(grad.shape)} for a parameter of shape {tuple(param.shape)}"
    require(grad.shape == param.shape, op, "gradients of their parameters' shapes", got, "Reshape the gradient.")
    return grad if same_layout(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
