# SPDX-License-Identifier: Apache-2.0
"""Calls of this family's ops whose traffic is counted (tests/counting)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from singlepass._ops import optim as ops

from ..counting.traffic_row import BF16, FP32, NAMES, Place, Row, beside, misaligned
from ..samples import Sample
from ..simt.truth import CASES, Case
from .steps import Mix, hyper_of, make_tensors, rule_of, set_grads


def step(case: Case, mix: Mix, place: Place) -> Sample:
    tensors = make_tensors(case, [(100_000,)], mix, like=place)
    set_grads(tensors, 1)
    arguments = (*tensors.arguments(case), torch.tensor(case.lr, dtype=torch.float64))
    return Sample(rule_of(case), arguments, hyper_of(case, mix.state))


def normed(dtype: torch.dtype, place: Place) -> Sample:
    return Sample(ops.grad_norm, ([place(torch.randn(100_000).to(dtype))],))


def streamed() -> Sample:
    return Sample(ops.stream_, ([torch.randn(100_000)], [torch.randn(100_000) for _ in "ab"]))


def rows() -> Iterator[Row]:
    mixed = Mix(BF16, BF16)
    layouts = {
        "float32": (Mix(), torch.clone),
        "bfloat16, states float32": (mixed, torch.clone),
        "misaligned": (Mix(), misaligned),
    }
    for case, (layout, (mix, place)) in product([c for c in CASES if not c.label], layouts.items()):
        launches = 2 if case.rule in ("lamb", "lars") else 1
        layout = f"amsgrad {layout}" if case.rule.endswith("_amsgrad") else layout
        make, sectors = partial(step, case, mix, place), beside(mix.param, place)
        yield Row(rule_of(case), layout, make, launches, sectors=sectors, warm=True)
    for dtype, place in product((FP32, BF16), (torch.clone, misaligned)):
        layout = NAMES[dtype] + (", misaligned" if place is misaligned else "")
        yield Row(ops.grad_norm, layout, partial(normed, dtype, place), sectors=beside(dtype, place), warm=True)
    yield Row(ops.stream_, "float32", streamed)
