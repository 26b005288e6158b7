# SPDX-License-Identifier: Apache-2.0
"""A launch as the launchers make it, and what its kernel's machine code then executes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path as FilePath

from . import cubins
from .cubins import Instruction, Kernel
from .gpus import Gpu
from .paths import Inner, Path, Paths, Step
from .roofline import L2_BYTES, SHORT_LATENCY, Launch, Warp

# Of csrc/common/reduce.h: the loop of sum_partials(), and what a pass of a block's thread adds up.
IN_FLIGHT = 8
PARTIALS = Step("partials", (("LDG.64", IN_FLIGHT),))
Marks = tuple[tuple[str, int], ...]  # of Step.does
CUBINS = FilePath(__file__).parents[1] / "build" / "cmake" / "cubin"


def accesses(kind: str, itemsize: int, elements: int, tensors: int = 1) -> Marks:
    """What a thread does to load ("LDG") or store ("STG") so many neighbouring elements of some tensors: accesses of 16
    bytes, or one of all that there is."""
    size = elements * itemsize
    return ((f"{kind}.{min(128, 8 * size)}", tensors * max(1, size // 16)),)


def summed(*parts: Marks) -> Marks:
    """Marks of several, each once."""
    found: dict[str, int] = {}
    for mark, count in (pair for part in parts for pair in part):
        found[mark] = found.get(mark, 0) + count
    return tuple(found.items())


@dataclass(frozen=True)
class Work:
    """What a share of the warps of a launch does: the loops that they run through, and how often.

    cached: of some loops, the share of passes whose loads another pass or warp has brought to the L2 cache before. All
        loads outside of these loops come from there, but for those with the mark `streamed`.
    does: as of a step, what it does outside of loops, where branches are to be chosen.
    """

    steps: tuple[Step, ...]
    times: Mapping[str, float]
    share: float = 1.0
    cached: Mapping[str, float] = field(default_factory=dict)
    streamed: str = ""
    does: tuple[tuple[str, int], ...] = ()

    def latency(self, l2: float, memory: float, loop: str, load: Instruction) -> float:
        """Clocks of a load in a loop, or outside of all for "", given those of the L2 cache and of memory."""
        cached = self.cached.get(loop, 0.0) if loop else float(self.streamed not in load.marks)
        return cached * l2 + (1.0 - cached) * memory


@dataclass(frozen=True)
class Tail:
    """What a share of the warps does more than `usual` says, by the way of `work`: those that find that all others of
    theirs are done. The last of them do it after everything else."""

    work: Work
    usual: Work
    share: float

    @property
    def both(self) -> tuple[tuple[float, Work], tuple[float, Work]]:
        """Each with its sign. Loops that both have run no time at all."""
        none = dict.fromkeys(self.usual.times, 0.0)
        return (1.0, replace(self.work, times={**none, **self.work.times})), (-1.0, replace(self.usual, times=none))


@dataclass(frozen=True)
class Plan:
    """One launch.

    source: the .cu file, as "family/stem". kernel: how its name begins, without namespaces.
    work: by kinds of warps; the hot loop is in the first. bytes: what must cross memory.
    threads, shared: of a block, the latter in bytes of dynamic shared memory.
    hot: the loop whose passes the budgets are about, or "" for all of a kernel without one. elements: how many a pass
        of a warp works on.
    tail: what comes after the work.
    """

    source: str
    kernel: str
    work: tuple[Work, ...]
    bytes: float
    blocks: int
    threads: int
    hot: str
    elements: float
    shared: int = 0
    tail: Tail | None = None

    def compiled(self, arch: str) -> Compiled:
        return Compiled(self, kernel(self.source, arch, self.kernel))


@cache
def _kernels(source: str, arch: str) -> dict[str, Kernel]:
    path = CUBINS / f"{source.replace('/', '_')}.{arch}.cubin"
    if not path.exists():
        raise ValueError(f"counting: expected {path}; got no such file. Build it: make gpu-model")
    return cubins.read(path)


@cache
def kernel(source: str, arch: str, name: str) -> Kernel:
    """The only kernel of a source whose name begins so.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [k for k in _kernels(source, arch).values() if k.plain_name.startswith(name)]
    if len(found) != 1:
        raise ValueError(
            f"counting: expected one kernel {name} in csrc/{source}.cu for {arch}; got {len(found)}. "
            "Name it as it is now"
        )
    return found[0]


@cache
def _way(kernel: Kernel, steps: tuple[Step, ...], does: tuple[tuple[str, int], ...]) -> Path:
    return Paths(kernel).through(*steps, does=does)


@dataclass(frozen=True)
class Compiled:
    """A plan with the machine code of one architecture."""

    plan: Plan
    kernel: Kernel

    def way(self, work: Work) -> Path:
        """Of a warp that does this."""
        return _way(self.kernel, work.steps, work.does)

    @property
    def hot(self) -> Inner:
        """The hot loop."""
        way = self.way(self.plan.work[0])
        return way.loop(self.plan.hot) if self.plan.hot else Inner("", way)

    def hot_count(self, count: Callable[[Path], float]) -> float:
        """A count of one pass of the hot loop and the loops inside it, for each element."""
        passes = self.hot.path.passes(self.plan.work[0].times)
        return sum(times * count(path) for _, times, path in passes) * 32 / (self.plan.elements * self.hot.unrolled)

    def warp(self, gpu: Gpu) -> Warp:
        """What a warp executes, on average over the launch."""
        pipes: dict[str, float] = {}
        instructions = 0.0
        clocks = [0.0, 0.0]
        shares = [(work.share, work) for work in self.plan.work]
        if self.plan.tail is not None:
            shares += [(sign * self.plan.tail.share, work) for sign, work in self.plan.tail.both]
        for share, work in shares:
            way = self.way(work)
            for n, memory in enumerate((gpu.latency, gpu.idle_latency)):
                far = partial(work.latency, gpu.l2_latency, memory)
                clocks[n] += share * way.clocks(work.times, far, SHORT_LATENCY)
            for _, count, path in way.passes(work.times):
                instructions += share * count * len(path.code)
                for pipe, number in path.pipes.items():
                    pipes[pipe] = pipes.get(pipe, 0.0) + share * count * number
        return Warp(instructions, clocks[0], clocks[1], pipes)

    def tail_clocks(self, gpu: Gpu) -> float:
        """Of the tail alone, which reads the L2 cache. The warps of its block share the way from there to their SM."""
        if self.plan.tail is None:
            return 0.0
        of_warp = L2_BYTES / (self.plan.threads // 32)
        return sum(
            sign * self.way(work).clocks(work.times, lambda *_: gpu.l2_latency, SHORT_LATENCY, bytes_per_clock=of_warp)
            for sign, work in self.plan.tail.both
        )

    @property
    def shared(self) -> int:
        return self.kernel.shared + self.plan.shared

    def launch(self, gpu: Gpu) -> Launch:
        plan, k = self.plan, self.kernel
        return Launch(
            plan.kernel,
            plan.bytes,
            plan.blocks,
            plan.threads // 32,
            k.registers,
            self.shared,
            self.warp(gpu),
            self.tail_clocks(gpu),
        )
