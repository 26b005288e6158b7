# SPDX-License-Identifier: Apache-2.0
"""Predictions of Triton's kernels: every op has one, of the launches that are made, and what is compiled keeps to its
budgets."""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("triton", reason="triton is not installed")

import triton

from counting import cubins, model
from counting import optim as native_optim
from counting import triton as portable
from counting.gpus import GPUS
from counting.plan import Plan
from counting.triton.plan import name_of
from counting.triton.recorder import TABLE, recording
from singlepass import optim
from singlepass._ops import OPS
from singlepass.bench.kv.caches import DECODE
from singlepass.bench.optim import models
from singlepass.bench.registry import Case, cases

from ..simt.build import cubin_folder
from .triton_budgets import ARCH, TRITON, TRITON_BUDGETS, TritonBudget

CASES = {case.name: case for case in cases(torch.device("cuda")) if portable.predicts(case)}
SIZES = ("gpt2-small", "128x197x768", "2048x8192", "12-blocks-768", "1x8192")
# Once in hundreds of steps; the kernel of grad_norm over shards; kv_decode with a token more to store.
NOT_PREDICTED = {"spectral_sample", "spectral_swap_", "grad_squares", "kv_step_"}

compiles = pytest.mark.skipif(cubins.tool("cuobjdump") is None, reason="no cuobjdump, which Triton has")


def test_every_op_with_a_triton_kernel_is_predicted() -> None:
    predicted = {op for case in CASES.values() for op in case.ops}
    assert {name for name, op in OPS.items() if op.has_triton} - predicted == NOT_PREDICTED


@pytest.mark.deep("reads cubins, which that tier compiles")
@pytest.mark.xdist_group("cubins")
@pytest.mark.skipif(cubins.tool("nvcc") is None or cubins.tool("cuobjdump") is None, reason="no CUDA toolkit")
def test_what_is_predicted_in_cuda_is_predicted_in_triton() -> None:
    cubin_folder()
    assert [case.name for case, _ in model.planned(GPUS[0])] == list(CASES)


@pytest.mark.parametrize("op", ["Lion", "LAMB"])
def test_optimizers_are_launched_as_counted(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are of the shapes of a model; what is recorded for them has the code of one small tensor."""
    case = CASES[f"optim/{op}/1000x1000/float32"]
    shapes = ((20_000,), (3, 16_384), (7,))
    monkeypatch.setitem(native_optim.MODELS, case.size, models.Model(case.size, "", shapes))
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    with recording() as recorded:
        getattr(optim, op)(params, **native_optim.RULE[op].arguments, backend="triton").step()
    launches = [launch for launch in recorded if launch.kernel.__name__ != TABLE]
    plans = portable.plans(case)
    assert [(plan.kernel, plan.blocks) for plan in plans] == [(name_of(launch), *launch.grid) for launch in launches]
    # 39 full tiles and one more, then 96, then one, on six chunks.
    assert [plan.work[0].times["tiles"] for plan in plans] == [(39 + 96) / 6] * len(plans)
    assert [plan.work[0].times["rest"] for plan in plans] == [2 / 6] * len(plans)


@cache
def planned(name: str) -> list[Plan]:
    return portable.plans(CASES[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.size in SIZES])
def test_launches_move_what_the_floor_says(name: str) -> None:
    """And sums that one leaves for the next. Of decode attention these are many: each split leaves float32 results.
    Quantising leaves out the window, which the floor has."""
    case, plans = CASES[name], planned(name)
    assert 0.99 * case.bytes <= sum(plan.bytes for plan in plans) <= (1.6 if case.op == DECODE else 1.12) * case.bytes


@pytest.mark.deep("compiles a kernel of each kind, and reads its code")
@pytest.mark.xdist_group("triton's cubins")
@pytest.mark.skipif(not triton.__version__.startswith(f"{TRITON}."), reason=f"budgets are of Triton {TRITON}")
@compiles
@pytest.mark.parametrize("budget", TRITON_BUDGETS, ids=str)
def test_a_kernel_keeps_its_budget(budget: TritonBudget) -> None:
    compiled = planned(budget.case)[budget.launch].compiled(ARCH)
    assert compiled.kernel.local == 0, "registers are spilled"
    assert compiled.hot.path.calls == 0
    assert compiled.kernel.registers <= budget.registers
    assert compiled.hot_count(lambda path: len(path.code)) <= budget.instructions


def test_every_kernel_has_a_budget() -> None:
    """Of one dtype."""

    def kernels(names: set[str]) -> set[str]:
        return {plan.launch.kernel.__name__ + CASES[name].family for name in names for plan in planned(name)}

    small = {name for name, case in CASES.items() if case.size not in ("8x131072", "1x131072", "8x32768")}
    assert kernels(small) == kernels({budget.case for budget in TRITON_BUDGETS})


@pytest.mark.slow("compiles kernels")
@compiles
def test_the_way_of_a_kernel_is_found_on_every_architecture() -> None:
    """Of one kernel, which is small."""
    case = CASES["optim/Lion/gpt2-small/float32"]
    for gpu in GPUS:
        (compiled,) = (plan.compiled(gpu.arch) for plan in portable.plans(case))
        loop = compiled.hot.path
        assert (loop.count("LDG.128"), loop.count("STG.128"), loop.count("LDG.32")) == (3, 2, 0)
        cell = model.cell(gpu, case.bytes, [compiled])
        assert cell["binds"] == "memory"
        assert 0.85 < cell["share"] < 0.95


def test_what_cannot_be_counted_says_so() -> None:
    case: Case = CASES["kv/low_rank_append/1x8192/bfloat16"]
    code = cubins.parse_code(
        "\t\tFunction : f\n        /*0000*/  UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12] ;  /* 0x0000000000000000 */\n"
        "                                         /* 0x0000000000000000 */\n"
    )["f"]
    kernel = cubins.Kernel("f", "sm_100", code, 32, 0, 0)
    plan = portable.plans(case)[0]
    assert model.cell(GPUS[-1], case.bytes, [model.Compiled(plan, kernel)]) == {
        "not_counted": "products by tcgen05, whose time cannot be read from machine code"
    }
