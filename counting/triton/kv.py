# SPDX-License-Identifier: Apache-2.0
"""The launches of KV caches: attention over compressed tokens, saliency, restoring tokens, and projecting new ones."""

from __future__ import annotations

from math import ceil

from singlepass.bench.kv.caches import DECODE, DEQUANTIZE, PROBES, PROJECT, QUANTIZE, SALIENCY
from singlepass.bench.registry import Case

from .. import kv
from ..paths import Step
from ..plan import Plan, Work, accesses, summed
from .plan import ITEMSIZE, plan
from .recorder import Launch

PACKED = (1 << 62) - 1  # the bits in which arguments.unspecialized() puts twice an integer, and one


def codec(case: Case, launches: list[Launch]) -> list[Plan]:
    """A program for each block of a head. It reads tokens for their extremes or their channels' factors, then once more
    to encode them, when they come from a cache."""
    parts = [(part, by_channels) for part in kv.compressed(case) for by_channels in (True, False)]
    found: list[Plan] = []
    for (part, by_channels), launch in zip(parts, launches, strict=True):
        a = launch.arguments
        codes = a["TILE"] * a["BLOCK_W"] // launch.threads  # bytes of a thread, of a tile
        each, size = codes * 8 // part.bits, ITEMSIZE[a["STORAGE"]]
        tiles = ceil(part.slots / ceil(part.slots / part.block)) / a["TILE"]
        if a["QUANTIZE"]:
            loads, stores = accesses("LDG", size, each), accesses("STG", 1, codes)
            steps: tuple[Step, ...] = Step("first", loads, avoids=(stores[0][0],)), Step("codes", summed(loads, stores))
            moved, cached = kv.encode(part, by_channels, case.dtype.itemsize).bytes, {"codes": 1.0}
        else:
            steps = (Step("codes", summed(accesses("LDG", 1, codes), accesses("STG", size, each))),)
            moved, cached = kv.restore(part, by_channels).bytes, {}
        work = Work(steps, {"first": tiles, "codes": tiles}, cached=cached)
        found.append(plan(launch, "kv", (work,), moved, "codes", 32 * each))
    return found


def unpacked(number: int) -> int:
    return (number & PACKED) >> 1


def decode(case: Case, launches: list[Launch]) -> list[Plan]:
    """A program for each split of a head: some blocks of a segment, or the window. Partial results are written to
    memory, and read from there."""
    attend, merge = launches
    a, heads = attend.arguments, kv.SHAPE[case.size].batch * kv.HEADS
    partials = heads * a["splits"] * a["group"] * a["queries"] * 4 * (a["VALUE_DIM"] + 2)
    work = []
    for part, segment in zip(kv.compressed(case), a["segments"], strict=True):
        blocks, splits = ceil(part.slots / part.block), unpacked(segment[-1])
        # A thread copies so many bytes of a tile's codes of keys to shared memory.
        copied = a["TILE"] * kv.WIDTH * part.bits // 8 // attend.threads
        does = ("HMMA", 16), ("LDGSTS.64", 2), ("LDGSTS.128", int(copied == 16))
        step = Step("blocks", inside=(Step("tiles", does),))
        times = {"blocks": blocks / splits, "tiles": part.slots / blocks / a["TILE"]}
        work.append(Work((step,), times, splits / a["splits"]))
    size = case.dtype.itemsize
    window = Step("window", (("HMMA", 8 * size), ("LDG.128", 4 * size), ("LDGSTS.64", 0)))
    work.append(Work((window,), {"window": kv.WINDOW / a["TILE"]}, 1 / a["splits"]))
    return [
        plan(attend, "kv", tuple(work), case.bytes + partials, "tiles", a["TILE"] * kv.WIDTH * 2 / 4),
        merged(merge, partials),
    ]


def merged(launch: Launch, partials: float) -> Plan:
    """Over the maxima of splits, then over their results, which come from the L2 cache. A thread takes a channel of a
    split at a time, with its maximum, and once a pass that of a split with its sum."""
    a = launch.arguments
    each = a["BLOCK_S"] * a["BLOCK_V"] // launch.threads
    maxima = Step("maxima", (("LDG.32", 1),), avoids=("MUFU.EX2",))
    merged = Step("merged", (("LDG.32", 2 * each + 2), ("MUFU.EX2", each + 1)))
    passes = ceil(a["splits"] / a["BLOCK_S"])
    work = Work((maxima, merged), {"maxima": passes, "merged": passes}, cached={"maxima": 1.0, "merged": 1.0})
    return plan(launch, "kv", (work,), partials, "merged", 32 * each)


def saliency(case: Case, launches: list[Launch]) -> list[Plan]:
    """A program for a tile of rows, which goes through all keys that one of them sees, then one for a tile of keys,
    which goes through all rows and multiplies those that see one of the keys."""
    sums, columns = launches
    a, length = sums.arguments, kv.SHAPE[case.size].length
    probes = min(PROBES, length // 10)
    products = 64 if case.dtype.itemsize == 2 else 48
    some = (1 + min(1.0, a["BLOCK_R"] / probes)) / 2  # of the keys, on average of tiles of sorted random probes
    tiles = Step("tiles", (("HMMA", products), ("LDGSTS.128", 8)))
    # Others bring the keys to the cache, too.
    of_rows = Work((tiles,), {"tiles": some * length / a["BLOCK_T"]}, cached={"tiles": 1.0}, streamed="LDG.128")
    kinds = Step("tiles", (("HMMA", products), ("LDG.128", 4))), Step("tiles", (("LDG.64+", 1),), avoids=("HMMA",))
    of_columns = tuple(
        Work((step,), {"tiles": a["rows"] / a["BLOCK_R"]}, share, {"tiles": 1.0}, "LDG.128")
        for step, share in zip(kinds, (some, 1 - some), strict=True)
    )
    elements = a["BLOCK_R"] * a["BLOCK_T"] / (sums.threads // 32)
    return [
        plan(sums, "kv", (of_rows,), case.passes[0].bytes, "tiles", elements),
        plan(columns, "kv", of_columns, case.passes[1].bytes, "tiles", elements),
    ]


def project(case: Case, launches: list[Launch]) -> list[Plan]:
    """Keys, then values of one token: a program for each head, which goes through the channels of its basis."""
    found: list[Plan] = []
    for launch in launches:
        a = launch.arguments
        step = Step("channels", (("LDGSTS.128+", 4), ("STG.32", 0), ("STG.16", 0)))
        work = Work((step,), {"channels": ceil(a["HEAD_DIM"] / a["BLOCK_D"])})
        elements = a["BLOCK_D"] * a["RANK"] / (launch.threads // 32)
        found.append(plan(launch, "kv", (work,), case.bytes / len(launches), "channels", elements))
    return found


PLANS = {DECODE: decode, QUANTIZE: codec, DEQUANTIZE: codec, PROJECT: project, SALIENCY: saliency}
