# SPDX-License-Identifier: Apache-2.0
"""``clip_grad_norm_`` against float64, and against torch's own where that runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from singlepass._ops.optim import grad_squares
from singlepass.optim import clip_grad_norm_

from .trajectory import give_grads, make_params

SHAPES = [(5, 7), (64,), (), (0, 3), (3, 3, 3)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def grads_of(params: list[Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def given(dtypes: tuple[torch.dtype, ...] = FLOATS) -> list[Parameter]:
    params = make_params(SHAPES, dtypes)
    give_grads(params, 1)
    return params


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1.0, 1e3, math.inf])
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in FLOATS), FLOATS], ids=str)
def test_against_float64(dtypes: tuple[torch.dtype, ...], max_norm: float) -> None:
    params = given(dtypes)
    params[1].grad = None
    before = grads_of(params)
    truth = torch.cat([g.double().flatten() for g in before]).norm()
    norm = clip_grad_norm_(params, max_norm)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    torch.testing.assert_close(norm.double(), truth, rtol=2**-23, atol=0)  # rounded once, to float32
    factor = min(1.0, max_norm / (float(truth) + 1e-6))
    for grad, old in zip(grads_of(params), before, strict=True):
        # The factor is rounded twice and the product once, and then to the gradient's dtype.
        bound = (4 * 2**-24 + torch.finfo(grad.dtype).eps / 2) * factor * old.double().abs()
        bound += torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
        assert ((grad.double() - factor * old.double()).abs() <= bound).all()


def test_as_torch_does_it() -> None:
    ours, theirs = given((torch.float32,)), given((torch.float32,))
    norms = clip_grad_norm_(ours, 0.5), torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    wanted = inspect.signature(torch.nn.utils.clip_grad_norm_).parameters.values()
    *found, last = inspect.signature(clip_grad_norm_).parameters.values()
    assert (last.name, last.kind, last.default) == ("norm_group", inspect.Parameter.KEYWORD_ONLY, None)
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]


@pytest.mark.parametrize("norm_type", [1.0, 3, math.inf])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_other_norms_are_torchs(norm_type: float, foreach: bool | None) -> None:
    ours, theirs = given((torch.float32,))[:3], given((torch.float32,))[:3]
    arguments = (0.5, norm_type, False, foreach)
    torch.testing.assert_close(
        clip_grad_norm_(ours, *arguments), torch.nn.utils.clip_grad_norm_(theirs, *arguments), rtol=0, atol=0
    )
    for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_norm_is_one_call_of_the_op() -> None:
    with mock.patch.object(grad_squares, "on", wraps=grad_squares.on) as on:
        clip_grad_norm_(given(), 1.0)
    on.assert_called_once()
    assert "on" not in vars(grad_squares)  # monkeypatch would leave it there, where it hides Op.on from later tests


@pytest.mark.parametrize("parameters", ["a tensor", "a generator", "none", "no gradients"])
def test_any_parameters(parameters: str) -> None:
    (p,) = make_params([(4,)])
    give_grads([p], 1)
    truth = p.grad.norm()
    if parameters == "a tensor":
        assert clip_grad_norm_(p, 0.1) == pytest.approx(float(truth), rel=1e-6)
    elif parameters == "a generator":
        assert clip_grad_norm_((q for q in [p]), 0.1) == pytest.approx(float(truth), rel=1e-6)
    else:
        assert clip_grad_norm_([] if parameters == "none" else [Parameter(torch.ones(2))], 0.1) == 0.0
        assert torch.equal(p.grad.norm(), truth)
        return
    assert p.grad.norm() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite(poison: float) -> None:
    params = given()
    params[1].grad[3] = poison
    before = grads_of(params)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_: expected a finite norm of all gradients; got (inf|nan)"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    for a, b in zip(grads_of(params), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not clip_grad_norm_(params, 1.0).isfinite()


def test_gradients_with_a_graph_of_their_own() -> None:
    """As create_graph=True leaves them: neither norm nor clipping becomes a part of the graph."""
    found = []
    for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        p = Parameter(torch.ones(4))
        (p.grad,) = torch.autograd.grad(p.pow(3).sum(), [p], create_graph=True)
        graph = p.grad.grad_fn
        norm = clip([p], 1.0)
        found.append((norm.requires_grad, p.grad.grad_fn is graph, p.grad.detach()))
    ours, theirs = found
    assert ours[:2] == theirs[:2] == (False, True)
    torch.testing.assert_close(ours[2], theirs[2])


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, "1", None, torch.ones(2)])
def test_a_bad_max_norm_changes_nothing(max_norm: object) -> None:
    params = given()
    before = grads_of(params)
    with pytest.raises(ValueError, match="clip_grad_norm_: expected max_norm >= 0; got"):
        clip_grad_norm_(params, max_norm)  # type: ignore[arg-type]
    for a, b in zip(grads_of(params), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_float64_keeps_its_precision() -> None:
    p = Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    norm = clip_grad_norm_([p], 1.0)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(math.sqrt(14.0), rel=1e-15)


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_sharded_gradients_of_one_process() -> None:
    """Of several: test_sharded_clipping.py."""
    p = Parameter(distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    p.grad = distribute_tensor(torch.arange(4.0), p.device_mesh, p.placements)
    norm = clip_grad_norm_([p], 1.0)
    assert not isinstance(norm, DTensor)
    torch.testing.assert_close(norm, torch.arange(4.0).norm())
    torch.testing.assert_close(p.grad.full_tensor(), torch.arange(4.0) / torch.arange(4.0).norm())
