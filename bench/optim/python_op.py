# SPDX-License-Identifier: Apache-2.0
"""What a step costs the host is measured by an op in Python that does nothing, called with AdamW's lists."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..registry import Gate, Provider, Step, Tier
from .steps import Inputs

NAMESPACE, NAME = "singlepass_bench", "nothing"


@lru_cache
def library() -> torch.library.Library:
    """The op, with the schema of AdamW's, which is registered as long as this lives."""
    from singlepass._ops.optim import adamw

    made = torch.library.Library(NAMESPACE, "DEF")
    made.define(NAME + str(adamw.overload._schema).removeprefix(adamw.overload.name()))
    made.impl(NAME, nothing, "CompositeExplicitAutograd")
    return made


def nothing(*args: Any, **options: Any) -> None:
    pass


def prepare(data: Inputs) -> Step:
    """A call with the lists of a step: gradients, which alternate, parameters and states are at hand."""
    library()
    op = getattr(getattr(torch.ops, NAMESPACE), NAME).default
    params = [torch.nn.Parameter(p.clone()) for p in data.params]
    moments = [[torch.zeros_like(p) for p in data.params] for _ in range(2)]
    steps = [torch.zeros((), device=p.device) for p in params]
    lr = torch.tensor(1e-3, dtype=torch.float64)
    grads = data.grads[0]

    def before(i: int) -> None:
        nonlocal grads
        grads = data.grads[i % 2]

    @torch.no_grad()
    def run() -> None:
        op(params, grads, *moments, [], steps, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)

    return Step(run, before)


def provider(footprint: int) -> Provider:
    agrees = Gate(0.0)  # whoever does nothing does it right
    return Provider("python-op", "yardstick", Tier.FUSED, prepare, lambda device: agrees, footprint=footprint)
