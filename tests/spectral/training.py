# SPDX-License-Identifier: Apache-2.0
"""A small model under sparse spectral training, gradients for it, and a schedule with short rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singlepass import spectral
from singlepass.spectral import SST, SSTLinear


def model_of(dtype: torch.dtype = torch.float32, rank: int = 3, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 5))
    return spectral.convert(model.to(dtype), rank, skip=["4"], **options)


def layers_of(model: nn.Module) -> list[SSTLinear]:
    return [m for m in model.modules() if isinstance(m, SSTLinear)]


def give_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(model: nn.Module, optimizer: SST, steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        give_gradients(model, i)
        optimizer.step()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


SCHEDULE = {"steps_per_iteration": 4, "iterations_per_round": 3, "warmup_steps": 2}
