# SPDX-License-Identifier: Apache-2.0
"""Calls of this family's ops whose traffic is counted (tests/counting)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from singlepass._ops import Op
from singlepass._ops import optim as ops

from ..counting.traffic_row import BF16, FP32, NAMES, Place, Row, beside, misaligned
from ..samples import Sample
from ..simt.truth import CASES, Case
from .steps import Mix, hyper_of, make_tensors, rule_of, set_grads


def step(case: Case, mix: Mix, place: Place, **options: Any) -> Sample:
    tensors = make_tensors(case, [(100_000,)], mix, like=place)
    set_grads(tensors, 1)
    arguments = (*tensors.arguments(case), torch.tensor(case.lr, dtype=torch.float64))
    return Sample(rule_of(case), arguments, hyper_of(case, mix.state) | options)


def phase_rows(case: Case) -> Iterator[Row]:
    """Each phase in one launch, which touches what its pass needs."""
    op, norms = rule_of(case), torch.ones(1, 2, dtype=torch.float64)
    states = dict.fromkeys(op.states, 0.0)
    needs = {
        "lamb": ({}, {"params": 0.0}, {"grads": 0.0}, states),
        "lars": (states, {"params": 0.0} | states, {}, {}),
    }[case.rule]
    for phase, read, written in ((1, *needs[:2]), (2, *needs[2:])):
        make = partial(step, case, Mix(), torch.clone, norms=norms, phase=phase)
        yield Row(op, f"phase {phase}, float32", make, read=read, written=written, warm=True)


def shard_row(case: Case, layout: str, offset: int) -> Row:
    make = partial(step, case, Mix(BF16, BF16), torch.clone, seed=1, ids=[0], offsets=[offset])
    return Row(rule_of(case), layout, make, warm=True)


def normed(op: Op, dtype: torch.dtype, place: Place) -> Sample:
    return Sample(op, ([place(torch.randn(100_000).to(dtype))],))


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
        launches = 2 if rule_of(case).has_norms else 1
        layout = f"amsgrad {layout}" if case.rule.endswith("_amsgrad") else layout
        make, sectors = partial(step, case, mix, place), beside(mix.param, place)
        yield Row(rule_of(case), layout, make, launches, sectors=sectors, warm=True)
    for case in CASES:
        if not case.label and rule_of(case).has_norms:
            yield from phase_rows(case)
        if case.id == "lion":
            yield shard_row(case, "bfloat16, a shard rounded stochastically", 8)
            yield shard_row(case, "element by element, a shard that begins inside a Philox block", 3)
    for op, dtype, place in product((ops.grad_squares, ops.grad_norm), (FP32, BF16), (torch.clone, misaligned)):
        layout = NAMES[dtype] + (", misaligned" if place is misaligned else "")
        yield Row(op, layout, partial(normed, op, dtype, place), sectors=beside(dtype, place), warm=True)
    yield Row(ops.stream_, "float32", streamed)
