# SPDX-License-Identifier: Apache-2.0
"""LoRA and ReLoRA in plain PyTorch, to compare with: weights W0 + (alpha / rank) B A of which only A and B are trained.

Hu et al., "LoRA", arXiv 2106.09685; Lialin et al., "ReLoRA", arXiv 2307.05695.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


class LoRALinear(nn.Module):
    """A linear layer without bias, its weight frozen as it is, and a product of rank ``rank`` that is added to it."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.empty(linear.out_features, rank))
        self.scale = scale  # alpha / rank
        self.restart()

    def restart(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the product to the weight, and begins another."""
        self.weight.addmm_(self.b, self.a, alpha=self.scale)
        self.restart()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b) * self.scale


def with_lora(model: nn.Module, rank: int, scale: float, skip: str) -> nn.Module:
    """The model with all its linear layers so replaced, but for the one of the name ``skip``; in place."""
    for module in list(model.modules()):
        for attribute, child in module.named_children():
            if isinstance(child, nn.Linear) and attribute != skip:
                setattr(module, attribute, LoRALinear(child, rank, scale))
    return model


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in model.modules() if isinstance(layer, LoRALinear) for p in (layer.a, layer.b)]


def merge_and_restart(model: nn.Module, optimizer: Optimizer) -> None:
    """ReLoRA's restart: moments of A and B begin anew, too."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.merge()
    for p in lora_parameters(model):
        optimizer.state.pop(p, None)
