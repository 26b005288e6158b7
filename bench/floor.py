# SPDX-License-Identifier: Apache-2.0
"""The one-pass floor: the time in which this machine moves a case's bytes, measured beside the case itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from .registry import Pass, Step
from .timing import clock

FLOAT_BYTES = 4
COPY_BYTES = 256 << 20


class StreamPool:
    """Flat float32 buffers that the floors of all cases share: filling new ones would take longer than streaming."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []

    def take(self, sizes: tuple[int, ...]) -> list[torch.Tensor]:
        """One buffer of at least each size in bytes, rounded up to whole floats."""
        floats = [-(-size // FLOAT_BYTES) for size in sizes]
        for i, n in enumerate(floats):
            if i == len(self._buffers):
                self._buffers.append(torch.zeros(n, device=self._device))
            elif self._buffers[i].numel() < n:
                self._buffers[i] = torch.zeros(n, device=self._device)
        return [buffer[:n] for buffer, n in zip(self._buffers, floats, strict=False)]


def sweeps(p: Pass) -> list[Pass]:
    """Split a pass into sweeps over streams of equal length, which is what the stream op takes.

    All streams run together as far as the shortest goes, the others go on without it: the bytes read and written stay
    exactly those of the pass.
    """
    out, done = [], 0
    for end in sorted({*p.reads, *p.updates}):
        length = end - done
        reads, updates = (sum(size >= end for size in sizes) for sizes in (p.reads, p.updates))
        out.append(Pass((length,) * reads, (length,) * updates))
        done = end
    return out


def require_stream(device: torch.device) -> None:
    """Raises ValueError where the stream op has no kernel: its eager stand-in is no floor."""
    from singlepass._ops.optim import stream_

    if reason := stream_.rejection("native", device.type):
        raise ValueError(
            f"bench: expected the native stream that measures the floor; got: {reason}. See singlepass info"
        )


def floor_step(passes: tuple[Pass, ...], pool: StreamPool) -> Step:
    """A step that reads and writes what the passes say."""
    stream = torch.ops.singlepass.stream_.default
    lists = []
    for sweep in (sweep for p in passes for sweep in sweeps(p)):
        buffers = pool.take(sweep.reads + sweep.updates)
        lists.append((buffers[: len(sweep.reads)], buffers[len(sweep.reads) :]))

    def run() -> None:
        for reads, updates in lists:
            stream(reads, updates)

    return Step(run)


def copy_bandwidth(device: torch.device, repetitions: int = 10) -> float:
    """GB/s of `Tensor.copy_`, counting one read and one write of each byte; the median of several copies."""
    n = COPY_BYTES // FLOAT_BYTES
    if device.type == "cuda":
        n *= 4  # a copy of the CPU's size would last only a few hundred microseconds
    source, target = torch.zeros(n, device=device), torch.ones(n, device=device)
    return 2 * FLOAT_BYTES * n / _median_seconds(lambda: target.copy_(source), device, repetitions) / 1e9


def matrix_rate(device: torch.device, repetitions: int = 10) -> float:
    """TFLOP/s of a product of two random matrices: bfloat16 on a GPU, float32 on a CPU; the median of several."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, n, n, dtype=dtype, device=device)
    out = a @ b
    return 2 * n**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device, repetitions) / 1e12


def _median_seconds(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    taken = clock(device, COPY_BYTES)
    return statistics.median(taken.time(run) for _ in range(repetitions))
