# SPDX-License-Identifier: Apache-2.0
"""What is counted is launched: the launchers' grids against those of `counting`, on the benchmark's shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import pytest
import torch

pytest.importorskip("rich")

from counting import cubins, cut, kv, spectral
from counting.calls import Call, calls, decode
from counting.gpus import GPUS, Gpu
from counting.roofline import resident
from singlepass.bench.kv.caches import DECODE, DEQUANTIZE, HEADS, PROJECT, QUANTIZE, SALIENCY
from singlepass.bench.registry import Case, cases
from singlepass.bench.spectral import layers

from ..simt.build import cubin_folder
from ..simt.ops import library, overload


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


def native(call: Call) -> Callable[[], object]:
    return partial(call.on, overload(call.op))


MIXES = [[(4, 128, 19622), (2, 32, 13082)], [(4, 128, 32704)], [(2, 32, 500), (8, 128, 40)], [(4, 128, 1_000_000)], []]


@pytest.mark.slow("the first one waits until the kernels are compiled for the CPU")
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_heads_are_cut_as_counted(mix: list[tuple[int, int, int]]) -> None:
    """For GPUs of any size."""
    parts = [kv.Tokens(*part) for part in mix]
    stretches = [cut.Stretch(part.slots, part.bits + 2) for part in parts]
    stretches.append(cut.window(kv.WINDOW, torch.bfloat16.itemsize))
    for batch in (1, 3, 8):
        run, heads = native(decode(parts, batch, torch.bfloat16)), batch * HEADS
        for places in (1, 30, 396, 432, 528, 592, 5000):
            ((blocks, threads, _),) = launched(places, run)
            assert (blocks, threads) == (heads * sum(cut.splits(stretches, heads, places)), kv.THREADS)


OTHERS = [
    case
    for case in cases(torch.device("cuda"))
    if (case.family == "spectral" and spectral.plans(case, GPUS[0]))
    or case.op in (QUANTIZE, DEQUANTIZE, PROJECT, SALIENCY)
]


@pytest.mark.slow("the first one waits until the kernels are compiled for the CPU")
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_others_are_launched_as_counted(case: Case) -> None:
    plans = (spectral.plans if case.family == "spectral" else kv.plans)(case, GPUS[0])
    found = [shape for call in calls(case) for shape in launched(1, native(call))]
    if case.op == layers.UPDATE:
        found = found[1::2]  # ahead of each step, the table of its tensors is made
    assert [(plan.blocks, plan.threads, plan.shared) for plan in plans] == found


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
    (call,) = calls(case)
    assert launched(places, native(call)) == [(plan.blocks, plan.threads, plan.shared)]
