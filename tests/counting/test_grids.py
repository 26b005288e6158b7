# SPDX-License-Identifier: Apache-2.0
"""What is counted is launched: the launchers' grids against those of `counting`, on the benchmark's shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from counting import cubins, cut, kv
from counting.gpus import GPUS, Gpu
from counting.roofline import resident
from singlepass._ops import kv as ops
from singlepass.bench.kv.caches import DECODE, QUERY_HEADS
from singlepass.bench.registry import Case, cases

from ..simt.build import cubin_folder
from ..simt.ops import library, overload

HEADS, WIDTH = kv.HEADS, kv.WIDTH


class Shape(ctypes.Structure):
    _fields_ = (("blocks", ctypes.c_int64), ("threads", ctypes.c_int64), ("shared", ctypes.c_int64))


def launched(places: int, run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """Blocks, their threads and their dynamic shared memory, of each launch on a GPU with so many places for blocks.
    Nothing runs, so that tensors need no values, and no memory."""
    functions = ctypes.CDLL(str(library()))
    shapes = ctypes.POINTER(Shape)()
    functions.simt_finish_recording.restype = ctypes.c_int64
    functions.simt_start_recording(places)
    try:
        run()
    finally:
        count = functions.simt_finish_recording(ctypes.byref(shapes))
    return [(shapes[i].blocks, shapes[i].threads, shapes[i].shared) for i in range(count)]


def segment(tokens: kv.Tokens, batch: int) -> list[Tensor]:
    """In ZipCache's layout."""
    slots, blocks = tokens.slots, -(-tokens.slots // tokens.block)
    starts = (torch.arange(blocks + 1) * tokens.block).clamp(max=slots).int()
    half = {"dtype": torch.float16}
    codes = [torch.empty(batch, HEADS, slots, WIDTH * tokens.bits // 8, dtype=torch.uint8) for _ in range(2)]
    return [
        codes[0], torch.empty(batch, HEADS, blocks, 2, WIDTH, **half),
        codes[1], torch.empty(batch, HEADS, slots, 2, 1, **half),
        torch.empty(batch, HEADS, blocks, WIDTH, **half), starts, starts.diff().expand(batch, HEADS, -1).contiguous(),
    ]  # fmt: skip


def decode_of(parts: Sequence[kv.Tokens], batch: int, dtype: torch.dtype) -> Callable[[], object]:
    """A call of the op."""
    q = torch.empty(batch, QUERY_HEADS, 1, WIDTH, dtype=dtype)
    windows = [torch.empty(batch, HEADS, kv.WINDOW, WIDTH, dtype=dtype) for _ in range(2)]
    ends = torch.tensor([[0, kv.WINDOW]] * batch, dtype=torch.int32)
    segments = [tensor for part in parts for tensor in segment(part, batch)]
    options: dict[str, Any] = {"bits": [part.bits for part in parts], "key_axis": 0, "scale": 1.0, "softcap": 0.0}
    run = overload(ops.decode)
    return lambda: run(q, segments, *windows, ends, None, None, **options)


MIXES = [[(4, 128, 19622), (2, 32, 13082)], [(4, 128, 32704)], [(2, 32, 500), (8, 128, 40)], [(4, 128, 1_000_000)], []]


@pytest.mark.slow("the first one waits until the kernels are compiled for the CPU")
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_heads_are_cut_as_counted(mix: list[tuple[int, int, int]]) -> None:
    """For GPUs of any size."""
    parts = [kv.Tokens(*part) for part in mix]
    stretches = [cut.Stretch(part.slots, cut.UNIT, part.bits + 2) for part in parts]
    stretches.append(cut.Stretch(kv.WINDOW, cut.WINDOW_UNIT, cut.RESTORED))
    for batch in (1, 3, 8):
        run, heads = decode_of(parts, batch, torch.bfloat16), batch * HEADS
        for places in (1, 30, 396, 432, 528, 592, 5000):
            ((blocks, threads, _),) = launched(places, run)
            assert (blocks, threads) == (heads * sum(cut.splits(stretches, heads, places)), kv.THREADS)


def planned() -> list[tuple[Gpu, Case]]:
    return [(gpu, case) for gpu in GPUS for case in cases(torch.device("cuda")) if case.op == DECODE]


@pytest.mark.deep("reads cubins, which that tier compiles")
@pytest.mark.xdist_group("cubins")
@pytest.mark.skipif(cubins.tool("nvcc") is None or cubins.tool("cuobjdump") is None, reason="no CUDA toolkit")
@pytest.mark.parametrize(("gpu", "case"), planned(), ids=lambda x: x.name)
def test_decode_is_launched_as_counted(gpu: Gpu, case: Case) -> None:
    cubin_folder()
    (plan,) = kv.plans(case, gpu)
    launch = plan.compiled(gpu.arch).launch(gpu)
    places = gpu.sms * resident(gpu, launch.warps, launch.registers, launch.shared)
    run = decode_of(kv.compressed(case), kv.SHAPE[case.size].batch, case.dtype)
    assert launched(places, run) == [(plan.blocks, plan.threads, plan.shared)]
