# SPDX-License-Identifier: Apache-2.0
"""What a few seconds tell of a machine, from which a run is planned."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .floor import copy_bandwidth, matrix_rate


@dataclass(frozen=True)
class Probe:
    """copy_gbps: bandwidth of a copy, reads and writes counted. matrix_tflops: of products of matrices.
    compile_s: seconds in which torch.compile makes a small function; 0 where it cannot."""

    copy_gbps: float
    matrix_tflops: float
    compile_s: float

    def moving(self, count: float) -> float:
        """Seconds in which so many bytes are moved."""
        return count / self.copy_gbps / 1e9

    def computing(self, flops: float) -> float:
        """Seconds of so much arithmetic in products of matrices."""
        return flops / self.matrix_tflops / 1e12


def probe(device: torch.device) -> Probe:
    return Probe(copy_bandwidth(device), matrix_rate(device), compile_seconds(device))


def compile_seconds(device: torch.device) -> float:
    """Seconds to compile a small function, after another one has loaded what compiling needs."""
    x = torch.ones(64, device=device)
    try:
        torch.compile(lambda x: (x * 2.0).exp(), fullgraph=True)(x)
        begin = time.perf_counter()
        torch.compile(lambda x: (x + 2.0).tanh().cumsum(0), fullgraph=True)(x)
    except Exception:  # what stops it is told by each provider that needs it
        return 0.0
    return time.perf_counter() - begin
