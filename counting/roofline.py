# SPDX-License-Identifier: Apache-2.0
"""The time of a kernel from counts: the largest of what memory, issue, each pipe and waiting ask for.

What is predicted here has not been measured, and may be off by a quarter. What binds a kernel, and which of two kernels
is faster, is firmer than the times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .cubins import DRIVER_SHARED
from .gpus import REGISTERS, Gpu

SCHEDULERS = 4  # of an SM: each issues one warp's instruction in a clock
ISSUE_SHARE = 0.80  # of the clocks in which a busy scheduler issues
PIPE_SHARE = 0.90  # the same of a pipe
COPY_SHARE = 0.94  # of a copy's bandwidth that a kernel with enough loads in flight reaches
SHORT_LATENCY = 30  # clocks until the result of shared memory, a shuffle, a conversion or a tensor core
L2_BYTES = 64  # of a clock that come from the L2 cache to one SM, as assumed
LAUNCH_US = 4.0  # until all SMs are busy and after the first is idle, for each launch
# Two limits near each other do not overlap perfectly: the second adds this share, by a power of how near it is.
OVERLAP_SHARE, OVERLAP_POWER = 0.15, 4
ROUNDS = 8  # until latency and time fit each other


@dataclass(frozen=True)
class Warp:
    """What one warp executes from its start to its end.

    clocks, idle_clocks: until its end if it had an SM to itself, in the first while the memory is busy with others.
    pipes: instructions by the pipe of `Gpu.lanes` that they need.
    """

    instructions: float
    clocks: float
    idle_clocks: float
    pipes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """One kernel on one grid.

    bytes: what must cross memory. warps, shared: of a block, the latter in bytes. registers: of a thread. warp: the
    average. tail: clocks of what the last block does after all others."""

    kernel: str
    bytes: float
    blocks: int
    warps: int
    registers: int
    shared: int
    warp: Warp
    tail: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a launch, and what they are spent on."""

    us: float
    floor_us: float
    binds: str

    @property
    def share(self) -> float:
        """Of the floor: 1 is as fast as a copy of the same bytes."""
        return self.floor_us / self.us


def resident(gpu: Gpu, warps: int, registers: int, shared: int) -> int:
    """Blocks that an SM holds at a time. A thread's registers are given out in eights; each block takes 1 KB more of
    shared memory, which the driver uses."""
    by_threads = gpu.threads // (32 * warps)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_threads, by_registers, gpu.shared // (shared + DRIVER_SHARED), gpu.blocks)


def limits(gpu: Gpu, launch: Launch, blocks: float, on_sm: int) -> dict[str, float]:
    """Clocks that each limit asks for, for so many blocks, of which the busiest SM holds `on_sm` at the same time."""
    warp, warps = launch.warp, launch.warps * on_sm
    found = {
        "memory": gpu.clocks(launch.bytes * blocks / launch.blocks) / COPY_SHARE,
        "issue": warps * warp.instructions / SCHEDULERS / ISSUE_SHARE,
        "latency": warp.idle_clocks,
    }
    for pipe, count in warp.pipes.items():
        unit = gpu.units.get(pipe, pipe)
        found[unit] = found.get(unit, 0.0) + warps * count * 32 / gpu.lanes[pipe] / PIPE_SHARE
    # The busier the memory is, the longer loads take; the longer all takes, the less busy the memory is.
    for _ in range(ROUNDS):
        busy = min(1.0, found["memory"] / together(found))
        found["latency"] = warp.idle_clocks + busy * (warp.clocks - warp.idle_clocks)
    return found


def together(found: Mapping[str, float]) -> float:
    """Clocks of limits that overlap, though not perfectly."""
    second, first = sorted(found.values())[-2:]
    return first * (1 + OVERLAP_SHARE * (second / first) ** OVERLAP_POWER)


def predict(gpu: Gpu, launch: Launch) -> Prediction:
    """Full waves of blocks, one after the other, then what is left on a part of the SMs' places."""
    on_sm = resident(gpu, launch.warps, launch.registers, launch.shared)
    slots = on_sm * gpu.sms
    waves, rest = divmod(launch.blocks, slots)
    spent: dict[str, float] = {}
    clocks = 0.0
    for count, blocks, held in ((waves, slots, on_sm), (1, rest, -(-rest // gpu.sms))):
        if count and blocks:
            found = limits(gpu, launch, blocks, held)
            taken = count * together(found)
            clocks += taken
            binding = max(found, key=lambda name: found[name])
            spent[binding] = spent.get(binding, 0.0) + taken
    us = gpu.microseconds(clocks + launch.tail)
    binds = "launch" if us < LAUNCH_US else max(spent, key=lambda name: spent[name])
    return Prediction(us + LAUNCH_US, gpu.microseconds(gpu.clocks(launch.bytes)), binds)
