# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows of the engine: the compiled code's bits, vectors, programs side by side, graphs, streams."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass._ops import OPS
from singlepass.reference import rational as reference_rational
from singlepass.triton_kernels._table import CHUNK
from singlepass.triton_kernels.optim import grad_norm
from singlepass.triton_kernels.optim import launchers as optim
from singlepass.triton_kernels.rational import launchers as rational
from singlepass.triton_kernels.spectral import launchers as spectral

from ..optim.steps import Mix, Tensors, call, make_tensors, rule_of, set_grads
from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .interpreted import test_rational as interpreted_rational
from .interpreted import test_spectral as interpreted_spectral

pytestmark = pytest.mark.gpu

BY_ID = {case.id: case for case in CASES}
WITHOUT_NORMS = [case for case in CASES if case.rule not in ("lamb", "lars")]
BF16, FP16 = torch.bfloat16, torch.float16
MIXES = [Mix(), Mix(BF16, BF16), Mix(torch.float32, BF16, BF16), Mix(FP16, FP16, FP16)]
SHAPES = [(0,), (1,), (7,), (1000,), (3, CHUNK + 5)]


def run(backend: str, case: Case, tensors: Tensors, **options: Any) -> None:
    call(rule_of(case).on(backend), case, tensors, **options)


def assert_all_same(a: Tensors, b: Tensors) -> None:
    for x, y in zip(a.written(), b.written(), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize(
    "mix", [Mix(), Mix(BF16, BF16), Mix(torch.float32, BF16, BF16), Mix(FP16, FP16, FP16)], ids=str
)
@pytest.mark.parametrize("case", WITHOUT_NORMS, ids=lambda case: case.id)
def test_same_bits_as_cpp_on_the_cpu(case: Case, mix: Mix) -> None:
    ours, cpp = make_tensors(case, SHAPES, mix, device="cuda"), make_tensors(case, SHAPES, mix)
    for t in range(1, 11):
        set_grads(ours, t)
        set_grads(cpp, t)
        options = {"seed": 1234567890123, "ids": [3, 0, 1, 2, 9]} if mix.param == BF16 else {}
        run("triton", case, ours, **options)
        run("native", case, cpp, **options)
        assert_all_same(ours, cpp)


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("mix", [Mix(), Mix(BF16, BF16)], ids=str)
def test_misaligned_tensors_and_their_neighbours(mix: Mix, offset: int) -> None:
    buffers: list[Tensor] = []

    def shifted(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 2 * offset,), float("nan"), dtype=t.dtype, device=t.device)
        buffers.append(buffer)
        return buffer[offset : offset + t.numel()].view(t.shape).copy_(t)

    case = BY_ID["adamw"]
    ours = make_tensors(case, SHAPES[1:], mix, device="cuda", like=shifted)
    aligned = make_tensors(case, SHAPES[1:], mix, device="cuda")
    for _ in range(2):
        run("triton", case, ours)
        run("triton", case, aligned)
    assert_all_same(ours, aligned)
    for buffer in buffers:
        assert torch.cat((buffer[:offset], buffer[-offset:])).isnan().all()


@pytest.mark.parametrize("name", ["lamb", "lars", "adamw"])
def test_the_same_bits_again(name: str) -> None:
    case = BY_ID[name]
    first, second = (make_tensors(case, [(300 * CHUNK + 77,), (5,)], Mix(), device="cuda") for _ in range(2))
    for _ in range(3):
        run("triton", case, first)
        run("triton", case, second)
        assert_all_same(first, second)


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgdsai"])
def test_a_captured_step_follows_its_inputs_and_outlives_the_tables(name: str) -> None:
    case = BY_ID[name]
    tensors = make_tensors(case, SHAPES, Mix(BF16, BF16), device="cuda")
    options: dict[str, Any] = {
        "lr": torch.tensor(case.lr, device="cuda"),
        "grad_scale": torch.ones((), device="cuda"),
        "found_inf": torch.zeros((), device="cuda"),
        "seed": 7,
        "ids": list(range(len(SHAPES))),
    }
    run("triton", case, tensors, **options)
    expected = tensors.clone()
    graph = captured(lambda: run("triton", case, tensors, **options))
    assert_all_same(tensors, expected)

    optim._plans._entries.clear()
    torch.cuda.empty_cache()
    poison = [torch.full((1 << 20,), -1, dtype=torch.int64, device="cuda") for _ in range(4)]
    for t, skipped in ((2, False), (3, True), (4, False)):
        set_grads(tensors, t)
        set_grads(expected, t)
        options["lr"].fill_(case.lr / t)
        options["grad_scale"].fill_(t)
        options["found_inf"].fill_(skipped)
        graph.replay()
        run("triton", case, expected, **options)
        assert_all_same(tensors, expected)
    del poison


def test_a_captured_gradient_norm() -> None:
    grads = [torch.randn(CHUNK + 3, device="cuda"), torch.randn(9, device="cuda", dtype=BF16)]
    grad_norm.grad_norm(grads)
    results: list[Tensor] = []
    graph = captured(lambda: results.append(grad_norm.grad_norm(grads, max_norm=1.0)))
    for scale in (1.0, 0.5):
        for g in grads:
            g.mul_(scale)
        graph.replay()
        assert_same_bits(results[0], grad_norm.grad_norm(grads, max_norm=1.0))


