# SPDX-License-Identifier: Apache-2.0
"""Sizes around every boundary, every dense layout, gradients laid out otherwise, and storage at odd places."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ..simt.truth import CASES, Case
from ..tolerances import assert_close, assert_same_bits, same_bits
from .steps import (
    EAGER,
    GPU_PLACES,
    Mix,
    Place,
    Tensors,
    call,
    each_case,
    each_kernel,
    make_tensors,
    normal,
    rule_of,
    set_grads,
    step_and_check,
)
from .trajectory import give_grads, make_optimizer

BFLOAT16 = Mix(torch.bfloat16, torch.bfloat16)
each_mix = pytest.mark.parametrize("mix", [Mix(), BFLOAT16], ids=["float32", "bfloat16"])

# Vectors have 4 or 8 elements, tiles 1,024, chunks 32,768; waves of rules with norms 2^19.
SIZES = [0, 1, 2, 7, 8, 9, 1000, 1023, 1024, 1025]
CHUNKS = [32767, 32768, 32769]
WAVES = [300000, 300001, 600000, 3]

POINTWISE, WITH_NORMS = (next(case for case in CASES if case.rule == rule) for rule in ("adan", "lamb"))
each_engine = pytest.mark.parametrize("case", [POINTWISE, WITH_NORMS], ids=lambda case: case.id)


def steps(place: Place, case: Case, tensors: Tensors, count: int = 2) -> None:
    for t in range(1, count + 1):
        set_grads(tensors, t)
        step_and_check(place, case, tensors, t)


@each_kernel
@each_mix
@each_case
def test_sizes_at_every_boundary(case: Case, mix: Mix, place: Place) -> None:
    steps(place, case, make_tensors(case, [(n,) for n in SIZES], mix, device=place.device))


@each_kernel
@pytest.mark.parametrize("shape", [(), (1, 1, 1), (0, 3), (3, 0, 2)], ids=str)
@each_case
def test_shapes_without_or_with_one_element(case: Case, shape: tuple[int, ...], place: Place) -> None:
    steps(place, case, make_tensors(case, [shape, (5,)], Mix(), device=place.device))


@pytest.mark.usefixtures("two_threads")
@each_kernel
@each_mix
@each_engine
def test_sizes_around_a_chunk(case: Case, mix: Mix, place: Place) -> None:
    steps(place, case, make_tensors(case, [(n,) for n in CHUNKS], mix, device=place.device))


@pytest.mark.usefixtures("two_threads")
@each_kernel
def test_tensors_within_across_and_beyond_a_wave(place: Place) -> None:
    steps(place, WITH_NORMS, make_tensors(WITH_NORMS, [(n,) for n in WAVES], Mix(), device=place.device), 1)


@pytest.mark.usefixtures("two_threads")
@each_kernel
@each_engine
def test_a_thousand_tensors(case: Case, place: Place) -> None:
    tensors = make_tensors(case, [(i % 7,) for i in range(1000)], Mix(), device=place.device)
    set_grads(tensors, 1)
    before, eager = tensors.clone(), tensors.clone()
    op_name = rule_of(case).name
    call(place.function(op_name), case, tensors)
    call(Place("eager", place.device).function(op_name), case, eager)
    for a, b, old in zip(tensors.written(), eager.written(), before.written(), strict=True):
        assert_close(op_name, a, b, b.double(), before=old)


Layout = Callable[[Tensor], Tensor]


def ordered(*order: int) -> Layout:
    """Memory in the order of these dimensions, outermost first."""

    def lay_out(t: Tensor) -> Tensor:
        inverse = [order.index(k) for k in range(len(order))]
        return t.permute(order).contiguous().permute(inverse)

    return lay_out


def gaps(t: Tensor) -> Tensor:
    """Every second element of a larger tensor."""
    return torch.stack((t, torch.full_like(t, math.nan)), dim=-1)[..., 0]


LAYOUTS = {
    "contiguous": ((2, 3, 4, 5), ordered(0, 1, 2, 3)),
    "channels-last": ((2, 3, 4, 5), ordered(0, 2, 3, 1)),
    "channels-last-one-channel": ((2, 1, 4, 5), ordered(0, 2, 3, 1)),
    "channels-last-one-pixel": ((7, 5, 1, 1), ordered(0, 2, 3, 1)),
    "transposed": ((33, 65), ordered(1, 0)),
    "reversed": ((3, 5, 7), ordered(2, 1, 0)),
    "rotated": ((9, 1, 11), ordered(1, 2, 0)),
}
each_layout = pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)


@each_kernel
@each_mix
@each_layout
@each_case
def test_dense_layouts(case: Case, shape: tuple[int, ...], layout: Layout, mix: Mix, place: Place) -> None:
    steps(place, case, make_tensors(case, [shape], mix, device=place.device, like=layout))


@each_kernel
@pytest.mark.parametrize(
    "grad_layout", [ordered(0, 1, 2, 3), ordered(3, 1, 0, 2), gaps], ids=["contiguous", "permuted", "gaps"]
)
@pytest.mark.parametrize("layout", [ordered(0, 1, 2, 3), ordered(0, 2, 3, 1)], ids=["contiguous", "channels-last"])
@each_case
def test_gradients_laid_out_otherwise(case: Case, layout: Layout, grad_layout: Layout, place: Place) -> None:
    tensors = make_tensors(case, [(2, 3, 4, 5)], Mix(grad=torch.bfloat16), device=place.device, like=layout)
    tensors.grads = [grad_layout(g) for g in tensors.grads]
    steps(place, case, tensors)


@each_kernel
@each_case
def test_an_expanded_gradient(case: Case, place: Place) -> None:
    tensors = make_tensors(case, [(6, 8)], Mix(), device=place.device)
    tensors.grads = [torch.tensor(0.25, device=place.device).expand(6, 8)]
    step_and_check(place, case, tensors, 1)


@each_case
def test_eager_takes_parameters_with_gaps(case: Case) -> None:
    tensors = make_tensors(case, [(4, 6)], Mix(), like=gaps)
    storage = tensors.params[0]._base
    assert storage is not None
    steps(Place("eager"), case, tensors)
    assert storage[..., 1].isnan().all()


@each_case
def test_optimizers_take_parameters_with_gaps_through_eager(case: Case) -> None:
    whole, gapped = (torch.nn.Parameter(t) for t in (normal((4, 6), 1), gaps(normal((4, 6), 1))))
    assert not gapped.is_contiguous()
    optimizers = [make_optimizer(case, [p], backend=b) for p, b in ((whole, "eager"), (gapped, None))]
    for step in range(1, 4):
        for p, optimizer in zip((whole, gapped), optimizers, strict=True):
            give_grads([p], step)
            optimizer.step()
    assert_same_bits(gapped, whole)


class Guarded:
    """Puts tensors at an odd place of a storage whose other elements are NaN, and remembers these."""

    PAD = 16

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.storages: list[tuple[Tensor, int, int]] = []

    def __call__(self, t: Tensor) -> Tensor:
        start = self.PAD + self.offset
        storage = torch.full((t.numel() + 2 * self.PAD + 8,), math.nan, dtype=t.dtype, device=t.device)
        storage[start : start + t.numel()] = t.flatten()
        self.storages.append((storage, start, t.numel()))
        return storage[start : start + t.numel()].view(t.shape)

    def check(self) -> None:
        for storage, start, n in self.storages:
            outside = torch.cat((storage[:start], storage[start + n :]))
            assert same_bits(outside, torch.full_like(outside, math.nan))


@each_kernel
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
@pytest.mark.parametrize(
    "mix",
    [Mix(), BFLOAT16, Mix(torch.float16, torch.float32, torch.bfloat16)],
    ids=["float32", "bfloat16", "float16-float32-bfloat16"],
)
@each_case
def test_misaligned_storage_between_sentinels(case: Case, mix: Mix, offset: int, place: Place) -> None:
    guarded = Guarded(offset)
    shapes = [(1,), (7,), (8,), (9,), (1027,)]
    tensors = make_tensors(case, shapes, mix, device=place.device, like=guarded)
    steps(place, case, tensors)
    guarded.check()


@each_case
@pytest.mark.parametrize("place", [EAGER, *GPU_PLACES])
def test_a_step_of_no_tensors_does_nothing(case: Case, place: Place) -> None:
    call(place.function(rule_of(case).name), case, make_tensors(case, [], Mix(), device=place.device))
