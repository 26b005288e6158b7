# SPDX-License-Identifier: Apache-2.0
"""Calls of this family's ops whose traffic is counted (tests/counting)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import normalize

from singlepass._ops import spectral as ops

from ..counting.traffic_row import BF16, FP32, NAMES, Row
from ..samples import Sample


def trained(dtype: torch.dtype, project: bool) -> Sample:
    params = [normalize(torch.randn(128, 768)).to(dtype), torch.rand(128)]
    lists = [
        params,
        [torch.randn(p.shape).to(p.dtype) for p in params],
        *([torch.zeros(p.shape) for p in params] for _ in "mv"),
    ]
    counts = [torch.zeros(()) for _ in params]
    hyper = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "project": project}
    return Sample(ops.step_, (*lists, counts, torch.tensor(0.1)), hyper)


def scaled(dtype: torch.dtype) -> Sample:
    q, t = (torch.randn(512, 512).to(dtype) for _ in range(2))
    return Sample(ops.scale_, (q, t, torch.randn(512)))


def swapped(coded: bool) -> Sample:
    """Half of the active rows, and so many of four times as many frozen ones."""
    active, exchange = torch.randn(64, 768), torch.arange(64)
    exchange[::2] = -1
    frozen = torch.randint(-127, 128, (256, 768), dtype=torch.int8) if coded else torch.randn(256, 768)
    scales = torch.rand(256, 6) if coded else torch.randn(0)
    return Sample(ops.swap_, ([active], [frozen], [scales], [exchange]))


def hyperbolic(backward: bool, dtype: torch.dtype) -> Sample:
    z, grad = (torch.randn(512, 256).to(dtype) for _ in range(2))
    arguments = (z, torch.tensor(0.3))
    op = ops.lorentz_backward if backward else ops.lorentz
    return Sample(op, (grad, *arguments) if backward else arguments, {"k": 1.0, "offset": 1.1})


def drawn() -> Sample:
    draws = {"ranks": [64] * 8, "ids": list(range(8)), "seed": 1, "draw": 0, "uniform": 0.5}
    return Sample(ops.sample, ([torch.rand(1024) for _ in range(8)],), draws)


def rows() -> Iterator[Row]:
    shares = {"active": 0.5, "frozen": 0.125, "scales": 0.125}
    for dtype in (FP32, BF16):
        yield Row(ops.step_, NAMES[dtype], partial(trained, dtype, False), warm=True)
        yield Row(ops.step_, f"{NAMES[dtype]}, project", partial(trained, dtype, True), warm=True)
        sums = 2 * 8 * 512 * 16  # of 16 stretches of rows for the second launch, in float64
        yield Row(ops.scale_, NAMES[dtype], partial(scaled, dtype), 2, sums)
        yield Row(ops.lorentz, NAMES[dtype], partial(hyperbolic, False, dtype))
        yield Row(ops.lorentz_backward, NAMES[dtype], partial(hyperbolic, True, dtype), 2)
    for coded in (False, True):
        layout = "int8" if coded else "float32"
        yield Row(ops.swap_, layout, partial(swapped, coded), read=shares, written=shares)
    yield Row(ops.sample, "float32", drawn, workspace=2 * 8 * 8 * 1024)  # a key for each place