def test_another_stream() -> None:
    case = BY_ID["lamb"]
    tensors = make_tensors(case, SHAPES, Mix(), device="cuda")
    expected = tensors.clone()
    run("triton", case, expected)
    run("triton", case, expected)
    run("triton", case, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run("triton", case, tensors)
    stream.synchronize()
    assert_all_same(tensors, expected)


def test_gradient_norm_same_bits_as_cpp_on_the_cpu() -> None:
    grads = [torch.randn(shape) for shape in SHAPES] + [torch.randn(1001).bfloat16(), torch.randn(1001)[1:]]
    for options in ({}, {"max_norm": 1.0, "eps": 1e-6}):
        ours = grad_norm.grad_norm([g.cuda() for g in grads], **options)
        assert_same_bits(ours, OPS["grad_norm"].on("native")(grads, **options))


def to_cuda(t: Tensor | None) -> Tensor | None:
    """A copy with the same strides, dense or not."""
    return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)


@pytest.mark.parametrize("case", interpreted_rational.CASES, ids=str)
def test_rational_within_roundings(case: interpreted_rational.Case) -> None:
    interpreted_rational.check(case, to_cuda)


def rational_arguments(*shape: int) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    tables = torch.randn(1, 6, device="cuda"), torch.randn(8, 4, device="cuda")
    x, gate = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(2))
    seed = torch.tensor([2**40 + 5], device="cuda")
    options = {"form": 0, "channel_dim": -1, "dropout": 0.3, "seed": seed}
    return [x, *tables, torch.randn(shape[-1], device="cuda"), gate], options


def test_rational_the_same_bits_again() -> None:
    inputs, options = rational_arguments(1576, 3072)
    grad = torch.randn_like(inputs[0])
    y, first = rational.rational(*inputs, **options), rational.rational_backward(grad, *inputs, **options)
    for _ in range(3):
        assert_same_bits(rational.rational(*inputs, **options), y)
        for again, result in zip(rational.rational_backward(grad, *inputs, **options), first, strict=True):
            assert_same_bits(again, result)
    dropped = reference_rational.rational(*[t.cpu() for t in inputs], **options) == 0.0
    assert torch.equal(y.cpu() == 0.0, dropped)


def test_a_captured_rational_follows_its_seed() -> None:
    inputs, options = rational_arguments(1000, 96)
    results: list[Tensor] = []

    def both() -> tuple[Tensor, ...]:
        grad = inputs[0]
        return rational.rational(*inputs, **options), *rational.rational_backward(grad, *inputs, **options)

    both()
    graph = captured(lambda: results.extend(both()))
    for seed in (1, 2):
        options["seed"].fill_(seed)
        inputs[0].normal_()
        graph.replay()
        for result, expected in zip(results, both(), strict=True):
            assert_same_bits(result, expected)


@pytest.mark.slow("2^31 elements")
def test_rational_of_more_than_two_billion_elements() -> None:
    rows, channels = (1 << 21) + 3, 1024
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    inputs, options = rational_arguments(2, channels)
    options["dropout"] = 0.0
    inputs[4] = None
    x = torch.randn(1, channels, dtype=BF16, device="cuda").repeat(rows, 1)
    x[-2:] = inputs[0]
    assert_same_bits(rational.rational(x, *inputs[1:], **options)[-2:], rational.rational(*inputs, **options))
    grad = torch.zeros_like(x)
    grad[-2:] = 1.0
    results = rational.rational_backward(grad, x, *inputs[1:], **options)
    expected = rational.rational_backward(grad[-2:], *inputs, **options)
    assert_same_bits(results[0][-2:], expected[0])
    for result, e in zip(results[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(result, e, rtol=1e-4, atol=1e-3)


def spectral_lists(dtype: torch.dtype) -> list[list[Tensor]]:
    """Vectors of every width of tiles, aligned and not, and singular values."""
    shapes = [(300, 768), (70, 4096), (9, 20000), (9, 9001), (33, 77), (5000,)]
    lists = interpreted_spectral.make_lists(shapes, lambda t: t.to(dtype))
    return [[t.cuda() for t in values] for values in lists]


def clones(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.clone() for t in values] for values in lists]


def assert_same_lists(a: list[list[Tensor]], b: list[list[Tensor]]) -> None:
    for x, y in zip(chain(*a), chain(*b), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_captured_spectral_step_follows_its_inputs(dtype: torch.dtype, project: bool) -> None:
    lists = spectral_lists(dtype)
    lr, grad_scale, found_inf = (torch.ones((), device="cuda") * x for x in (0.05, 1.0, 0.0))
    options = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf, "project": project}
    interpreted_spectral.step(lists, **options)
    expected = clones(lists)
    graph = captured(lambda: interpreted_spectral.step(lists, **options))
    assert_same_lists(lists, expected)

    spectral._buckets._entries.clear()
    torch.cuda.empty_cache()
    poison = [torch.full((1 << 20,), -1, dtype=torch.int64, device="cuda") for _ in range(4)]
    for t, skipped in ((2, False), (3, True), (4, False)):
        for g, same in zip(lists[1], expected[1], strict=True):
            same.copy_(g.normal_())
        lr.fill_(0.05 / t)
        grad_scale.fill_(t)
        found_inf.fill_(skipped)
        graph.replay()
        interpreted_spectral.step(expected, **options)
        assert_same_lists(lists, expected)
    del poison


def test_spectral_sums_have_the_same_bits_again() -> None:
    torch.manual_seed(0)
    q, t, s = torch.randn(10007, 1000, device="cuda"), torch.randn(10007, 1000, device="cuda"), torch.rand(1000).cuda()
    scale, backward = OPS["spectral_scale_"].on("triton"), OPS["lorentz_backward"].on("triton")
    sums, grads = scale(q.clone(), t, s), backward(q, t, s[:1], k=1.0, offset=1.1)
    for _ in range(3):
        assert_same_bits(scale(q.clone(), t, s), sums)
        for again, grad in zip(backward(q, t, s[:1], k=1.0, offset=1.1), grads, strict=True):
            assert_same_bits(again, grad)
