# SPDX-License-Identifier: Apache-2.0
"""How often kernels are launched, and that nothing but dtypes, flags and the number of states compiles a new one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from singlepass._ops import OPS
from singlepass.kv import dequantize, probe_saliency, quantize
from singlepass.triton_kernels._table import CHUNK, IS_ALIGNED
from singlepass.triton_kernels.kv import launchers as kv
from singlepass.triton_kernels.spectral import launchers as spectral

from ..kv.inputs import Part, attention
from ..optim.steps import Mix, call, make_tensors, rule_of
from ..simt.truth import CASES, Case
from .recorded import Recorded

TARGET = GPUTarget("cuda", 90, 32)
BY_ID = {case.id: case for case in CASES}


def step(case: Case, tensors: Any, **options: Any) -> None:
    call(rule_of(case).on("triton"), case, tensors, **options)


@pytest.mark.parametrize(("name", "launches"), [("adamw", 1), ("adan", 1), ("lamb", 2), ("lars", 2)])
def test_one_launch_for_any_number_of_tensors(name: str, launches: int, recorded: Recorded) -> None:
    tensors = make_tensors(BY_ID[name], [(1,)] * 298 + [(0,), (2 * CHUNK + 1,)], Mix())
    step(BY_ID[name], tensors)
    assert [launch.grid for launch in recorded["step_kernel"]] == [(302,)] * launches
    assert len(recorded["list_chunks_kernel"]) == 1
    step(BY_ID[name], tensors)
    assert len(recorded["step_kernel"]) == 2 * launches
    assert len(recorded["list_chunks_kernel"]) == 1, "the table is kept"


def test_one_launch_for_each_combination_of_dtypes(recorded: Recorded) -> None:
    parts = [make_tensors(BY_ID["lion"], [(5,), (6,)], mix) for mix in (Mix(), Mix(torch.bfloat16), Mix())]
    parts[0].params += parts[1].params + parts[2].params
    parts[0].grads += parts[1].grads + parts[2].grads
    parts[0].states[0] += parts[1].states[0] + parts[2].states[0]
    parts[0].steps += parts[1].steps + parts[2].steps
    step(BY_ID["lion"], parts[0])
    assert [launch.grid for launch in recorded["step_kernel"]] == [(4,), (2,)]


def test_gradient_norm_launches(recorded: Recorded) -> None:
    norm = OPS["grad_norm"].on("triton")
    grads = [torch.zeros(5), torch.zeros(2 * CHUNK), torch.zeros(0)]
    for _ in range(2):
        norm(grads)
    assert [launch.grid for launch in recorded["grad_norm_kernel"]] == [(4,)] * 2
    assert len(recorded["list_chunks_kernel"]) == 1
    norm([*grads, torch.zeros(3, dtype=torch.bfloat16)])
    assert [launch.grid for launch in recorded["grad_norm_kernel"]][2:] == [(4,), (1,)]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_nothing_is_compiled_again(name: str, recorded: Recorded) -> None:
    case, one = BY_ID[name], torch.ones(())
    mix = Mix(torch.bfloat16, torch.bfloat16)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)

    for shapes in ([(1,)], [(16,)], [(1000,), (0,)], [(3 * CHUNK,)] * 17):
        step(case, make_tensors(case, shapes, mix), seed=0, ids=list(range(len(shapes))))
    step(case, make_tensors(case, [(64,)], mix, like=shifted), seed=2**40, ids=[1])
    tensors = make_tensors(case, [(64,)], mix)
    for lr in (0.0, 1.0, 16.0, 1e-300):
        for lr_dtype in (torch.float32, torch.float64):
            step(case, tensors, lr=torch.tensor(lr, dtype=lr_dtype), seed=1, ids=[16])
    misaligned = torch.ones(2)[1:]
    for scalar in (one, torch.zeros(64), misaligned):
        step(case, tensors, grad_scale=scalar[:1] if scalar.dim() else scalar, seed=16, ids=[1])
        step(case, tensors, found_inf=scalar[:1] if scalar.dim() else scalar, maximize=True, seed=1, ids=[1])
    for step_count in (1.0, 16.0):
        tensors.steps[0].fill_(step_count)
        step(case, tensors, seed=1, ids=[1])
    for eps, weight_decay in ((0.0, 0.0), (1.0, 1.0), (16.0, 16.0)):
        other = Case(case.rule, case.step, case.lr, case.hyper | {"eps": eps, "weight_decay": weight_decay})
        step(other, tensors, seed=1, ids=[1])
    variants = {launch.specialization(TARGET)[2] for launch in recorded["step_kernel"]}
    assert len(variants) == (2 if name == "lamb" else 1)
    assert len({launch.specialization(TARGET)[2] for launch in recorded["list_chunks_kernel"]}) == 1


def test_gradient_norm_is_not_compiled_again(recorded: Recorded) -> None:
    norm = OPS["grad_norm"].on("triton")
    for numel in (1, 16, 1000):
        for max_norm in (0.0, 1.0, 16.0):
            norm([torch.zeros(numel), torch.zeros(numel + 1)[1:]], max_norm=max_norm, eps=max_norm)
            norm([torch.zeros(numel)], grad_scale=torch.ones(2)[1:])
    assert len({launch.specialization(TARGET)[2] for launch in recorded["grad_norm_kernel"]}) == 1


@pytest.mark.parametrize("shifted", ["params", "grads", "states"])
def test_one_misaligned_tensor_keeps_its_record_from_vectors(shifted: str, recorded: Recorded) -> None:
    def shift(t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)

    tensors = make_tensors(BY_ID["adamw"], [(64,)] * 3, Mix())
    values = tensors.states[1] if shifted == "states" else getattr(tensors, shifted)
    values[1] = shift(values[1])
    step(BY_ID["adamw"], tensors)
    records = recorded["step_kernel"][0].args[0].view(3, -1)
    assert records[:, IS_ALIGNED.value].tolist() == [1, 0, 1]


def call_rational(
    x: torch.Tensor,
    *,
    form: int = 0,
    channel_dim: int = -1,
    groups: tuple[int, int] = (1, 8),
    degrees: tuple[int, int] = (5, 4),
    tables: torch.dtype = torch.float32,
    bias: bool = False,
    gate: bool = False,
    dropout: float = 0.0,
) -> None:
    """Forward and backward, with nothing computed: memory stays as it was allocated."""
    inputs = (
        x,
        torch.empty(groups[0], degrees[0] + 1, dtype=tables),
        torch.empty(groups[1], degrees[1] + (form == 2), dtype=tables),
        torch.empty(x.shape[channel_dim], dtype=tables) if bias else None,
        torch.empty_like(x) if gate else None,
    )
    options = {"form": form, "channel_dim": channel_dim, "dropout": dropout, "seed": torch.zeros(1, dtype=torch.int64)}
    OPS["rational"].on("triton")(*inputs, **options)
    OPS["rational_backward"].on("triton")(torch.empty_like(x), *inputs, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "channel_dim", "groups"),
    [
        ((128, 197, 3072), -1, 8),
        ((128, 197, 768), -1, 1),
        ((7,), 0, 1),
        ((4096, 96), -1, 96),
        ((256, 512, 14, 14), 1, 8),
        ((2, 64, 512, 512), 1, 1),
        ((1024, 2048, 1, 2), 1, 1),
    ],
    ids=str,
)
def test_rational_launches(
    shape: tuple[int, ...], channel_dim: int, groups: int, bias: bool, recorded: Recorded
) -> None:
    call_rational(torch.empty(shape, dtype=torch.bfloat16), channel_dim=channel_dim, groups=(1, groups), bias=bias)
    assert [len(launches) for launches in recorded.by_kernel().values()] == [1, 1, 1]
    partials = recorded["finish_kernel"][0].args[0]
    assert partials.nbytes <= 1 << 20


@pytest.mark.slow("compiles kernels")
def test_rational_is_not_compiled_again(recorded: Recorded) -> None:

    def variants() -> list[int]:
        by_kernel = recorded.by_kernel().values()
        return [len({launch.specialization(TARGET)[2] for launch in launches}) for launches in by_kernel]

    for bias in (False, True):
        for rows in (16, 64, 65, 1000, 197 * 128):
            for channels, dropout in ((768, 0.1), (192, 0.5), (2304, 0.999)):
                call_rational(torch.empty(rows, channels), bias=bias, dropout=dropout)
            call_rational(torch.empty(rows, 1536).chunk(2, -1)[1], bias=bias, dropout=0.1, groups=(8, 1))
            call_rational(torch.empty(768, 768), bias=bias, dropout=0.1)
    assert variants() == [2, 2, 2], "one without and one with a bias"
    for rows in range(1, 40):
        for channels in range(8, 200, 8):
            call_rational(torch.empty(rows, channels), bias=True, dropout=0.1)
    # Five widths of tiles; vectors of 1, 2 and 4 numbers; random bits by eights or one by one.
    assert all(count <= 2 * 5 * 3 for count in variants())


def test_kv_decode_is_not_compiled_again(recorded: Recorded) -> None:
    """Two launches for any number of segments, blocks and queries, and code for dtypes and layouts alone."""
    for length in (1, 16, 17, 128):
        starts = tuple(range(0, 2 * length + 1, 2))  # of two slots at least, so that codes of 2 bits are aligned
        for batch, heads, group, queries in ((1, 1, 1, 1), (2, 1, 16, 1), (1, 16, 4, 5)):
            shape = {"batch": batch, "heads": heads, "group": group, "queries": queries, "width": 32}
            attention((Part(4, starts), Part(2, starts)), **shape, slots=length + 4).call("triton")
            assert len(recorded["decode_kernel"]) == len(recorded["merge_kernel"])
    assert len(recorded["decode_kernel"]) == 12
    for name in ("decode_kernel", "merge_kernel"):
        assert len({launch.specialization(TARGET)[2] for launch in recorded[name]}) == 1, name


@pytest.mark.slow("compiles kernels")
def test_kv_splits_depend_on_one_sequence_alone(recorded: Recorded) -> None:
    starts = tuple(range(1001))
    for batch, heads in ((1, 1), (3, 1), (1, 4)):
        attention((Part(4, starts),), batch=batch, heads=heads, width=16).call("triton")
        (programs,) = recorded["decode_kernel"][-1].grid
        assert programs == batch * heads * (-(-1000 // kv.BLOCKS) + 1)


def test_kv_codec_and_saliency_are_not_compiled_again(recorded: Recorded) -> None:
    for batch, heads, length in ((1, 1, 1), (2, 16, 16), (3, 5, 1000)):
        x = torch.zeros(batch, heads, length, 32)
        for block in (1, 16, 500):
            dequantize(quantize(x, 4, block=block, backend="triton"), backend="triton")
        for probes in (1, 16, 65):
            probe_saliency(x[:, :, :1].expand(-1, -1, probes, -1), x, torch.zeros(probes).long(), backend="triton")
    for name, variants in (("codec_kernel", 2), ("log_sums_kernel", 1), ("column_sums_kernel", 1)):
        assert len({launch.specialization(TARGET)[2] for launch in recorded[name]}) == variants, name


def call_projection(x: torch.Tensor, ranks: tuple[int, ...] = (32, 16), rotated: int = 0) -> None:
    """``kv_project_`` of as many groups of heads as there are ranks."""
    heads = x.shape[1] // len(ranks)
    bases = [torch.zeros(heads, x.shape[3], rank) for rank in ranks]
    out = [torch.zeros(len(x), heads, x.shape[2], rank, dtype=x.dtype) for rank in ranks]
    turns = torch.zeros(2, 1, x.shape[2], rotated, dtype=x.dtype) if rotated else (None, None)
    OPS["kv_project_"].on("triton")([x], bases, *turns, out, heads=list(range(x.shape[1])))


def test_kv_projection_is_not_compiled_again(recorded: Recorded) -> None:
    """For other lengths, batches and heads; each rank is a kernel of its own."""
    for batch, length in ((1, 1), (2, 16), (3, 1000)):
        call_projection(torch.zeros(batch, 4, length, 32))
        call_projection(torch.zeros(batch, 4, length, 32), rotated=32)
    assert len({launch.specialization(TARGET)[2] for launch in recorded["project_kernel"]}) == 4


def call_spectral_step(
    shapes: list[tuple[int, ...]],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    *,
    lr: float = 0.1,
    eps: float = 1e-8,
    **options: Any,
) -> None:
    """Parameters and moments have the first dtype, gradients the second."""
    params, exp_avg, exp_avg_sq = ([torch.empty(shape, dtype=dtypes[0]) for shape in shapes] for _ in range(3))
    grads = [torch.empty(shape, dtype=dtypes[1]) for shape in shapes]
    steps = [torch.zeros(()) for _ in shapes]
    hyper = {"beta1": 0.9, "beta2": 0.999, "eps": eps, "weight_decay": eps}
    tensors = params, grads, exp_avg, exp_avg_sq, steps
    OPS["spectral_step_"].on("triton")(*tensors, torch.tensor(lr), **hyper, **options)


def call_exchange(count: int, rank: int, columns: int, frozen: torch.dtype = torch.float32) -> None:
    """The draw for a layer of so many singular values, and the swap of two pairs."""
    draw = {"ranks": [rank], "ids": [count], "seed": rank, "draw": count, "uniform": 0.5}
    (exchange,) = OPS["spectral_sample"].on("triton")([torch.empty(count, dtype=torch.bfloat16)], **draw)
    active, rest = torch.empty(rank, columns), torch.empty(count - rank, columns, dtype=frozen)
    scales = torch.empty(count - rank, -(-columns // 128))
    values = torch.empty(count)
    pairs = [active, values[:rank]], [rest, values[rank:]], [scales, scales], [exchange, exchange]
    OPS["spectral_swap_"].on("triton")(*pairs)


def call_scale(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
    q = torch.empty(rows, columns, dtype=dtype)
    OPS["spectral_scale_"].on("triton")(q, q, torch.empty(columns))


def call_lorentz(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
    z, log_scale = torch.empty(rows, columns, dtype=dtype), torch.empty(1)
    OPS["lorentz"].on("triton")(z, log_scale, k=1.0, offset=1.1)
    OPS["lorentz_backward"].on("triton")(z, z, log_scale, k=16.0, offset=4.5)


def test_spectral_step_launches(recorded: Recorded) -> None:
    call_spectral_step([(8, 768), (8, 1024), (3, 40)] * 20)
    assert [launch.grid for launch in recorded["step_kernel"]] == [(380,)], "a program for each row"
    call_spectral_step([(8, 768), (8, 3072), (4, 8192), (2, 16384), (8, 4096)])
    assert [launch.grid for launch in recorded["step_kernel"]][1:] == [(8,), (16,), (4,), (2,)]
    call_spectral_step([(1024,), (2000,), (0,), (0, 8), (8, 0)])
    # Aligned ones and that of odd length; whatever has no element counts its step.
    assert sum(launch.grid[0] for launch in recorded["step_kernel"][5:]) == 1 + 2 + 1 + 1 + 1


def test_spectral_ops_are_not_compiled_again(recorded: Recorded) -> None:
    for rows in (1, 16, 1000):
        for columns in (8, 16, 1000):
            call_spectral_step([(rows, columns)] * rows, lr=rows, eps=columns, grad_scale=torch.ones(2)[1:])
            call_spectral_step([(rows, columns)], found_inf=torch.ones(()), maximize=True)
        for columns in (8, 80, 4096):
            call_scale(rows, columns)
        for columns in (132, 256, 512):
            call_lorentz(rows, columns)
        for columns in (1, 16, 1000):
            call_exchange(columns + rows, rows, columns, torch.int8 if rows == 1 else torch.bfloat16)
    for name, launches in recorded.by_kernel().items():
        assert len({launch.specialization(TARGET)[2] for launch in launches}) == 1, name
    for columns in (*range(2, 700, 3), 2047, 2048, 2049, 5000, 9000, 100000):
        call_scale(3, columns)
        call_lorentz(3, columns)
        call_spectral_step([(3, columns)])
    # Classes of widths, with that of rows that take several tiles; aligned or not.
    most = {"scale_kernel": 1, "lorentz_kernel": 5, "lorentz_backward_kernel": 5, "step_kernel": 4}
    for name, classes in most.items():
        assert len({launch.specialization(TARGET)[2] for launch in recorded[name]}) <= 2 * classes, name


def test_spectral_sums_take_little_memory(recorded: Recorded) -> None:
    for rows, columns in ((1 << 20, 32), (4096, 4096), (1 << 16, 1000), (100, 1 << 15)):
        call_scale(rows, columns)
        call_lorentz(rows, columns)
        assert recorded["sum_parts_kernel"][-1].args[0].numel() <= (rows // 16 + 1) * columns
        assert recorded["sum_numbers_kernel"][-1].args[0].numel() <= 2 * spectral.LORENTZ_PROGRAMS
    assert recorded["sum_parts_kernel"][0].args[0].numel() <= (1 << 20) * 32 // 512
