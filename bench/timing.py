# SPDX-License-Identifier: Apache-2.0
"""Clocks for CPU and CUDA, and round-robin measurement of several steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .registry import Step

# What is written between calls of small working sets, in sizes of the last-level cache.
FLUSHED_CACHES = 2
# Assumed last-level cache where the system does not tell: larger than most, so that the cache is flushed too well.
FALLBACK_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Effort:
    """When a provider has been timed enough: at least `min_reps` calls, then until `max_reps`, or until `seconds` have
    passed in its calls and in what prepares them."""

    min_reps: int
    max_reps: int
    seconds: float


QUICK = Effort(min_reps=3, max_reps=30, seconds=1.0)
FULL = Effort(min_reps=5, max_reps=100, seconds=2.0)
# Calls of warm cases, which take less than a millisecond: fewer would all fall into one mood of a shared machine.
WARM_REPS = 500


@dataclass(frozen=True)
class Samples:
    """Seconds of each timed call."""

    seconds: tuple[float, ...]

    def summary(self) -> dict[str, float | int]:
        """Quantiles in milliseconds."""
        ms = [1e3 * s for s in self.seconds]
        if len(ms) == 1:
            return {"q20": ms[0], "q50": ms[0], "q80": ms[0], "n": 1}
        q = statistics.quantiles(ms, n=10, method="inclusive")
        return {"q20": q[1], "q50": statistics.median(ms), "q80": q[7], "n": len(ms)}


class CpuClock:
    """Wall time. Inputs much larger than the cache keep it cold by themselves; others need a flush. `warm` asks for the
    opposite: a call ahead."""

    warmup = 0  # the runner's calls ahead are enough

    def __init__(self, working_set: int, warm: bool = False) -> None:
        cache = last_level_cache_bytes()
        flushes = working_set < 8 * cache and not warm
        self._flush = torch.zeros(FLUSHED_CACHES * cache // 4) if flushes else None
        self._warm = warm

    def ahead(self, run: Callable[[], object]) -> None:
        """Brings the cache into the state that a call is timed in."""
        if self._flush is not None:
            self._flush.add_(1.0)
        if self._warm:
            run()

    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaClock:
    """Device time between two events. The flush ahead of the first one also hides the launch latency of short steps."""

    warmup = 3  # until the clock of the device is up

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(FLUSHED_CACHES * cache // 4, device=device)

    def ahead(self, run: Callable[[], object]) -> None:
        self._flush.zero_()

    def time(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / 1e3


Clock = CpuClock | CudaClock


def clock(device: torch.device, working_set: int, warm: bool = False) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock(working_set, warm)


def measure(steps: Mapping[str, Step], clock: Clock, effort: Effort) -> dict[str, Samples]:
    """Time steps in turn, one call each per round, so that all of them see the same state of the machine.

    Steps have been called before: whatever they make or compile in their first call exists.
    Each round starts with another step. A slow step leaves after `effort.min_reps` rounds, the others go on.
    """
    calls = dict.fromkeys(steps, 0)
    spent = dict.fromkeys(steps, 0.0)
    taken: dict[str, list[float]] = {name: [] for name in steps}

    def call(name: str) -> float:
        begin = time.perf_counter()
        steps[name].before(calls[name])
        calls[name] += 1
        clock.ahead(steps[name].run)
        seconds = clock.time(steps[name].run)
        spent[name] += time.perf_counter() - begin
        return seconds

    for name in steps:
        for _ in range(clock.warmup):
            call(name)

    def wants_more(name: str) -> bool:
        t = taken[name]
        return len(t) < effort.min_reps or (len(t) < effort.max_reps and spent[name] < effort.seconds)

    names = list(steps)
    while active := [name for name in names if wants_more(name)]:
        for name in active:
            taken[name].append(call(name))
        names = names[1:] + names[:1]
    return {name: Samples(tuple(taken[name])) for name in steps}


def host_microseconds(step: Step, device: torch.device, repetitions: int = 20) -> float:
    """Median time that a call keeps the host busy, in microseconds; the device's queue is empty before each call."""
    taken = []
    for i in range(repetitions):
        step.before(i)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step.run()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return 1e6 * statistics.median(taken)


def kernel_launches(step: Step, device: torch.device) -> int:
    """Kernels that one call launches on the GPU; copies and fills by the driver are not kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # the profiler's own start can fall into the first
        step.before(0)
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step.run()
            torch.cuda.synchronize(device)
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in trace.events() or ()
    )


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache, from Linux's sysfs."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith(("K", "M")):
            sizes.append(int(text[:-1]) << (10 if text.endswith("K") else 20))
    return max(sizes, default=FALLBACK_CACHE_BYTES)
