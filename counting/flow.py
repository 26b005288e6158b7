# SPDX-License-Identifier: Apache-2.0
"""Straight pieces of machine code, how they follow each other, and the loops that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx

from .cubins import STEP, Instruction, Kernel

ENDS = ("BRA", "BRX", "EXIT", "RET", "BSYNC", "CALL")  # of a straight piece of code
JUMPS = ("BRA", "CALL")


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other. next: the numbers of the blocks that may follow. calls: whether it
    calls a function, which is where the compiler puts what hardly ever happens, such as dividing denormal numbers."""

    code: tuple[Instruction, ...]
    next: tuple[int, ...]
    calls: bool

    @property
    def leaves(self) -> bool:
        """Whether a warp may end here."""
        return any(i.op == "EXIT" for i in self.code)


@dataclass(frozen=True)
class Loop:
    """A loop: the block that it is entered by, all of its blocks, and the loops directly inside."""

    head: int
    blocks: frozenset[int]
    inner: tuple[Loop, ...]

    def every(self) -> Iterable[Loop]:
        yield self
        for loop in self.inner:
            yield from loop.every()


def blocks_of(code: tuple[Instruction, ...]) -> list[Block]:
    """The straight pieces of a function, and where each may go."""
    starts = {0}
    for i in code:
        if i.op in ENDS:
            starts.add(i.address + STEP)
        if i.op in JUMPS and i.target is not None:
            starts.add(i.target)
    ordered = sorted(start for start in starts if start < len(code) * STEP)
    pieces = {
        start: code[start // STEP : end // STEP]
        for start, end in zip(ordered, [*ordered[1:], len(code) * STEP], strict=True)
    }
    return _linked(pieces)


def _linked(pieces: Mapping[int, tuple[Instruction, ...]]) -> list[Block]:
    """Blocks by their addresses. What a call leads to either returns, or was only jumped to. The table of an indexed
    branch is not in the code: such a branch leads to all blocks that nothing else leads to."""
    lasts = {start: piece[-1] for start, piece in pieces.items()}
    plain = {start: [a for a in _next(last) if a in pieces] for start, last in lasts.items()}
    known = {0, *(a for ahead in plain.values() for a in ahead), *(i.target for i in lasts.values() if i.op in JUMPS)}
    plain |= {start: [a for a in pieces if a not in known] for start, last in lasts.items() if last.op == "BRX"}
    graph = networkx.DiGraph(plain)
    number = {start: n for n, start in enumerate(pieces)}
    blocks = []
    for start, piece in pieces.items():
        last, ahead, calls = lasts[start], plain[start], False
        if last.op == "CALL" and last.target is not None:
            calls = any(lasts[a].op == "RET" for a in {last.target, *networkx.descendants(graph, last.target)})
            if not calls:
                ahead = [last.target, *(ahead if last.guard else ())]
        blocks.append(Block(piece, tuple(number[a] for a in ahead), calls))
    return blocks


def _next(last: Instruction) -> list[int]:
    """Addresses that the last instruction of a block may be followed by; after a call, where that returns to."""
    end = last.address + STEP
    if last.op == "BRA" and last.target is not None:
        if last.name.startswith("BRA.DIV"):  # for warps whose lanes have parted
            return [end]
        return [last.target, end] if last.guard or "," in last.operands else [last.target]
    if last.op in ("BRX", "EXIT", "RET"):
        return [end] if last.guard else []
    return [end]


class Flow:
    """The control flow of a kernel. loops: the outermost."""

    def __init__(self, kernel: Kernel) -> None:
        self.blocks = blocks_of(kernel.code)
        graph = networkx.DiGraph({n: block.next for n, block in enumerate(self.blocks)})
        self.reached = frozenset({0, *networkx.descendants(graph, 0)})
        self.loops = self._loops(graph.subgraph(self.reached).copy())

    def _loops(self, graph: networkx.DiGraph) -> tuple[Loop, ...]:
        """The outermost loops of a graph of blocks, with those inside them."""
        found = []
        for part in networkx.strongly_connected_components(graph):
            own = graph.subgraph(part).copy()
            if not own.edges:
                continue
            entered = {n for m in self.reached - part for n in self.blocks[m].next if n in part}
            head = min(entered or part)
            own.remove_edges_from(list(own.in_edges(head)))
            found.append(Loop(head, frozenset(part), self._loops(own)))
        return tuple(sorted(found, key=lambda loop: loop.head))
