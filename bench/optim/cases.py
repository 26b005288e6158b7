# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps on the parameter shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch.optim import Optimizer

from ..probe import Probe
from ..registry import Case, Pass, Provider, Tier, dtype_name, fitting, own_reason
from . import models, peers, python_op
from .compiled import by_tensor, compiled, whole_step
from .steps import MakeOptimizer, MakeRunner, gate, inputs, prepare


@dataclass(frozen=True)
class Rule:
    """An optimizer: its arguments, its traffic and its arithmetic.

    Each pass names the tensors that it reads, and those that it reads and writes, by the letters of the equations:
    g gradient, p parameter, h previous gradient; all others are moments in float32.
    flops counts the additions, multiplications, divisions, roots and exponentials that one element needs.
    """

    name: str
    passes: tuple[tuple[str, str], ...]
    flops: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def ops(self) -> tuple[str, ...]:
        """The registered ops that a step calls."""
        clips = len(self.passes) > 2
        return (f"{self.name.lower()}_step_", *(("grad_norm",) if clips else ()))

    def traffic(self, elements: int, dtype: torch.dtype) -> tuple[Pass, ...]:
        def sizes(letters: str) -> tuple[int, ...]:
            return tuple(elements * (dtype.itemsize if letter in "gph" else 4) for letter in letters)

        return tuple(Pass(sizes(reads), sizes(updates)) for reads, updates in self.passes)

    def state_bytes(self, elements: int, dtype: torch.dtype) -> int:
        """Bytes of the tensors that a step keeps beside parameters and gradients."""
        letters = {letter for _, updates in self.passes for letter in updates if letter != "p"}
        return sum(elements * (dtype.itemsize if letter == "h" else 4) for letter in letters)


# LAMB's first pass is the global gradient norm; its second updates the moments and takes two norms; its third makes the
# update from the moments once more and applies it. LARS takes two norms, then updates.
RULES = (
    Rule("AdamW", (("g", "pmv"),), 13, {"lr": 1e-3, "weight_decay": 1e-2}),
    Rule("Lion", (("g", "pm"),), 9, {"lr": 1e-4, "weight_decay": 1e-2}),
    Rule("AdaBelief", (("g", "pms"),), 14, {"lr": 1e-3, "weight_decay": 1e-2}),
    Rule("Adan", (("g", "pmvnh"),), 22, {"lr": 1e-3, "weight_decay": 1e-2}),
    Rule("DiffGrad", (("g", "pmvh"),), 20, {"lr": 1e-3, "weight_decay": 1e-2}),
    Rule("LAMB", (("g", ""), ("gp", "mv"), ("mv", "p")), 27, {"lr": 1e-3, "weight_decay": 1e-2}),
    Rule("LARS", (("gp", ""), ("g", "pm")), 10, {"lr": 1.0, "weight_decay": 1e-2}),
    Rule("SGDSaI", (("g", "pm"),), 7, {"lr": 1e-2, "weight_decay": 1e-2}),
)
ADAMW = RULES[0]


def own(rule: Rule, backend: str) -> MakeOptimizer:
    """Our optimizer on a named backend."""

    def make(params: list[torch.nn.Parameter]) -> Optimizer:
        import singlepass.optim

        return getattr(singlepass.optim, rule.name)(params, **rule.arguments, backend=backend)

    return make


def peer_differs(dtype: torch.dtype, differs: str | None) -> str | None:
    """How a peer differs, given how it does in float32: its states take the parameters' dtype."""
    if dtype == torch.float32:
        return differs
    return f"states in {dtype_name(dtype)}" + (f"; {differs}" if differs else "")


