# SPDX-License-Identifier: Apache-2.0
"""What tests/test_ops.py asks of each op of this family: arguments, and the tests that compare it with float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from singlepass._ops import kv as ops
from singlepass.kv import quantize

from ..samples import Sample
from . import test_attention, test_functional, test_projection, test_saliency, test_step
from .inputs import Attention, attention, tokens
from .test_attention import CODECS, RAGGED

FLOAT64 = {
    ops.decode: test_attention.test_against_float64,
    ops.dequantize_: test_functional.test_against_float64,
    ops.quantize_: test_functional.test_against_float64,
    ops.project_: test_projection.test_against_float64,
    ops.saliency: test_saliency.test_against_float64,
    ops.step_: test_step.test_against_float64,
}


def codecs() -> Iterator[Sample]:
    layouts = {"contiguous": torch.float32, "transposed": torch.bfloat16, "narrowed": torch.float16}
    index = torch.randperm(21).int()[:13].expand(2, 2, -1).contiguous()
    for axis, (layout, dtype), chosen in product(ops.AXES, layouts.items(), (None, index)):
        x = tokens((2, 2, 21, 32), dtype, layout)
        separable: dict[str, Any] = {"channel_separable": True, "group": 16} if axis == "token" else {}
        q = quantize(x if chosen is None else x[:, :, :13], 4, axis=axis, block=8, **separable)
        parts, options = (q.codes, q.scales, q.channels), {"bits": 4, "axis": ops.AXES.index(axis)}
        yield Sample(ops.quantize_, (x, chosen, q.starts, q.counts, *parts), options)
        out = torch.zeros_like(x.contiguous())
        yield Sample(ops.dequantize_, (*parts, chosen, q.starts, q.counts, out), options)


def saliencies() -> Iterator[Sample]:
    for layout in ("contiguous", "transposed"):
        q, k = tokens((2, 4, 5, 32), layout=layout), tokens((2, 2, 21, 32), layout=layout)
        positions = torch.tensor([20, 3, 3, 9, 0])
        yield Sample(ops.saliency, (q, k, positions, None, None), {"scale": 0.2})
        mask, lse = torch.ones(2, 21, dtype=torch.bool), torch.zeros(2, 4, 5)
        yield Sample(ops.saliency, (q, k, positions, mask, lse), {"scale": 0.2, "softcap": 5.0})


def projections() -> Iterator[Sample]:
    for layout, channels in (("contiguous", 0), ("transposed", 32)):
        x, bases = tokens((2, 4, 9, 32), layout=layout), test_projection.bases(32)
        out = [torch.zeros(2, n, 9, rank) for n, rank in test_projection.RAGGED]
        cos, sin = test_projection.turns(x, channels) if channels else (None, None)
        yield Sample(ops.project_, ([x], bases, cos, sin, out), {"heads": test_projection.HEADS})


def decode(case: Attention) -> Sample:
    """The op's arguments in a call of the public function."""
    parts = []
    for keys, values in case.segments:
        channels = values.scales.new_empty(0) if values.channels is None else values.channels
        parts += [keys.codes, keys.scales, values.codes, values.scales, channels, keys.starts, keys.counts]
    axis = int(bool(case.segments) and case.segments[0][0].axis == "token")
    bits = [keys.bits for keys, _ in case.segments]
    arguments = (case.q, parts, case.window_k, case.window_v, case.window, case.sinks, case.first)
    return Sample(ops.decode, arguments, {"bits": bits, "key_axis": axis, "scale": 0.1, "softcap": case.softcap})


def step(case: Attention) -> Sample:
    """The same with a new token for each query."""
    (q, *held), options = (sample := decode(case)).arguments, sample.options
    new = [x[:, :, : q.shape[2]].clone().nan_to_num() for x in (case.window_k, case.window_v)]
    return Sample(ops.step_, (q, *new, *held), options)


def samples(device: str) -> Iterator[Sample]:
    made = [*codecs(), *saliencies(), *projections()]
    for codec in (*CODECS, None):
        more = codec in ("kivi", "groups", None)
        dtype = torch.bfloat16 if more else torch.float32
        case = attention((), dtype=dtype) if codec is None else attention((RAGGED,), dtype=dtype, **CODECS[codec])
        if more:
            case.sinks, case.softcap = torch.zeros(8), 3.0
            case.first = torch.zeros(len(case.segments), 2, 2, dtype=torch.int32)
        made += [decode(case), step(case)]
    yield from (sample.to(device) for sample in made)
