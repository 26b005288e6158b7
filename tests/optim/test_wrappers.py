# SPDX-License-Identifier: Apache-2.0
"""Parameters and gradients that are tensors around other tensors, DTensors among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from singlepass import optim

from ..tolerances import assert_same_bits
from .test_groups import NAMES, each_optimizer, gradient, groups_of, make


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Of one process."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "compiled"),
    [pytest.param(name, False, id=name) for name in NAMES]
    + [pytest.param(name, True, id=f"{name}-compiled") for name in ("AdamW", "SGDSaI")],
)
def test_parameters_made_of_two_tensors_count_each_step_once(name: str, compiled: bool) -> None:
    """Kernels would be called for each of the two, and count twice: such parameters take the eager backend."""
    halves = [torch.linspace(-1.0, 1.0, 6), torch.linspace(-1.0, 1.0, 6)]
    pair, plain = Parameter(TwoTensor(*halves)), Parameter(halves[0].clone())
    optimizer, expected = make(name, [{"params": [pair]}]), make(name, [{"params": [plain]}])
    groups_of(expected)[0]["backend"] = "eager"
    step_ = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for step in range(1, 4):
        g = gradient(plain, 0, step)
        pair.grad, plain.grad = TwoTensor(g, g.clone()), g
        step_()
        expected.step()
    for half in (pair.a, pair.b):
        assert_same_bits(half, plain)
    if "step" in expected.state[plain]:
        assert optimizer.state[pair]["step"].item() == 3.0


@each_optimizer
def test_kernels_are_refused_for_parameters_made_of_two_tensors(name: str) -> None:
    pair = Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    optimizer = make(name, [{"params": [pair], "backend": "native"}])
    pair.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"plain tensors for kernels; got .* TwoTensor"):
        optimizer.step()
    assert len(optimizer.state) == 0 or pair not in optimizer.state


@each_optimizer
def test_a_gradient_that_comes_to_be_made_of_two_tensors(name: str) -> None:
    p, q = Parameter(torch.linspace(-1.0, 1.0, 6)), Parameter(torch.linspace(-1.0, 1.0, 6))
    optimizer, expected = make(name, [{"params": [p]}]), make(name, [{"params": [q]}])
    groups_of(expected)[0]["backend"] = "eager"
    for step in range(1, 4):
        g = gradient(q, 0, step)
        p.grad, q.grad = g if step == 1 else TwoTensor(g, g.clone()), g
        optimizer.step()
        expected.step()
    assert float(optimizer.state[p].get("step", torch.tensor(3.0))) == 3.0
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)  # the first step was a kernel's


@pytest.mark.parametrize("name", ["LAMB", "Adan"])
def test_clipping_of_two_kinds_of_parameters_is_refused(name: str) -> None:
    """There is no one norm of them: nothing is changed."""
    pair, plain = Parameter(TwoTensor(torch.ones(3), torch.ones(3))), Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([pair, plain], max_grad_norm=1.0)
    pair.grad, plain.grad = TwoTensor(torch.ones(3), torch.ones(3)), torch.ones(3)
    with pytest.raises(ValueError, match="one type of parameters for the norm of all gradients"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(3))
    assert torch.equal(pair.a, torch.ones(3))


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
@each_optimizer
def test_dtensors(name: str, mixed: bool, clipped: bool, mesh: DeviceMesh) -> None:
    """Alone and beside plain parameters, they equal what one process computes. More ranks: test_sharded.py."""
    start = [torch.linspace(-1.0, 1.0, 6), torch.linspace(1.0, 2.0, 4)]
    placements = [[Shard(0)], [Replicate()]]
    sharded = [Parameter(distribute_tensor(t, mesh, where)) for t, where in zip(start, placements, strict=True)]
    plain = [Parameter(t.clone()) for t in start]
    if mixed:
        sharded[1] = Parameter(start[1].clone())
    optimizer, expected = make(name, [{"params": sharded}]), make(name, [{"params": plain}])
    groups_of(expected)[0]["backend"] = "eager"
    for o in (optimizer, expected):
        for group in o.param_groups:
            if "max_grad_norm" in group:
                group["max_grad_norm"] = 0.5 * clipped
    for step in range(1, 4):
        for key, (p, q) in enumerate(zip(sharded, plain, strict=True)):
            q.grad = gradient(q, key, step)
            p.grad = distribute_tensor(q.grad, mesh, p.placements) if isinstance(p, DTensor) else q.grad.clone()
        optimizer.step()
        expected.step()
    for p, q in zip(sharded, plain, strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        assert torch.allclose(whole, q, rtol=1e-6, atol=1e-7)
        assert float(optimizer.state[p].get("step", torch.tensor(3.0))) == 3.0