def providers(rule: Rule, model: models.Model, dtype: torch.dtype) -> tuple[Provider, ...]:
    eager = own(rule, "eager")
    # Parameters, states, and the temporaries that a foreach step may make.
    footprint = 2 * model.elements * dtype.itemsize + 2 * rule.state_bytes(model.elements, dtype)

    def provider(
        name: str,
        column: str,
        tier: Tier,
        make: MakeOptimizer,
        *,
        truth: MakeOptimizer = eager,
        clobbers: bool = False,
        runner: MakeRunner = attrgetter("step"),
        **options: Any,
    ) -> Provider:
        return Provider(
            name,
            column,
            tier,
            prepare=lambda data: prepare(make, data, clobbers=clobbers, runner=runner),
            gate=partial(gate, make, truth, dtype, runner),
            footprint=footprint,
            **options,
        )

    found = [
        provider(name, name, tier, own(rule, name), why_not=partial(own_reason, rule.ops, name, dtype))
        for name, tier in (("native", Tier.FUSED), ("triton", Tier.FUSED), ("eager", Tier.EAGER))
    ]
    for peer in peers.peers(rule.name, rule.arguments):
        found.append(
            provider(
                peer.name,
                peer.column,
                peer.tier,
                peer.make,
                clobbers=peer.clobbers,
                why_not=peer.why_not,
                differs=peer_differs(dtype, peer.differs),
                first_calls=peer.first_calls,
            )
        )
    if model is models.MANY_SMALL and rule is not ADAMW:
        adamw = partial(torch.optim.AdamW, **ADAMW.arguments, fused=True)
        options: dict[str, Any] = {"truth": own(ADAMW, "eager"), "differs": peer_differs(dtype, None)}
        found.append(provider("torch-fused-adamw", "yardstick", Tier.FUSED, adamw, **options))
    if model is models.ONE_ELEMENT:
        found.append(python_op.provider(footprint))
    if model in (models.MANY_SMALL, models.ONE_ELEMENT):
        return tuple(p for p in found if p.tier != Tier.SLOW)  # a graph of so many tensors compiles for many minutes
    for name, tier, compile_update in (
        ("compile", Tier.COMPILED, by_tensor),
        ("compile-whole", Tier.SLOW, whole_step),
    ):
        runner = partial(compiled, compile_update=compile_update)
        found.append(provider(name, "torch.compile", tier, eager, runner=runner, first_calls=2))
    return tuple(found)


def cases(device: torch.device) -> Iterator[Case]:
    """The models whose steps matter on a device, most telling first."""
    sizes = [models.GPT2_SMALL, models.MANY_SMALL, models.VIT_B16]
    dtypes = [torch.float32]
    if device.type == "cuda":
        sizes.append(models.TENSORS_300)
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        for model in sizes:
            for rule in RULES:
                yield case(rule, model, dtype)
    if device.type == "cpu":
        yield case(ADAMW, models.ONE_ELEMENT, torch.float32)


# The order in which optimizers are measured where time is short.
QUICK_ORDER = ("AdamW", "Lion", "Adan", "LAMB", "AdaBelief", "SGDSaI", "LARS", "DiffGrad")
QUICK_SECONDS = 1.0  # that a step of the slowest provider, some 60 times the floor, may take


def quick_cases(device: torch.device, probe: Probe) -> Iterator[Case]:
    if device.type == "cuda":
        yield from cases(device)
        return
    rules = {rule.name: rule for rule in RULES}
    longest = rules["Adan"]

    def seconds(blocks: int) -> float:
        traffic = longest.traffic(models.gpt2_blocks(blocks).elements, torch.float32)
        return 60.0 * probe.moving(sum(p.bytes for p in traffic))

    model = models.gpt2_blocks(fitting(models.BLOCK_COUNTS, seconds, QUICK_SECONDS))
    for name in QUICK_ORDER:
        yield case(rules[name], model, torch.float32)
    for name in QUICK_ORDER[:2]:
        yield case(rules[name], models.MANY_SMALL, torch.float32)


def case(rule: Rule, model: models.Model, dtype: torch.dtype) -> Case:
    return Case(
        family="optim",
        op=rule.name,
        size=model.name,
        dtype=dtype,
        ops=rule.ops,
        passes=rule.traffic(model.elements, dtype),
        flops=rule.flops * model.elements,
        elements=model.elements,
        input_bytes=model.elements * dtype.itemsize,
        tensors=len(model.shapes),
        inputs=partial(inputs, model, dtype),
        providers=providers(rule, model, dtype),
        warm=model is models.ONE_ELEMENT,
    )
