# SPDX-License-Identifier: Apache-2.0
"""The launches of attention over compressed tokens."""

from __future__ import annotations

from dataclasses import dataclass

from singlepass.bench.kv.caches import (
    BLOCK,
    DECODE,
    HEADS,
    PROBES,
    QUERY_HEADS,
    REGULAR_BLOCK,
    SALIENCY,
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
TILE, CHANNELS, LEAST_SPAN, MAX_SPANS = 64, 32, 512, 8  # csrc/kv/saliency.cu
SHAPE = {shape.name: shape for shape in SHAPES["cuda"]}
KEY_TILES = WIDTH // KEY_TILE
GROUP = QUERY_HEADS // HEADS


def plans(case: Case) -> list[Plan]:
    return {DECODE: decode, SALIENCY: saliency}[case.op](case) if case.op in (DECODE, SALIENCY) else []


def decode(case: Case) -> list[Plan]:
    """A block for each split of each head, then one for each row of queries, which merges the splits' results. These
    come from the L2 cache, and are no part of the floor."""
    shape = SHAPE[case.size]
    heads, slots = shape.batch * HEADS, shape.length - WINDOW
    salient = round(SALIENT_RATIO * slots)
    split = -(-slots // (SPLITS * MIN_SLOTS)) * MIN_SLOTS
    segments = (Segment(4, BLOCK, salient, split), Segment(2, REGULAR_BLOCK, slots - salient, split))
    splits = sum(segment.splits for segment in segments) + WINDOW // MIN_WINDOW_SLOTS
    work = tuple(segment.work(splits, case.dtype.itemsize) for segment in segments)
    spans = Step("spans", (("LDG.32", 12), ("MUFU", 4)))
    merged = Work((spans,), {"spans": splits / 4}, cached={"spans": 1.0})
    codes, shared = CHUNK * WIDTH * 2, shared_bytes(WARPS)
    return [
        Plan("kv/decode", "decode_kernel", work, case.bytes, heads * splits, THREADS, "chunks", codes, shared),
        Plan("kv/decode", "merge_kernel", (merged,), 0, heads * GROUP, THREADS, "spans", THREADS),
    ]


def shared_bytes(teams: int) -> int:
    """CodesShared::bytes, about: queries, and fragments and factors of each team."""
    return 512 + 4 * ROWS * WIDTH + teams * (16 * KEY_TILES * KEY_TILE // 16 * 32 + 4 * WIDTH)


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


def saliency(case: Case) -> list[Plan]:
    """Sums of rows over spans of the keys, then of columns over all rows, on tiles of 64 rows and 64 tokens. Rows are
    probes at sorted random places: tiles of them see a good half of the tokens."""
    shape = SHAPE[case.size]
    probes = min(PROBES, shape.length // 10)
    heads, tiles, row_tiles = shape.batch * HEADS, -(-shape.length // TILE), -(-GROUP * probes // TILE)
    of_span = max(LEAST_SPAN // TILE, -(-tiles // MAX_SPANS))
    spans = -(-tiles // of_span)
    seen = (1 + TILE / probes) / 2
    parts = 1 if case.dtype.itemsize == 2 else 3
    times = {"channels": WIDTH / CHANNELS, "maxima": spans, "totals": spans}
    # Six products of three parts each; a 16-bit number is decoded, and packed again.
    does = (("HMMA", 16), ("LDG.128", 4), ("0xffff0000+", 16)) if parts == 1 else (("HMMA", 6 * 16), ("LDG.128", 8))
    channels = Step("channels", does, avoids=("HADD2.F32",))
    merged = (
        Step("maxima", (("LDG.32", 1), ("MUFU", 0), ("HMMA", 0), ("BAR", 0))),
        Step("totals", (("LDG.64", 1), ("MUFU", 1), ("HMMA", 0), ("BAR", 0))),
    )
    sums = Work((Step("tiles", (("SHFL", 4),), inside=(channels,)),), times | {"tiles": of_span * seen})
    # The first two warps of a block merge the spans' sums, a row in each lane.
    cached = {"maxima": 1.0, "totals": 1.0}
    columns = tuple(
        Work((Step("tiles", (("MUFU+", 32),), inside=inside),), times | {"tiles": row_tiles * seen}, 0.5, cached)
        for inside in ((*merged, channels), (channels,))
    )

    def plan(kernel: str, work: tuple[Work, ...], number: int, blocks: int) -> Plan:
        name = f"{kernel}_kernel<{parts}, (DType)1>"
        return Plan("kv/saliency", name, work, case.passes[number].bytes, blocks, THREADS, "tiles", TILE * TILE / WARPS)

    return [plan("sums", (sums,), 0, heads * row_tiles * spans), plan("columns", columns, 1, heads * tiles)]
