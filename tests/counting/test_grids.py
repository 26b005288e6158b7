# SPDX-License-Identifier: Apache-2.0
"""What is counted is launched: the launchers' grids against those of `counting`, on the benchmark's shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from counting import cubins, cut, kv, spectral
from counting.gpus import GPUS, Gpu
from counting.roofline import resident
from singlepass._ops import OPS
from singlepass._ops import kv as ops
from singlepass._ops import spectral as spectral_ops
from singlepass.bench.kv.caches import DECODE, DEQUANTIZE, PROBES, PROJECT, QUANTIZE, QUERY_HEADS, RANK, SALIENCY
from singlepass.bench.registry import Case, cases
from singlepass.bench.spectral import layers

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
    stretches = [cut.Stretch(part.slots, part.bits + 2) for part in parts]
    stretches.append(cut.window(kv.WINDOW, torch.bfloat16.itemsize))
    for batch in (1, 3, 8):
        run, heads = decode_of(parts, batch, torch.bfloat16), batch * HEADS
        for places in (1, 30, 396, 432, 528, 592, 5000):
            ((blocks, threads, _),) = launched(places, run)
            assert (blocks, threads) == (heads * sum(cut.splits(stretches, heads, places)), kv.THREADS)


def codec_of(part: kv.Tokens, by_channels: bool, back: bool) -> Callable[[], object]:
    """A call that quantises or restores keys or values of one sequence."""
    tensors = segment(part, 1)
    codes, scales, channels = (tensors[0], tensors[1], None) if by_channels else (tensors[2], tensors[3], tensors[4])
    plain, (starts, counts) = torch.empty(1, HEADS, part.slots, WIDTH), tensors[5:]
    options = {"bits": part.bits, "axis": 0 if by_channels else 1}
    if back:
        return lambda: overload(ops.dequantize_)(codes, scales, channels, None, starts, counts, plain, **options)
    return lambda: overload(ops.quantize_)(plain, None, starts, counts, codes, scales, channels, **options)


def appended(case: Case) -> Callable[[], object]:
    x = [torch.empty(1, HEADS, 1, WIDTH, dtype=case.dtype) for _ in "kv"]
    bases, out = (
        [torch.empty(HEADS, WIDTH, RANK) for _ in "kv"],
        [torch.empty(1, HEADS, 1, RANK, dtype=case.dtype) for _ in "kv"],
    )
    return lambda: overload(ops.project_)(x, bases, None, None, out, heads=list(range(HEADS)))


def probed(case: Case) -> Callable[[], object]:
    length = kv.SHAPE[case.size].length
    q = torch.empty(1, QUERY_HEADS, min(PROBES, length // 10), WIDTH, dtype=case.dtype)
    k, positions = torch.empty(1, HEADS, length, WIDTH, dtype=case.dtype), torch.zeros(q.shape[2], dtype=torch.int64)
    return lambda: overload(ops.saliency)(q, k, positions, None, None, scale=1.0)


def stepped(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    params, grads = ([torch.empty(shape, dtype=dtype) for shape in shapes] for _ in "pg")
    states = [[torch.empty(shape) for shape in shapes] for _ in "mv"]
    counts, lr = [torch.empty(()) for _ in shapes], torch.tensor(0.1)
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    overload(spectral_ops.step_)(params, grads, *states, counts, lr, **options)


def updated(case: Case) -> None:
    ranks = [(round(layers.RANK * min(layer)), layer) for layer in layers.MODEL]
    stepped([(rank, columns) for rank, layer in ranks for columns in layer], case.dtype)
    stepped([(min(layer),) for layer in layers.MODEL], case.dtype)


def on_layer(case: Case) -> Callable[[], object]:
    shape = spectral.SHAPE[case.size]
    x, other = (torch.empty(shape.tokens, shape.width, dtype=case.dtype) for _ in "xy")
    run = overload(OPS[case.op])
    if case.op == layers.SCALE:
        return lambda: run(x, other, torch.empty(shape.width))
    arguments = (x, other, torch.empty(())) if case.op == layers.LORENTZ_BACKWARD else (x, torch.empty(()))
    return lambda: run(*arguments, k=1.0, offset=1.1)


OTHERS = [
    case
    for case in cases(torch.device("cuda"))
    if (case.family == "spectral" and spectral.plans(case, GPUS[0]))
    or case.op in (QUANTIZE, DEQUANTIZE, PROJECT, SALIENCY)
]


def calls(case: Case) -> list[Callable[[], object]]:
    if case.op in (QUANTIZE, DEQUANTIZE):
        parts = [(part, by_channels) for part in kv.compressed(case) for by_channels in (True, False)]
        return [codec_of(*part, back=case.op == DEQUANTIZE) for part in parts]
    if case.op == layers.UPDATE:
        return [partial(updated, case)]
    return [{PROJECT: appended, SALIENCY: probed}.get(case.op, on_layer)(case)]


@pytest.mark.slow("the first one waits until the kernels are compiled for the CPU")
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_others_are_launched_as_counted(case: Case) -> None:
    plans = (spectral.plans if case.family == "spectral" else kv.plans)(case, GPUS[0])
    found = [shape for run in calls(case) for shape in launched(1, run)]
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
    run = decode_of(kv.compressed(case), kv.SHAPE[case.size].batch, case.dtype)
    assert launched(places, run) == [(plan.blocks, plan.threads, plan.shared)]
