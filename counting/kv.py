# SPDX-License-Identifier: Apache-2.0
"""The launches of attention over compressed tokens."""

from __future__ import annotations

from dataclasses import dataclass

from singlepass.bench.kv.caches import (
    BLOCK,
    DECODE,
    HEADS,
    QUERY_HEADS,
    REGULAR_BLOCK,
    SALIENT_RATIO,
    SHAPES,
    WIDTH,
    WINDOW,
)
from singlepass.bench.registry import Case

from .paths import Step
from .plan import Plan, Work

THREADS, WARPS, ROWS, CHUNK, KEY_TILE = 128, 4, 8, 32, 64  # csrc/kv/decode.h, decode_codes.h
SPLITS, MIN_SLOTS, MIN_WINDOW_SLOTS = 64, 128, 32  # DecodeCut
SHAPE = {shape.name: shape for shape in SHAPES["cuda"]}
KEY_TILES = WIDTH // KEY_TILE
GROUP = QUERY_HEADS // HEADS


def plans(case: Case) -> list[Plan]:
    if case.op != DECODE:
        return []
    shape = SHAPE[case.size]
    heads, slots = shape.batch * HEADS, shape.length - WINDOW
    salient = round(SALIENT_RATIO * slots)
    split = -(-slots // (SPLITS * MIN_SLOTS)) * MIN_SLOTS
    segments = (Segment(4, BLOCK, salient, split), Segment(2, REGULAR_BLOCK, slots - salient, split))
    window = WINDOW // MIN_WINDOW_SLOTS
    splits = sum(segment.splits for segment in segments) + window
    work = [segment.work(splits, case.dtype.itemsize) for segment in segments] + [window_work(case, window / splits)]
    shared = max(Segment.shared(WARPS), 16 << 10)
    passed = Plan(
        "kv/decode", "decode_kernel", tuple(work), case.bytes, heads * splits, THREADS, "chunks", CHUNK * WIDTH * 2,
        shared,
    )  # fmt: skip
    merged = Work((Step("spans", (("LDG.32", 12), ("MUFU", 4))),), {"spans": splits / 4}, cached={"spans": 1.0})
    rows = heads * GROUP
    return [passed, Plan("kv/decode", "merge_kernel", (merged,), 0, rows, THREADS, "spans", THREADS)]


@dataclass(frozen=True)
class Segment:
    """Tokens of one bit width, in blocks that are shared by the warps of a thread block or, if small, one warp's."""

    bits: int
    block: int
    slots: int
    split: int

    @property
    def splits(self) -> int:
        return -(-self.slots // self.split)

    @staticmethod
    def shared(teams: int) -> int:
        """CodesShared::bytes, about: queries, and fragments and factors of each team."""
        return 512 + 4 * ROWS * WIDTH + teams * (16 * KEY_TILES * KEY_TILE // 16 * 32 + 4 * WIDTH)

    def work(self, splits: int, itemsize: int) -> Work:
        """A warp's way through a split: queries, then blocks of tokens, each folded into the queries and read in
        chunks."""
        alone = self.block <= CHUNK
        team = 32 if alone else THREADS
        # Eight words of values' codes, four of keys', and in chunks eight more, with the scales of both.
        words = {"LDG.32": 8}
        words[f"LDG.{16 * self.bits}"] = words.get(f"LDG.{16 * self.bits}", 0) + 8
        keys = Step("keys", (("HMMA", 16), (f"LDG.{16 * self.bits}", 4)))
        chunks = Step("chunks", (("HMMA", 32), *words.items()), inside=(keys,))
        fold = Step("fold", (("SHFL", 8),), inside=(Step("products", (("LDG.64", 2),)), Step("split", (("F2FP", 4),))))
        factors = Step("factors", (("LDG.16", 1), ("STS.32", 1)))
        blocks = Step("blocks", inside=(fold, factors, chunks))
        steps = (
            Step("queries", ((f"LDG.{8 * itemsize}", 1), ("STS.32", 1), ("MUFU+", 2))),
            blocks,
            Step("merge", (("BAR", 1), ("LDG.32", 0))),
            Step("write", (("STG.32", 1),)),
        )
        tokens = self.slots / self.splits  # of a split
        times = {
            "queries": ROWS * WIDTH / THREADS,
            "blocks": tokens / self.block / (WARPS if alone else 1),
            "fold": ROWS / (team / 16),
            "products": KEY_TILES,
            "split": KEY_TILES,
            "factors": WIDTH / team,
            "chunks": self.block / CHUNK / (1 if alone else WARPS),
            "keys": KEY_TILES,
            "merge": WARPS,
            "write": GROUP * WIDTH / THREADS,
        }
        # Queries and the blocks' places are read by many; steps and minima of keys, by each row that is folded.
        cached = {"queries": 1.0, "blocks": 1.0, "products": 1.0 - 1.0 / times["fold"]}
        return Work(steps, times, self.splits / splits, cached)


def window_work(case: Case, share: float) -> Work:
    return Work((), {}, share)
