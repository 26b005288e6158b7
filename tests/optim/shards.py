# SPDX-License-Identifier: Apache-2.0
"""Optimizers of sharded parameters beside ones of the same tensors in one process, which say what is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ..tolerances import assert_same_bits
from .steps import normal
from .test_groups import NAMES, groups_of, make

WITH_NORMS = ("LAMB", "LARS", "SGDSaI")
EXACT = tuple(name for name in NAMES if name not in WITH_NORMS)

# Even shards, uneven ones, and ones that leave the second of two ranks empty.
SHAPES = [(6, 4), (5, 7), (1, 9), (3,), (2, 3, 5)]


@lru_cache
def mesh_of(*sizes: int) -> DeviceMesh:
    names = ("replicate", "shard") if len(sizes) == 2 else ("shard",)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def place(t: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    return distribute_tensor(t.detach().clone(), mesh, placements)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


class Twins:
    """An optimizer of parameters placed on ranks, and one of the same in this process alone."""

    def __init__(
        self,
        name: str,
        mesh: DeviceMesh,
        placements: Callable[[int], Sequence[Placement] | None],
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        options: dict[str, Any] | None = None,
    ) -> None:
        start = [normal(shape, 10 + i, dtype) for i, shape in enumerate(shapes)]
        self.name, self.mesh = name, mesh
        self.placements = [placements(i) for i in range(len(shapes))]
        self.params = [Parameter(self.placed(i, t)) for i, t in enumerate(start)]
        self.twins = [Parameter(t.clone()) for t in start]
        half = len(shapes) // 2
        self.optimizer, self.twin = (
            make(name, [{"params": some[:half], "lr": 2e-2}, {"params": some[half:]}])
            for some in (self.params, self.twins)
        )
        for group in (*groups_of(self.optimizer), *groups_of(self.twin)):
            group.update(options or {})

    def placed(self, i: int, t: Tensor) -> Tensor:
        where = self.placements[i]
        return t.clone() if where is None else place(t, self.mesh, where)

    def give_grads(self, step: int, missing: Sequence[int] = ()) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            q.grad = None if i in missing else normal(q.shape, 1000 * step + i, q.dtype)
            p.grad = None if q.grad is None else self.placed(i, q.grad)

    def step(self, step: int, missing: Sequence[int] = ()) -> None:
        self.give_grads(step, missing)
        self.optimizer.step()
        self.twin.step()

    def assert_same(self, exact: bool) -> None:
        """Parameters and states are those of one process: bit for bit, or as near as float64 sums in another order."""
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            assert_alike(whole(p), q, exact, f"parameter {i}")
            mine, theirs = self.optimizer.state.get(p, {}), self.twin.state.get(q, {})
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert_alike(whole(value), theirs[key], exact, f"{key} of parameter {i}")
                assert isinstance(value, DTensor) == (
                    isinstance(p, DTensor) and value.dim() == p.dim() and key not in ("step", "gsnr")
                )


def twice() -> tuple[list[Parameter], list[Parameter]]:
    """The same parameters, two of each."""
    first, second = ([Parameter(normal(shape, 10 + i)) for i, shape in enumerate(SHAPES)] for _ in range(2))
    return first, second


def step_both(optimizer: Optimizer, params: list[Parameter], twin: Optimizer, twins: list[Parameter]) -> None:
    """Three times, on the same gradients."""
    for step in range(1, 4):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad, q.grad = (normal(p.shape, 100 * step + i) for _ in range(2))
        optimizer.step()
        twin.step()


def assert_alike(a: Tensor, b: Tensor, exact: bool, label: str) -> None:
    if exact:
        assert_same_bits(a, b, label)
    else:
        assert torch.allclose(a.detach(), b.detach(), rtol=1e-6, atol=1e-6), f"{label}: {a} is not {b}"


def rows(i: int) -> list[Placement]:
    return [Shard(0)]


def in_many_ways(i: int) -> list[Placement] | None:
    """Rows, columns, replicas and plain tensors, in turn."""
    return [[Shard(0)], None, [Replicate()], [Shard(0)], [Shard(1)]][i % 5]
