# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training: a layer's whole training step beside full rank, and each op by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..probe import Probe
from ..registry import Case, Pass, Provider, Step, Tier, fitting, own_reason
from .calls import (
    OF_MODELS,
    OWN,
    Make,
    decompose,
    decompose_by_library,
    gate,
    inputs,
    products,
    train_eager,
    train_full_rank,
    update_full_rank,
)
from .layers import (
    DECOMPOSE,
    LORENTZ,
    LORENTZ_BACKWARD,
    MODEL,
    MODEL_NAME,
    RANK,
    SAMPLE,
    SCALE,
    SHAPES,
    SWAP,
    TRAIN,
    UPDATE,
    LayerShape,
)

FLOPS_UPDATE = 17  # of an element: AdamW's, and a row's norm and division


def providers(op: str, ops: tuple[str, ...], dtype: torch.dtype, held: int) -> Iterator[Provider]:
    """`held`: bytes of the inputs, which every provider copies."""
    eager: Make = train_eager if op == TRAIN else partial(OWN[op], "eager")

    def provider(name: str, column: str, tier: Tier, make: Make, truth: Make = eager, **options: Any) -> Provider:
        return Provider(
            name,
            column,
            tier,
            prepare=lambda data: Step(make(data.copied())),
            gate=partial(gate, make, truth, op, dtype),
            footprint=3 * held,
            **options,
        )

    if op == DECOMPOSE:
        # Made of the library's own parts: one provider, on every device.
        yield provider("native", "native", Tier.FUSED, partial(decompose, "native"), truth=decompose_by_library)
        yield provider("eager", "eager", Tier.EAGER, decompose_by_library, truth=decompose_by_library)
        return
    for name in ("native", "triton"):
        why_not = partial(own_reason, ops, name, dtype)
        yield provider(name, name, Tier.FUSED, partial(OWN[op], name), why_not=why_not)
    if op in (TRAIN, UPDATE):
        dense = train_full_rank if op == TRAIN else update_full_rank
        yield provider("full-rank", "yardstick", Tier.FUSED, dense, truth=dense, differs="all of W is trained")
    if op == TRAIN:
        differs = "what the products take of a training step"
        yield provider("products", "peer", Tier.FUSED, products, truth=products, differs=differs)
    # Steps that matrix products fill differ by little more than those drift: timed in turn, the eager one too.
    yield provider("eager", "eager", Tier.FUSED if op == TRAIN else Tier.EAGER, eager)


def passes(op: str, shape: LayerShape, dtype: torch.dtype) -> tuple[Pass, ...]:
    """Matrix products have no floor here: of a training step, the weights, gradients and states are counted once."""
    size = dtype.itemsize
    tokens = shape.tokens * shape.width * size
    if op == TRAIN:
        vectors, active = 2 * shape.width**2, 2 * shape.rank * shape.width
        return (Pass((vectors * size, 2 * tokens), (active * size, 2 * active * 4)),)
    if op in OF_MODELS:
        active = sum(round(RANK * min(m, n)) * (m + n) for m, n in MODEL)
        values = sum(min(m, n) for m, n in MODEL)
        if op == UPDATE:
            count = active + values
            return (Pass((count * size,), (count * size, count * 4, count * 4)),)
        return (Pass((values * size,), ()),) if op == SAMPLE else (Pass((), (active * size, active * size)),)
    if op == DECOMPOSE:
        return (Pass((3 * shape.width**2 * size,), ()),)
    return (Pass((), (tokens,)),) if op == LORENTZ else (Pass((tokens,), (tokens,)),)


def flops(op: str, shape: LayerShape) -> int:
    elements = shape.tokens * shape.width
    if op == TRAIN:
        from singlepass.spectral._product import Sizes, evaluation_of
        from singlepass.spectral._product import flops as counted

        sizes = Sizes(shape.tokens, shape.width, shape.width, shape.width, shape.rank)
        return counted(sizes, True)[evaluation_of(sizes, True)]
    if op in OF_MODELS:
        active = sum(round(RANK * min(m, n)) * (m + n) for m, n in MODEL)
        return active * FLOPS_UPDATE if op == UPDATE else 0
    # A decomposition takes some ten products of matrices, by whatever algorithm.
    per_element = {SCALE: 3, LORENTZ: 3, LORENTZ_BACKWARD: 7, DECOMPOSE: 20 * shape.width**2 / shape.tokens}
    return round(per_element[op] * elements)


def cases(device: torch.device) -> Iterator[Case]:
    """Training steps and the update, which have bars; then the other ops."""
    shapes = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for dtype in dtypes:
        for shape in shapes:
            yield case(TRAIN, shape, dtype)
        for op in OWN:
            if op != TRAIN:
                yield case(op, shapes[0], dtype)


QUICK_SHAPES = (SHAPES["cpu"][0], LayerShape(1024, 512), LayerShape(512, 512))
QUICK_SECONDS = 0.5  # that a training step may take


def quick_cases(device: torch.device, probe: Probe) -> Iterator[Case]:
    if device.type == "cuda":
        yield from cases(device)
        return
    shape = fitting(QUICK_SHAPES, lambda shape: 1.5 * probe.computing(flops(TRAIN, shape)), QUICK_SECONDS)
    for op in (TRAIN, UPDATE, LORENTZ):
        yield case(op, shape, torch.float32)


def case(op: str, shape: LayerShape, dtype: torch.dtype) -> Case:
    of_model = op in OF_MODELS
    ops = (SCALE, UPDATE, SAMPLE, SWAP) if op == TRAIN else () if op == DECOMPOSE else (op,)
    elements = sum(m * n for m, n in MODEL) if of_model else shape.width**2
    held = (elements if of_model else 2 * elements + 2 * shape.tokens * shape.width) * 4
    return Case(
        family="spectral",
        op=op,
        size=MODEL_NAME if of_model else shape.name,
        dtype=dtype,
        ops=ops,
        passes=passes(op, shape, dtype),
        flops=flops(op, shape),
        elements=elements,
        input_bytes=elements * dtype.itemsize,
        tensors=len(MODEL) if of_model else 1,
        inputs=partial(inputs, op, shape, dtype),
        providers=tuple(providers(op, ops, dtype, held)),
    )
