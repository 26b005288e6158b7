# SPDX-License-Identifier: Apache-2.0
"""The way of a warp through a kernel, found without running it: loops are known by what a pass through them does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import inf

import networkx

from .cubins import Instruction, Kernel
from .flow import Flow, Loop

LANES = 32
COPYING = 3, 6  # passes after which copies run ahead as they always do, and passes that are averaged then
UNROLLED = (1, 2, 4, 8, 16)
GLOBAL_LOADS = ("LDG", "LD", "LDGSTS", "ATOMG", "ATOM")


@dataclass(frozen=True)
class Step:
    """A loop of a kernel, known by what one pass through it does.

    does: how many instructions with each of these `Instruction.marks` a pass executes: exactly so many, or at least
        where the mark ends in "+". Where a pass has branches to choose from, as for dtypes, this chooses.
    avoids: marks of instructions that are on other branches.
    inside: the loops inside that run. What else is inside is run around, or once if there is no way around.
    """

    name: str
    does: tuple[tuple[str, int], ...] = ()
    avoids: tuple[str, ...] = ()
    inside: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Path:
    """What a warp executes on its way through a kernel, or in one pass of a loop.

    code: instructions, without those of loops inside.
    calls: functions that are called, as there is no way around them; what these execute is not counted.
    """

    code: tuple[Instruction, ...]
    loops: tuple[Inner, ...] = ()
    calls: int = 0

    def passes(self, times: Mapping[str, float], name: str = "") -> Iterator[tuple[str, float, Path]]:
        """This path and those of all loops inside: the name of the loop, and how often it is run in all, if a loop is
        run so many times in each pass of what is around. Loops without a number are run once."""
        yield name, 1.0, self
        for loop in self.loops:
            for inner, count, path in loop.path.passes(times, loop.name):
                yield inner, loop.times(times) * count, path

    def loop(self, name: str) -> Inner:
        """The loop of a step."""
        for loop in self.loops:
            if loop.name == name:
                return loop
            with suppress(KeyError):
                return loop.path.loop(name)
        raise KeyError(name)

    def count(self, *kinds: str) -> int:
        """Instructions of some kinds, without those of loops inside."""
        return sum(i.kind in kinds for i in self.code)

    @property
    def stalls(self) -> int:
        """Clocks between instructions, as the compiler has written them down, without those of loops inside."""
        return sum(i.stall for i in self.code)

    @property
    def pipes(self) -> dict[str, float]:
        """Instructions by the pipe that makes them, without those of loops inside."""
        found: dict[str, float] = {}
        for pipe, count in (i.pipe for i in self.code if i.pipe is not None):
            found[pipe] = found.get(pipe, 0.0) + count
        return found

    def clocks(
        self,
        times: Mapping[str, float],
        far: Callable[[str, Instruction], float],
        near: float,
        name: str = "",
        bytes_per_clock: float = inf,
    ) -> float:
        """Of one pass of a warp that is alone, after another one: what the compiler makes it wait between instructions,
        and what its barriers make it wait for results. These come after `near` clocks, what is loaded from global
        memory in a loop after far(its name, the load), and no faster than so many bytes of the warp in a clock; the
        second half of a sector is then in the L1 cache. Of copies to shared memory the warp waits for its own."""
        ready: dict[int, float] = {}
        clock = began = free = copied = 0.0
        groups: list[float] = []  # of copies: when each is there
        inside = [
            (loop.at, loop.times(times) * loop.path.clocks(times, far, near, loop.name, bytes_per_clock))
            for loop in self.loops
        ]
        settling, measured = COPYING if any(i.op == "LDGDEPBAR" for i in self.code) else (1, 1)
        for number in range(settling + measured):
            if number == settling:
                began = clock
            sectors: set[tuple[str, int]] = set()
            for n in range(len(self.code) + 1):
                clock += sum(clocks for at, clocks in inside if at == n)
                if n == len(self.code):
                    break
                i = self.code[n]
                clock = max([clock, *(ready.pop(barrier, 0.0) for barrier in i.waits)])
                if i.op == "DEPBAR":
                    clock = max([clock, *groups[: len(groups) - i.groups_left]])
                elif i.op == "LDGDEPBAR":
                    groups.append(copied)
                elif i.op == "LDGSTS":
                    asked = max(clock, free)
                    copied, free = asked + far(name, i), asked + LANES * i.bits / 8 / bytes_per_clock
                elif i.sets is not None:
                    there = clock + near
                    if i.op in GLOBAL_LOADS and i.sector not in sectors:
                        asked = max(clock, free)
                        there, free = asked + far(name, i), asked + LANES * i.bits / 8 / bytes_per_clock
                    ready[i.sets] = max(ready.get(i.sets, 0.0), there)
                    sectors.add(i.sector)
                clock += i.stall
        return (clock - began) / measured

    @property
    def cost(self) -> tuple[int, int]:
        """Calls and instructions of one pass of everything: what a way is chosen by."""
        every = [path for _, _, path in self.passes({})]
        return sum(path.calls for path in every), sum(len(path.code) for path in every)


@dataclass(frozen=True)
class Inner:
    """A loop inside a path: its step's name, or "" where it has none, and a pass. at: the number of the path's
    instruction that it stands before. unrolled: passes of the source's loop that are one here."""

    name: str
    path: Path
    at: int = 0
    unrolled: int = 1

    def times(self, times: Mapping[str, float]) -> float:
        return times[self.name] / self.unrolled if self.name in times else 1.0


