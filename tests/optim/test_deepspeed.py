# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's ZeRO does with the optimizer that it is given, without DeepSpeed: flat float32 partitions take the
places of a model's parameters after the optimizer is made, and groups are swapped around each step.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from singlepass import optim

from ..ranks import on_ranks
from ..tolerances import assert_same_bits
from .shards import EXACT, assert_alike
from .steps import normal
from .test_groups import groups_of, make

pytestmark = pytest.mark.deep("two processes, and many steps")
each_stage = pytest.mark.parametrize("stage", [1, 3])
RANKS = 2


class Zero:
    """A bfloat16 model, and an optimizer of float32 partitions: one of each group or, in stage 3, of each parameter."""

    def __init__(self, name: str, stage: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.LayerNorm(3)).bfloat16()
        params = list(self.model.parameters())
        chosen = [[p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]]
        self.optimizer = make(name, [{"params": some, "lr": 1e-2} for some in chosen], **options)
        self.stage = stage
        self.pieces: list[tuple[int, list[Tensor], nn.Parameter]] = []
        for i, some in enumerate(chosen):
            for held in [some] if stage == 1 else [[p] for p in some]:
                self.pieces.append((i, held, nn.Parameter(self.partition([p.detach().float() for p in held]))))
        self.groups = groups_of(self.optimizer)
        self.set_groups(empty=stage == 3)

    @staticmethod
    def partition(whole: list[Tensor]) -> Tensor:
        """This rank's part of tensors in a row, which zeros at the end make divisible."""
        flat = torch.cat([t.flatten() for t in whole])
        padding = flat.new_zeros(-len(flat) % RANKS)
        return torch.cat((flat, padding)).chunk(RANKS)[distributed.get_rank()].clone()

    def set_groups(self, empty: bool) -> None:
        for i, group in enumerate(self.groups):
            group["params"] = [] if empty else [partition for j, _, partition in self.pieces if i == j]

    def train(self, steps: range) -> None:
        for step in steps:
            grads = {id(p): normal(p.shape, 100 * step + i) for i, p in enumerate(self.model.parameters())}
            for i, held, partition in self.pieces:
                partition.grad = self.partition([grads[id(p)] for p in held])
                if self.stage == 1:
                    self.optimizer.param_groups = [self.groups[i]]
                    self.optimizer.step()
                    self.optimizer.param_groups = self.groups
                else:
                    self.groups[i]["params"] = [partition]
                    self.optimizer.step()
                    self.groups[i]["params"] = []
                partition.grad = None

    def masters(self) -> list[Tensor]:
        """The float32 parameters, put together again, in the order of the pieces."""
        found = []
        for _, held, partition in self.pieces:
            parts = [torch.empty_like(partition) for _ in range(RANKS)]
            distributed.all_gather(parts, partition.detach())
            sizes = [p.numel() for p in held]
            flat = torch.cat(parts)[: sum(sizes)].split(sizes)
            found += [part.view(p.shape) for part, p in zip(flat, held, strict=True)]
        return found

    def state_dict(self) -> dict[str, Any]:
        self.set_groups(empty=False)
        file = io.BytesIO()
        torch.save({"optimizer": self.optimizer.state_dict(), "fp32": [p for _, _, p in self.pieces]}, file)
        self.set_groups(empty=self.stage == 3)
        file.seek(0)
        return torch.load(file)

    def load_state_dict(self, saved: dict[str, Any], elastic: bool) -> None:
        """By the optimizer's own method or, as elastic checkpoints are, into the states that it has made."""
        self.set_groups(empty=False)
        if elastic:
            for position, (_, _, partition) in enumerate(self.pieces):
                for key, value in saved["optimizer"]["state"][position].items():
                    self.optimizer.state[partition][key].data.copy_(value.data)
        else:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.groups = groups_of(self.optimizer)
        self.set_groups(empty=self.stage == 3)
        for (_, _, partition), value in zip(self.pieces, saved["fp32"], strict=True):
            partition.data.copy_(value.data)


@each_stage
@pytest.mark.parametrize("name", [name for name in EXACT if name in optim._OPTIMIZERS])
@on_ranks(RANKS)
def test_training_is_that_of_one_process(name: str, stage: int) -> None:
    zero = Zero(name, stage)
    order = [p for _, held, _ in zero.pieces for p in held]
    twins = [nn.Parameter(p.detach().float()) for p in order]
    split = sum(p.dim() > 1 for p in order)
    expected = make(name, [{"params": some, "lr": 1e-2} for some in (twins[:split], twins[split:])])
    zero.train(range(1, 5))
    numbers = {id(p): i for i, p in enumerate(zero.model.parameters())}
    for step in range(1, 5):
        for p, q in zip(order, twins, strict=True):
            q.grad = normal(q.shape, 100 * step + numbers[id(p)])
        expected.step()
    for p, q in zip(zero.masters(), twins, strict=True):
        assert_same_bits(p, q)


@each_stage
@on_ranks(RANKS)
def test_clipping_is_over_all_ranks(stage: int) -> None:
    """By the norm of what one call of step() is for, as an optimizer for each would clip: a group, or a parameter."""
    clipping = {"max_grad_norm": 0.5}
    zero = Zero("Adan", stage, **clipping, norm_group=distributed.group.WORLD)
    masters = zero.masters()
    numbers = {id(p): i for i, p in enumerate(zero.model.parameters())}
    zero.train(range(1, 5))
    for _, held, _ in zero.pieces:
        twins = [nn.Parameter(masters.pop(0)) for _ in held]
        expected = make("Adan", [{"params": twins, "lr": 1e-2}], **clipping)
        for step in range(1, 5):
            for p, q in zip(held, twins, strict=True):
                q.grad = normal(q.shape, 100 * step + numbers[id(p)])
            expected.step()
        masters += twins
    for p, q in zip(zero.masters(), masters, strict=True):
        assert_alike(p, q, exact=False, label="parameter")


@pytest.mark.parametrize("elastic", [False, True], ids=["", "elastic"])
@each_stage
@pytest.mark.parametrize("name", optim._OPTIMIZERS)
@on_ranks(RANKS)
def test_training_resumes(name: str, stage: int, elastic: bool) -> None:
    """Also where rules take norms, which are those of partitions."""
    zero = Zero(name, stage)
    zero.train(range(1, 4))
    saved = zero.state_dict()
    zero.train(range(4, 7))
    again = Zero(name, stage)
    if elastic:
        again.train(range(10, 11))  # so that there are states
    again.load_state_dict(saved, elastic)
    again.train(range(4, 7))
    for p, q in zip(zero.masters(), again.masters(), strict=True):
        assert_same_bits(p, q)
