# SPDX-License-Identifier: Apache-2.0
"""Rational activations on the tensors of Kolmogorov-Arnold Transformers: form A, degrees (5, 4), eight groups."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..probe import Probe
from ..registry import Case, Pass, Provider, Tier, fitting, missing, own_reason
from .activations import ACTIVATIONS, BACKWARD, FORWARD, GROUPS, KAT_CPU, TITLES, Activation
from .calls import Function, Inputs, Make, gate, inputs, prepare, with_coefficients

# Arithmetic of an element. Forward: P and Q by Horner's rule, |x|, a division. Backward: P, Q and their derivatives,
# 1 / Q, x's gradient, and ten terms of coefficients' gradients, multiplied and added up.
FLOPS_FORWARD = 20
FLOPS_BACKWARD = 61
# Float32 tensors of x's size that autograd holds at a time: the operations of P and Q, one by one.
EAGER_TENSORS = 40


def passes(count: int, backward: bool) -> tuple[Pass, ...]:
    """The floor for x of `count` bytes: x in and y out, both in one stream that is updated; then x and y's gradient in
    and x's out. Coefficients are nothing beside them."""
    forward = Pass((), (count,))
    return (forward, Pass((count,), (count,))) if backward else (forward,)


def eager(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """What a model in plain PyTorch would do."""
    from singlepass.reference.rational import rational

    return rational(x, numerator, denominator, None, None, form=0, channel_dim=-1)


def own(backend: str, data: Inputs) -> Function:
    """Our function on a named backend."""
    from singlepass.functional import rational

    return with_coefficients(partial(rational, backend=backend), data)


REFERENCE = partial(own, "eager")


def compiled(data: Inputs) -> Function:
    # Sizes, dtypes and the modes of grad share the code of one function, and dynamo counts its graphs.
    torch._dynamo.config.recompile_limit = 64
    return with_coefficients(torch.compile(eager, dynamic=False, fullgraph=True), data)


def gelu(data: Inputs) -> Function:
    return Function(torch.nn.functional.gelu)


def set_coefficients(module: torch.nn.Module, data: Inputs, numerator: str, denominator: str) -> Function:
    """A peer's module with our coefficients in its parameters."""
    module = module.to(data.x.device)
    parameters = getattr(module, numerator), getattr(module, denominator)
    with torch.no_grad():
        for parameter, value in zip(parameters, (data.numerator, data.denominator), strict=True):
            parameter.copy_(value)
    return Function(module, parameters)


def kat_rational(data: Inputs) -> Function:
    """Package rational_kat_cu, which KAT trains with."""
    module = importlib.import_module("kat_rational").KAT_Group(num_groups=len(data.denominator), mode="gelu")
    return set_coefficients(module, data, "weight_numerator", "weight_denominator")


def flashkat(data: Inputs) -> Function:
    make = importlib.import_module("rational_kat").FlashKAT_Group
    numbers = data.x.shape[-1], len(data.numerator), len(data.denominator)
    module = make(*numbers, data.numerator.shape[1], data.denominator.shape[1], "gelu")
    return set_coefficients(module, data, "numerator_v", "denominator_v")


def autocast(make: Make, data: Inputs) -> Function:
    """As a peer is used in mixed precision: it casts to float32, and the layer after it back."""
    function = make(data)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=x.dtype):
            y = function.call(x)
        return y.to(x.dtype)

    return Function(call, function.coefficients)


def providers(device: torch.device, ops: tuple[str, ...], elements: int, dtype: torch.dtype) -> tuple[Provider, ...]:
    backward = BACKWARD in ops

    def provider(
        name: str, column: str, tier: Tier, make: Make, *, truth: Make = REFERENCE, **options: Any
    ) -> Provider:
        # The result and x's gradient.
        options = {"footprint": 2 * elements * dtype.itemsize} | options
        return Provider(
            name,
            column,
            tier,
            prepare=partial(prepare, make, backward),
            gate=partial(gate, make, truth, backward, GROUPS, dtype),
            **options,
        )

    found = [
        provider(name, name, Tier.FUSED, partial(own, name), why_not=partial(own_reason, ops, name, dtype))
        for name in ("native", "triton")
    ]
    # Another function, so its truth is its own: the activation that a rational one takes the place of.
    found.append(provider("gelu", "yardstick", Tier.FUSED, gelu, truth=gelu))
    footprint = EAGER_TENSORS * elements * 4 if backward else 8 * elements * 4
    plain = partial(with_coefficients, eager)
    found.append(provider("eager", "eager", Tier.EAGER, plain, footprint=footprint))
    found.append(provider("compile", "torch.compile", Tier.COMPILED, compiled, footprint=footprint))
    if device.type == "cuda":
        found += [provider(*peer, **options) for peer, options in peers(dtype)]
    return tuple(found)


Peer = tuple[str, str, Tier, Make]


def peers(dtype: torch.dtype) -> Iterator[tuple[Peer, dict[str, Any]]]:
    """Other packages, called with x as it is and, in bfloat16, under autocast too, as their models train."""
    packages: tuple[tuple[str, str, Callable[[Inputs], Function]], ...] = (
        ("kat_rational", "kat_rational", kat_rational),
        ("flashkat", "rational_kat", flashkat),
    )
    for name, package, make in packages:
        options: dict[str, Any] = {"why_not": partial(missing, package)}
        if dtype == torch.float32:
            yield (name, "peer", Tier.PEER, make), options
        else:
            yield (name, "peer", Tier.PEER, make), options | {"differs": "arithmetic in bfloat16"}
            yield (f"{name}-autocast", "peer", Tier.PEER, partial(autocast, make)), options


def cases(device: torch.device) -> Iterator[Case]:
    """The activations whose speed matters on a device, most telling first."""
    for dtype in (torch.float32, torch.bfloat16):
        for activation in ACTIVATIONS["cuda" if device.type == "cuda" else "cpu"]:
            for op in TITLES:
                yield case(device, op, activation, dtype)


QUICK_SHAPES = (KAT_CPU[1], Activation((4, *KAT_CPU[1].shape[1:])))
QUICK_SECONDS = 0.5  # that a call of the slowest provider, some 60 times the floor, may take


def quick_cases(device: torch.device, probe: Probe) -> Iterator[Case]:
    if device.type == "cuda":
        yield from cases(device)
        return

    def seconds(activation: Activation) -> float:
        return 60.0 * probe.moving(sum(p.bytes for p in passes(4 * activation.elements, True)))

    activation = fitting(QUICK_SHAPES, seconds, QUICK_SECONDS)
    for dtype in (torch.float32, torch.bfloat16):
        for op in (BACKWARD, FORWARD):
            yield case(device, op, activation, dtype)


def case(device: torch.device, op: str, activation: Activation, dtype: torch.dtype) -> Case:
    backward = op == BACKWARD
    ops = tuple(TITLES) if backward else (op,)
    elements = activation.elements
    return Case(
        family="rational",
        op=op,
        size=activation.name,
        dtype=dtype,
        ops=ops,
        passes=passes(elements * dtype.itemsize, backward),
        flops=(FLOPS_FORWARD + FLOPS_BACKWARD * backward) * elements,
        elements=elements,
        input_bytes=elements * dtype.itemsize,
        tensors=1,
        inputs=partial(inputs, activation.shape, GROUPS, dtype),
        providers=providers(device, ops, elements, dtype),
    )