Done = tuple[int, ...]  # how much of what a step says
Way = tuple[tuple[int, int], tuple[int, ...]]  # its cost, and the nodes on it


@dataclass(frozen=True)
class _Node:
    """A block, or a loop as a whole. next: what may follow. ends: whether the way may end here."""

    next: frozenset[int]
    ends: bool
    path: Path

    @cached_property
    def cost(self) -> tuple[int, int]:
        return self.path.cost

    def counts(self, step: Step) -> Iterator[Done]:
        """What it may do of what the step asks for, as instructions under a condition may do nothing. Nothing is
        yielded where it is to be avoided."""
        code = self.path.code
        if not all(i.marks.isdisjoint(step.avoids) for i in code):
            return
        ranges = []
        for mark, _ in step.does:
            own = [bool(i.guard) for i in code if mark.removesuffix("+") in i.marks]
            ranges.append(range(own.count(False), len(own) + 1))
        names = {name for name, _, _ in self.path.passes({})}
        loops = tuple(int(inner.name in names) for inner in step.inside)
        for counted in product(*ranges):
            yield (*counted, *loops)


class Paths:
    """Finds ways through a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._flow = Flow(kernel)

    def through(self, *steps: Step, does: tuple[tuple[str, int], ...] = ()) -> Path:
        """The way from the kernel's start to its end through these loops that has the fewest calls and, of those, the
        fewest instructions. does: as of a step, what it does outside of loops.

        Raises:
            ValueError: no loop does what a step says, or no way leads through all.
        """
        whole = Step("the kernel", does, inside=steps)
        found = self._way(self._flow.reached, 0, self._flow.loops, whole, is_loop=False)
        if found is None:
            doing = f" that does {dict(does)}" if does else ""
            raise self._missing(f"a way through {', '.join(step.name for step in steps) or 'no loop'}{doing}")
        return found

    def _missing(self, what: str) -> ValueError:
        return ValueError(
            f"counting: expected {what} in {self.kernel.plain_name.partition('(')[0]} on {self.kernel.arch}; got none. "
            "Describe its loops as they are now"
        )

    def _find(self, step: Step, loops: Iterable[Loop]) -> dict[Loop, Inner]:
        """The innermost loops that do what a step says, or a few times as much, as the compiler unrolls loops."""
        every = [loop for outer in loops for loop in outer.every()]
        for unrolled in UNROLLED if step.does else (1,):
            wanted = replace(step, does=tuple((mark, unrolled * count) for mark, count in step.does))
            ways: dict[Loop, Path] = {}
            for loop in every:
                with suppress(ValueError):  # of loops inside: another loop may be meant
                    if way := self._way(loop.blocks, loop.head, loop.inner, wanted):
                        ways[loop] = way
            if ways:
                innermost = [loop for loop in ways if not any(o in ways for o in loop.every() if o is not loop)]
                return {loop: Inner(step.name, ways[loop], unrolled=unrolled) for loop in innermost}
        raise self._missing(f"a loop {step.name!r} that does {dict(step.does)}")

    def _way(
        self, blocks: frozenset[int], start: int, loops: tuple[Loop, ...], step: Step, is_loop: bool = True
    ) -> Path | None:
        """The cheapest way through some blocks that does what a step says, or None. It ends where a loop begins
        again."""
        chosen: dict[Loop, Inner] = {}
        for inner in step.inside:
            for loop, found in self._find(inner, loops).items():
                if loop in chosen:
                    raise self._missing(f"a loop that is {inner.name!r} and not {chosen[loop].name!r}")
                chosen[loop] = found
        taken = _cheapest(self._nodes(blocks, start, loops, step.inside, chosen, is_loop), start, step)
        return None if taken is None else _joined(taken)

    def _nodes(
        self,
        blocks: frozenset[int],
        start: int,
        loops: tuple[Loop, ...],
        steps: tuple[Step, ...],
        chosen: Mapping[Loop, Inner],
        is_loop: bool,
    ) -> dict[int, _Node]:
        """The blocks of a region, each loop in it as one node with the number of its first block."""
        place = {n: loop.head for loop in loops for n in loop.blocks}
        nodes = {}
        for n in blocks - place.keys():
            block = self._flow.blocks[n]
            again = is_loop and start in block.next
            ahead = frozenset(place.get(m, m) for m in block.next if m in blocks and not (is_loop and m == start))
            nodes[n] = _Node(ahead, again or (not is_loop and block.leaves), Path(block.code, calls=int(block.calls)))
        for loop in loops:
            out = {m for n in loop.blocks for m in self._flow.blocks[n].next} - loop.blocks
            again = is_loop and start in out
            ahead = frozenset(place.get(m, m) for m in out if m in blocks and not (is_loop and m == start))
            nodes[loop.head] = _Node(ahead, again, self._pass(loop, steps, chosen))
        return nodes

    def _pass(self, loop: Loop, steps: tuple[Step, ...], chosen: Mapping[Loop, Inner]) -> Path:
        """A loop as part of a way: one that a step means, one around such loops, or any other."""
        if loop in chosen:
            return Path((), (chosen[loop],))
        names = {chosen[inner].name for inner in loop.every() if inner in chosen}
        inside = tuple(step for step in steps if step.name in names)
        for wanted in (inside, ()):
            path = self._way(loop.blocks, loop.head, loop.inner, Step("around", inside=wanted))
            if path is not None:
                return Path((), (Inner("", path),))
        raise self._missing(f"a pass of the loop at block {loop.head}")


def _cheapest(nodes: Mapping[int, _Node], start: int, step: Step) -> list[Path] | None:
    """The nodes' paths on the cheapest way from one to an end that does what a step says, or None."""
    wanted = (*(count for _, count in step.does), *(1 for _ in step.inside))
    open_ended = (*(mark.endswith("+") for mark, _ in step.does), *(False for _ in step.inside))
    # Ways by node: what they have done so far, and the cheapest of those that have done the same.
    ways: dict[int, dict[Done, Way]] = {start: {(0,) * len(wanted): ((0, 0), ())}}
    ended: list[Way] = []
    for n in networkx.topological_sort(networkx.DiGraph({n: node.next for n, node in nodes.items()})):
        node = nodes[n]
        for (done, (cost, way)), counts in product(ways.pop(n, {}).items(), node.counts(step)):
            now = tuple(
                min(a + b, most) if is_open else a + b
                for a, b, most, is_open in zip(done, counts, wanted, open_ended, strict=True)
            )
            if any(a > b for a, b in zip(now, wanted, strict=True)):
                continue
            reached = (cost[0] + node.cost[0], cost[1] + node.cost[1]), (*way, n)
            if node.ends and now == wanted:
                ended.append(reached)
            for ahead in node.next:
                known = ways.setdefault(ahead, {})
                known[now] = min(reached, known.get(now, reached))
    return [nodes[n].path for n in min(ended)[1]] if ended else None


def _joined(taken: Iterable[Path]) -> Path:
    """One path of several, one after the other."""
    code: tuple[Instruction, ...] = ()
    inside: list[Inner] = []
    calls = 0
    for path in taken:
        inside += [replace(loop, at=len(code)) for loop in path.loops]
        code += path.code
        calls += path.calls
    return Path(code, tuple(inside), calls)
