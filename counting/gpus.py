# SPDX-License-Identifier: Apache-2.0
"""The GPUs that times are predicted for. A change here moves all predictions: make it a commit of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    arch: the cubins that it runs. sms: streaming multiprocessors. clock: GHz under load.
    peak, copy: bandwidth of its memory in TB/s, as the vendor gives it and as a large copy reaches it.
    latency, idle_latency, l2_latency: clocks from a load to its data, from memory while that is busy and while it is
        not, and from the L2 cache.
    lanes: results of a clock in each SM, by the pipe that makes them; for `tensor`, 32 over the clocks that one
        16 x 8 x 16 product of 16-bit floats (16 x 8 x 8 of TF32, 16 x 8 x 32 of 8-bit integers) takes.
    units: pipes that are one and the same, by the pipe that they are a part of.
    threads, blocks, shared: what an SM holds of each, the last in bytes; of registers, all hold `REGISTERS`.
    sources: where the numbers are from.
    """

    name: str
    arch: str
    sms: int
    clock: float
    peak: float
    copy: float
    latency: float
    idle_latency: float
    l2_latency: float
    lanes: Mapping[str, float]
    threads: int
    blocks: int
    shared: int
    sources: str
    units: Mapping[str, str] = field(default_factory=dict)

    def clocks(self, bytes_moved: float) -> float:
        """In which a copy moves so many bytes."""
        return bytes_moved / (self.copy * 1e3) * self.clock

    def microseconds(self, clocks: float) -> float:
        return clocks / (self.clock * 1e3)


REGISTERS = 65536
# Lanes are rows of "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide: float32 adds
# (fma), integer adds and logic (alu), float64 adds (fp64), conversions from and to 64 bits (convert64), reciprocals and
# other conversions (special). `lsu` is 128 bytes of the L1 cache in a clock; `tensor` is by `mma.sync`.
_COMMON = {"alu": 64, "special": 16, "lsu": 32}
_HOPPER = _COMMON | {"fma": 128, "fp64": 64, "convert64": 16, "tensor": 20}

# No public page states these: clocks under load, what a copy reaches, and latencies of a busy memory.
_ASSUMED = "assumed: clock under load, copy, latencies"

_H100 = Gpu(
    "H100",
    "sm_90",
    sms=132,
    clock=1.755,
    peak=3.35,
    copy=3.0,
    latency=1000,
    idle_latency=479,
    l2_latency=270,
    lanes=_HOPPER,
    threads=2048,
    blocks=32,
    shared=228 * 1024,
    sources=f"SXM5: NVIDIA's H100 data sheet, Hopper tuning guide; {_ASSUMED}, mma.sync at 0.62",
)

GPUS = (
    _H100,
    replace(
        _H100,
        name="H200",
        peak=4.8,
        copy=4.3,
        sources=f"NVIDIA's H200 data sheet, otherwise as H100; {_ASSUMED}",
    ),
    Gpu(
        "A100",
        "sm_80",
        sms=108,
        clock=1.41,
        peak=2.039,
        copy=1.8,
        latency=850,
        idle_latency=466,
        l2_latency=200,
        lanes=_COMMON | {"fma": 64, "fp64": 32, "convert64": 16, "tensor": 16},
        threads=2048,
        blocks=32,
        shared=164 * 1024,
        sources=f"SXM4, 80 GB: NVIDIA's A100 data sheet, Ampere tuning guide; {_ASSUMED}",
    ),
    Gpu(
        "RTX 4090",
        "sm_80",  # no wheel has code for sm_89: it runs what is compiled for sm_80
        sms=128,
        clock=2.52,
        peak=1.008,
        copy=0.93,
        latency=1300,
        idle_latency=542,
        l2_latency=280,
        lanes=_COMMON | {"fma": 128, "fp64": 2, "convert64": 2, "tensor": 4},
        threads=1536,
        blocks=24,
        shared=100 * 1024,
        sources=f"NVIDIA's Ada whitepaper, Ada tuning guide; {_ASSUMED}; conversions to float64 in the float64 lanes",
        units={"convert64": "fp64"},
    ),
    replace(
        _H100,
        name="B200",
        arch="sm_100",
        sms=148,
        clock=1.965,
        peak=7.67,
        copy=6.9,
        sources="SMs, bus (7,680 bits at 3,996 MHz) and limits as a driver reports: github.com/pytorch/ao/pull/4002; "
        f"{_ASSUMED}, lanes as H100's",
    ),
)
