# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: graphs, streams, launches, poisoned memory, tensors on several devices.

The numerics of the CUDA and Triton kernels are in the other files of this folder, whose places include both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn import Parameter

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits, same_bits
from .steps import Place, each_case, normal, rule_of
from .trajectory import Trajectory, contents, give_grads, make_optimizer, make_params, train

pytestmark = pytest.mark.gpu

SHAPES = [(1000,), (33, 65), (), (70001,)]
each_kernel = pytest.mark.parametrize(
    "place", [Place("native", "cuda"), Place("triton", "cuda")], ids=lambda p: p.backend
)
one_case_a_rule = pytest.mark.parametrize("case", [c for c in CASES if not c.label], ids=lambda case: case.id)


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    expected = contents(b)
    for name, value in contents(a).items():
        assert_same_bits(value, expected[name], name)


def captured(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> torch.cuda.CUDAGraph:
    """A graph of one step, captured after three steps in the usual way. The gradients' memory stays."""
    give_grads(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(1, 4):
            new_values(params, k)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def new_values(params: list[Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad.copy_(normal(p.shape, 1000 * step + i))


@each_kernel
@one_case_a_rule
def test_a_captured_step_follows_gradients_and_learning_rate(case: Case, place: Place) -> None:
    params, others = (make_params(SHAPES, device="cuda") for _ in range(2))
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = make_optimizer(case, groups, capturable=True, backend=place.backend)
    plain = make_optimizer(case, [{"params": others[:2]}, {"params": others[2:]}], backend=place.backend)
    graph = captured(optimizer, params)
    train(plain, 3)
    for k in range(4, 10):
        for group, other in zip(optimizer.param_groups, plain.param_groups, strict=True):
            group["lr"].fill_(case.lr / k)
            other["lr"] = group["lr"].item()
        new_values(params, k)
        graph.replay()
        give_grads(others, k)
        plain.step()
    assert_same(optimizer, plain)


@each_kernel
def test_a_captured_step_draws_anew_at_every_replay(place: Place) -> None:
    lion = next(case for case in CASES if case.rule == "lion")
    params = [Parameter(torch.ones(4096, dtype=torch.bfloat16, device="cuda"))]
    optimizer = make_optimizer(
        lion, params, lr=1e-3, weight_decay=0.0, capturable=True, stochastic_rounding=True, backend=place.backend
    )
    graph = captured(optimizer, params)
    outcomes = []
    for _ in range(2):
        params[0].data.fill_(1.0)
        params[0].grad.fill_(1.0)
        graph.replay()
        outcomes.append(params[0].detach().clone())
    assert not same_bits(*outcomes)


@each_kernel
@one_case_a_rule
def test_a_captured_step_skips_overflows(case: Case, place: Place) -> None:
    params = make_params(SHAPES, device="cuda")
    optimizer = make_optimizer(case, params, capturable=True, backend=place.backend)
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")
    graph = captured(optimizer, params)
    new_values(params, 5)
    before = contents(optimizer)
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    for name, value in contents(optimizer).items():
        assert_same_bits(value, before[name], name)
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert not same_bits(params[0].detach(), before["parameter 0"])


@each_kernel
@one_case_a_rule
def test_steps_on_another_stream(case: Case, place: Place) -> None:
    params, others = (make_params(SHAPES, device="cuda") for _ in range(2))
    optimizer, plain = (make_optimizer(case, ps, backend=place.backend) for ps in (params, others))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for k in range(1, 6):
        with torch.cuda.stream(stream if k % 2 else torch.cuda.current_stream()):
            torch.cuda._sleep(1_000_000)  # what runs on the wrong stream comes too early
            give_grads(params, k)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        stream.wait_stream(torch.cuda.current_stream())
    train(plain, 5)
    assert_same(optimizer, plain)


@each_kernel
@one_case_a_rule
def test_gradients_at_new_addresses_in_every_step(case: Case, place: Place) -> None:
    """More sets of addresses than the cache of device tables holds, some of them coming back."""
    params, others = (make_params(SHAPES[:2], device="cuda") for _ in range(2))
    optimizer, plain = (make_optimizer(case, ps, backend=place.backend) for ps in (params, others))
    sets = [[normal(p.shape, 7 * k + i, device="cuda") for i, p in enumerate(params)] for k in range(80)]
    for k in [*range(80), *range(0, 80, 7)]:
        for p, q, g in zip(params, others, sets[k], strict=True):
            p.grad = g
            q.grad = torch.zeros_like(q) if q.grad is None else q.grad
            q.grad.copy_(g)  # at one address
        optimizer.step()
        plain.step()
    assert_same(optimizer, plain)


@pytest.fixture
def _nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@each_kernel
@each_case
@pytest.mark.usefixtures("_nan_in_new_memory")
def test_memory_that_was_never_written_is_never_read(case: Case, place: Place) -> None:
    poison = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(4)]
    del poison  # the allocator hands it out again
    params = make_params(SHAPES, device="cuda")
    optimizer = make_optimizer(case, params, backend=place.backend)
    train(optimizer, 3)
    for name, value in contents(optimizer).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("case", [c for c in CASES if not c.label], ids=lambda case: case.id)
def test_three_hundred_tensors_take_one_launch_or_two_with_norms(case: Case) -> None:
    params = make_params([(1000 + i,) for i in range(300)], device="cuda")
    clipping = {"max_grad_norm": 0.0} if case.rule == "lamb" else {}
    optimizer = make_optimizer(case, params, backend="native", **clipping)
    give_grads(params, 1)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == (2 if rule_of(case).rule in ("lamb", "lars") else 1), kernels


@each_case
def test_parameters_on_several_devices_in_one_group(case: Case) -> None:
    shapes = SHAPES[:2]
    mixed = [*make_params(shapes, device="cuda"), *make_params(shapes)]
    apart = [*make_params(shapes, device="cuda"), *make_params(shapes)]
    clipping = {"max_grad_norm": 0.0} if case.rule == "lamb" else {}
    together = make_optimizer(case, mixed, **clipping)
    two = [make_optimizer(case, apart[:2], **clipping), make_optimizer(case, apart[2:], **clipping)]
    for k in range(1, 4):
        give_grads(mixed, k)
        give_grads(apart, k)
        for optimizer in (together, *two):
            optimizer.step()
    for p, q in zip(mixed, apart, strict=True):
        assert_same_bits(p, q)


def test_clipping_joins_the_norms_of_several_devices() -> None:
    lamb = next(case for case in CASES if case.rule == "lamb")
    params = [*make_params(SHAPES[:2], device="cuda"), *make_params(SHAPES[2:])]
    optimizer = make_optimizer(lamb, params, max_grad_norm=0.5)
    truth = Trajectory(lamb, params)
    for k in range(1, 4):
        give_grads(params, k)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
        optimizer.step()
        truth.step(optimizer, factor=0.5 / norm)
    truth.check(optimizer)
