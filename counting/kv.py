# SPDX-License-Identifier: Apache-2.0
"""The launches of KV caches: attention over compressed tokens, saliency, restoring tokens, and projecting new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

from singlepass.bench.kv.caches import (
    BLOCK,
    DECODE,
    DEQUANTIZE,
    HEADS,
    PROBES,
    PROJECT,
    QUANTIZE,
    QUERY_HEADS,
    RANK,
    REGULAR_BLOCK,
    SALIENCY,
    SALIENT_RATIO,
    SHAPES,
    WIDTH,
    WINDOW,
)
from singlepass.bench.registry import Case

from . import cut
from .gpus import Gpu
from .paths import Step
from .plan import Plan, Tail, Work, kernel
from .roofline import resident

THREADS, WARPS, ROWS, CHUNK = 128, 4, 4, 32  # csrc/kv/decode.h, decode_codes.h
KEPT, OWN = 128, 32  # csrc/kv/saliency_tile.h: lines that a thread block keeps, and each of its warps
LEAST_SPAN, MAX_KEY_SPANS, MAX_ROW_SPANS, SPAN_UNIT = 512, 8, 2, 64  # csrc/kv/saliency.cu
CODEC_THREADS, PIECE = 256, 16  # csrc/kv/pieces.h
FROM_FLOAT16 = "HADD2.F32"  # converts a number
NAN = "0x7fc00000"  # which numbers that are not finite become before they are encoded
COLUMN_TILE, CHANNELS = 16, 128  # csrc/kv/project.cu: of a launch for a few rows
MAXIMA, MERGED = 4 * 32, 4  # splits that a pass of the merge's loops takes
# RestoredShared::bytes: a tile of tokens, logits of each warp, weights and factors of rows, and queries.
SHARED = 4 * (CHUNK * (THREADS + 4) + WARPS * ROWS * CHUNK + CHUNK * ROWS + ROWS + ROWS * WIDTH)
SHAPE = {shape.name: shape for shape in SHAPES["cuda"]}
GROUP = QUERY_HEADS // HEADS


def plans(case: Case, gpu: Gpu) -> list[Plan]:
    if case.op == SALIENCY:
        return saliency(case)
    if case.op == QUANTIZE:
        return [
            encode(part, by_channels, case.dtype.itemsize) for part in compressed(case) for by_channels in (True, False)
        ]
    if case.op == DEQUANTIZE:
        return [restore(part, by_channels) for part in compressed(case) for by_channels in (True, False)]
    if case.op == PROJECT:
        return [project(case)]
    if case.op != DECODE:
        return []
    heads = SHAPE[case.size].batch * HEADS
    return [decode(compressed(case), heads, case.bytes, case.dtype.itemsize, gpu)]


def compressed(case: Case) -> tuple[Tokens, Tokens]:
    """What ZipCache makes of the tokens before the window."""
    slots = SHAPE[case.size].length - WINDOW
    salient = round(SALIENT_RATIO * slots)
    return Tokens(4, BLOCK, salient), Tokens(2, REGULAR_BLOCK, slots - salient)


def decode(tokens: Sequence[Tokens], heads: int, moved: float, itemsize: int, gpu: Gpu) -> Plan:
    """The splits of all segments and of the window. The last block of each head sums them, a row in each warp: that
    comes from the L2 cache, and is no part of the floor."""
    name = f"decode_kernel<{WIDTH}, 1, {halves(itemsize)}>"
    compiled = kernel("kv/decode", gpu.arch, name)
    places = gpu.sms * resident(gpu, WARPS, compiled.registers, compiled.shared + SHARED)
    stretches = (
        *(cut.Stretch(part.slots, part.bits + 2) for part in tokens),
        cut.window(WINDOW, itemsize),
    )
    numbers = cut.splits(stretches, heads, places)
    every = sum(numbers)
    segments = [Segment(**vars(part), splits=n) for part, n in zip(tokens, numbers, strict=False)]
    work = [part for segment in segments for part in segment.work(every, itemsize)]
    work += window_work(numbers[-1], every, itemsize)
    merged = Work((*work[0].steps, Step("rows", inside=merge_loops())), merge_times(every))
    return Plan(
        "kv/decode", name, tuple(work), moved, heads * every, THREADS, "chunks", CHUNK * WIDTH * 2, SHARED,
        tail=Tail(merged, work[0], 1 / every),
    )  # fmt: skip


def merge_loops() -> tuple[Step, ...]:
    """Of a row: over the maxima of splits, and over their results. The factors of 32 splits are made in a branch."""
    merged = Step("merged", (("LDGSTS.128", MERGED), ("SHFL", MERGED), ("LDG.32", 0)))
    return Step("maxima", (("LDG.32", MAXIMA // 32),)), merged


def merge_times(splits: int) -> dict[str, float]:
    return {"maxima": ceil(splits / MAXIMA), "merged": ceil(splits / MERGED)}


def queries(itemsize: int) -> Step:
    """Threads share each row: one pass for eight channels each."""
    return Step("queries", (("LDG.128", itemsize // 2), ("STS.128", 2)))


def halves(itemsize: int) -> int:
    """Integers of two limbs that stand for a number."""
    return 2 if itemsize == 4 else 1


@dataclass(frozen=True)
class Tokens:
    """Tokens of one bit width, in blocks."""

    bits: int
    block: int
    slots: int


@dataclass(frozen=True)
class Segment(Tokens):
    """The same in splits, of which each warp takes a stretch."""

    splits: int

    @property
    def stretch(self) -> float:
        """Tokens of a warp, on average over the splits."""
        return self.slots / self.splits / WARPS

    def work(self, splits: int, itemsize: int) -> list[Work]:
        """A warp's way through its stretch: queries, then chunks of each block's tokens.

        The usual way is taken: chunks are whole, nothing is masked, and after the first chunk no logit is so large that
        sums are rescaled. A pass of the loop is then of one of three kinds. Each is given as work of a share of the
        warps, all of whose passes are such: averages are the same.
        """
        passes, blocks = self.stretch / CHUNK, 1 + (self.stretch - CHUNK) / self.block  # which begin anywhere
        kinds = (
            (passes - blocks, self.chunk(itemsize)),
            (blocks - 1, self.chunk(itemsize, enters=True)),
            (1, self.chunk(itemsize, enters=True, rescales=True)),
        )
        times = {
            "search": ceil(log(self.slots / self.block + 1, 32)),
            "blocks": blocks,
            "chunks": passes / blocks,
        }
        # Queries and the blocks' places are read by many.
        cached = {"search": 1.0, "queries": 1.0, "blocks": 1.0}
        elsewhere = ("STS.128", "LDS.32", "LDS.64", "SHFL", "FMNMX", "FMNMX3")
        before = (Step("search", (("LDG.32", 1),), avoids=elsewhere), queries(itemsize))
        share = self.splits / splits
        return [
            Work((*before, Step("blocks", inside=(chunk,))), times, share * count / passes, cached)
            for count, chunk in kinds
        ]

    def chunk(self, itemsize: int, enters: bool = False, rescales: bool = False) -> Step:
        """One pass. enters: a block, whose scales go into the queries. rescales: sums, as a logit is larger than all
        before."""
        limbs = halves(itemsize)
        loads = {32: 4, 64: 4 * self.words + 3 * enters, 128: 0}  # scales of values, codes of keys, scales of a block
        loads[32 * self.words] += 8  # codes of values
        does = {f"LDG.{bits}": count for bits, count in loads.items()} | {
            "IMMA": 16 * limbs,
            "SHFL": 6 + 2 * limbs + 18 * enters + 3 * rescales,
            "STS.32": ROWS * 2 * limbs * enters,
        }
        return Step("chunks", tuple(does.items()))

    @property
    def words(self) -> int:
        """That the codes of 16 channels fill."""
        return self.bits // 2


def window_work(splits: int, every: int, itemsize: int) -> list[Work]:
    """The way of a warp through chunks of the window, in so many of all splits, and that of a warp which finds none.

    Products of keys are in a loop over their channels, those of values in another one where they are float32.
    """
    chunks = WINDOW / CHUNK / WARPS / splits
    busy = min(1.0, chunks)  # of the warps
    parts, vectors = itemsize // 2, WIDTH * itemsize // 64  # TF32 of a number; loads of a token by four lanes
    keys = Step("keys", (("HMMA", 8), ("LDG.128", 4), ("LDS.128", 2 // parts)), avoids=(FROM_FLOAT16,))
    if parts == 1:
        chunk = Step("window", (("HMMA", 32), ("LDG.128", 16)), avoids=(FROM_FLOAT16,), inside=(keys,))
    else:
        chunk = Step("window", inside=(keys, Step("values", (("HMMA", 16), ("LDG.128", 8)))))
    rows = Step("queries", (("LDG.128", itemsize // 2), ("STS.128", 4)))
    times = {"keys": float(vectors), "values": vectors / 2}
    return [
        Work((rows, chunk), {**times, "window": count}, share * splits / every, cached={"queries": 1.0})
        for share, count in ((busy, chunks / busy), (1.0 - busy, 0.0))
        if share
    ]


def saliency(case: Case) -> list[Plan]:
    """Sums of rows over spans of the keys, then of columns over spans of the rows. Rows are probes at sorted random
    places, so that n neighbours see at least (1 - n / probes) / 2 of the tokens, and at most (1 + n / probes) / 2."""
    shape = SHAPE[case.size]
    probes = min(PROBES, shape.length // 10)
    heads, rows = shape.batch * HEADS, GROUP * probes
    key_span, row_span = span(shape.length, MAX_KEY_SPANS), span(rows, MAX_ROW_SPANS)
    parts, lines = (1, 32) if case.dtype.itemsize == 2 else (3, 64)

    def most(neighbours: int) -> float:
        return (1 + min(1.0, neighbours / probes)) / 2

    def work(tiles: float, brought: float, neighbours: int) -> tuple[Work, ...]:
        """Of a warp's tiles, the share `brought` comes to shared memory. So many neighbouring rows decide which it
        multiplies, and which of them it masks."""
        some = most(neighbours)
        kinds = (
            (1 - some, products(parts)),
            (2 * some - 1, products(parts, masks=True)),
            (brought - some, idle(parts)),
        )
        # What others bring, too: places of rows and, where kept lines do not stay in registers, those.
        cached = {"tiles": 1.0, "units": 1.0}
        times = {"tiles": tiles * brought, "steps": 2.0, "units": 4.0}
        return tuple(Work((step,), times, share / brought, cached) for share, step in kinds if share > 0)

    def plan(kernel: str, kinds: tuple[Work, ...], number: int, blocks: int) -> Plan:
        name = f"{kernel}_kernel<{parts}, (DType)1, {str(parts == 1).lower()}>"
        return Plan("kv/saliency", name, kinds, case.passes[number].bytes, blocks, THREADS, "tiles", lines * OWN)

    sums = work(key_span / lines, most(KEPT), OWN)
    columns = work(row_span / lines, most(lines), lines)
    return [
        plan("sums", sums, 0, heads * ceil(rows / KEPT) * ceil(shape.length / key_span)),
        plan("columns", columns, 1, heads * ceil(shape.length / KEPT) * ceil(rows / row_span)),
    ]


def span(lines: int, most: int) -> int:
    return SPAN_UNIT * ceil(max(LEAST_SPAN, lines / most) / SPAN_UNIT)


def products(parts: int, masks: bool = False) -> Step:
    """A tile that the warp multiplies. Three parts of a float32, of whose products six are made, go through two steps
    of four units of channels."""
    weights = 32 if parts == 1 else 64
    does = (("MUFU.EX2", weights), ("FSEL", weights * masks))
    if parts == 1:
        return Step("tiles", (*does, ("HMMA", 64), ("LDGSTS.128", 4)), avoids=("MUFU.TANH",))
    units = Step("units", (("HMMA", 6 * 16), ("LDG.128", 4)))
    return Step("tiles", does, avoids=("MUFU.TANH",), inside=(Step("steps", (("LDGSTS.128", 8),), inside=(units,)),))


def idle(parts: int) -> Step:
    """A tile that the warp helps to bring for others."""
    if parts == 1:
        return Step("tiles", (("LDGSTS.128", 4),), avoids=("HMMA", "MUFU.EX2"))
    return Step("tiles", avoids=("MUFU.EX2",), inside=(Step("steps", (("LDGSTS.128", 8),), avoids=("HMMA",)),))


def encode(tokens: Tokens, by_channels: bool, itemsize: int) -> Plan:
    """Keys or values of one sequence, twice: for what belongs to channels, which lanes and warps then merge, and for
    codes, when tokens come from a cache."""
    blocks, run = ceil(tokens.slots / tokens.block), 2 * tokens.bits * itemsize  # bytes of neighbouring channels
    load = (f"LDG.{min(128, 8 * run)}", PIECE * itemsize // min(16, run)), ("0xffff0000+", PIECE // 2 * (itemsize == 2))
    words = (f"STG.{16 * tokens.bits}", 1)
    largest = Step("largest", (("SHFL", PIECE), ("FMNMX+", PIECE)))
    least = Step("least", (("SHFL", PIECE), ("FMNMX", 0)))
    first = Step("first", load, avoids=(words[0], "STG.8", NAN))
    scales = Step("scales", (("LDS.32", 16),) if by_channels else (("LDS.32", 8), ("MUFU.RSQ", 1)))
    codes = Step("codes", (*load, words), inside=() if by_channels else (Step("lanes", (("SHFL", 2),)),))
    steps = (first, *((least,) if by_channels else ()), largest, scales, codes)
    together = CODEC_THREADS * PIECE / WIDTH
    passes = tokens.slots / blocks / together
    times = {"first": passes, "codes": passes, "least": 2.0, "largest": 2.0, "lanes": 3.0}
    times["scales"] = WIDTH / CODEC_THREADS
    work = Work(steps, times, cached={"codes": 1.0})
    of_scales = 4 * WIDTH * blocks if by_channels else 4 * tokens.slots + 2 * WIDTH * blocks
    moved = HEADS * (tokens.slots * WIDTH * (tokens.bits / 8 + itemsize) + of_scales)
    kernel = f"quantize_by_{'channels' if by_channels else 'tokens'}_kernel<{tokens.bits}>"
    return Plan("kv/quantize", kernel, (work,), moved, HEADS * blocks, CODEC_THREADS, "codes", 32 * PIECE)


def restore(tokens: Tokens, by_channels: bool) -> Plan:
    """Keys, whose scales belong to channels, or values of one sequence: a thread block for each block of tokens of a
    head. A thread takes 16 channels of a token, runs of neighbours, and reads the token's scales for each run."""
    runs, blocks = PIECE // (2 * tokens.bits), ceil(tokens.slots / tokens.block)
    codes, halves = f"LDG.{16 * tokens.bits}", 0 if by_channels else 2 * runs
    step = Step("tokens", ((codes, 1), ("LDG.16", halves), ("STG.128", PIECE // 4)))
    work = Work((step,), {"tokens": tokens.slots / blocks / (CODEC_THREADS * PIECE / WIDTH)})
    scales = 4 * WIDTH * blocks if by_channels else 4 * tokens.slots + 2 * WIDTH * blocks
    moved = HEADS * (tokens.slots * WIDTH * (tokens.bits / 8 + 4) + scales)
    kernel = f"dequantize_kernel<{tokens.bits}, {str(by_channels).lower()}>"
    return Plan("kv/dequantize", kernel, (work,), moved, HEADS * blocks, CODEC_THREADS, "tokens", 32 * PIECE)


def project(case: Case) -> Plan:
    """Keys and values of one token: a tile of 16 columns of a head in each block, whose warps share the channels.
    Float32 is three parts, of whose nine products with those of the basis six are made."""
    parts = 1 if case.dtype.itemsize == 2 else 3
    part = Step("parts", (("HMMA", 12 if parts == 1 else 8),))
    bring = Step("channels", (("LDG.128", case.dtype.itemsize + 4),), inside=(part,))
    work = Work((bring,), {"channels": WIDTH / CHANNELS, "parts": parts})
    blocks = 2 * HEADS * SHAPE[case.size].batch * RANK // COLUMN_TILE
    name = f"project_kernel<{COLUMN_TILE}>"
    return Plan("kv/project", name, (work,), case.bytes, blocks, THREADS, "channels", COLUMN_TILE * WIDTH / WARPS)
