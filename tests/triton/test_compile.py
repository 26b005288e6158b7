# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for every supported architecture, with no GPU, and looks at the code that comes out.

Triton keeps what it has compiled: only a change of the kernels makes this slow again.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from singlepass._ops import OPS
from singlepass.kv import dequantize, probe_saliency, quantize

from ..kv.inputs import attention
from ..optim.steps import Mix, call, make_tensors, rule_of
from ..simt.truth import CASES, Case
from .recorded import Recorded
from .test_launches import (
    call_exchange,
    call_lorentz,
    call_projection,
    call_rational,
    call_scale,
    call_spectral_step,
)

ARCHS = [80, 90, 100, 120]
RULES = [case for case in CASES if case.id == case.rule]
FLOAT32, BFLOAT16 = Mix(), Mix(torch.bfloat16, torch.bfloat16)
# What a thread holds of one tensor of a tile. The assembler may put a scalar or two on the stack before the loop, where
# that lets one more block run; tiles belong in registers.
TILE_BYTES = 16
ROUNDED_OTHERWISE = r"fma\.rn\.f32|(?:add|sub|mul|div|sqrt|rcp)\.\S*(?:ftz|approx|full)\S*"

others = pytest.mark.deep("the same kernels for three more architectures: minutes")
each_arch = pytest.mark.parametrize(
    "arch", [pytest.param(arch, id=f"sm_{arch}", marks=() if arch == 90 else others) for arch in ARCHS]
)


def step(case: Case, mix: Mix) -> None:
    options = {"seed": 0, "ids": [0]} if mix.param == torch.bfloat16 else {}
    call(rule_of(case).on("triton"), case, make_tensors(case, [(1,)], mix), **options)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"STACK:(\d+)", usage)
    assert match, usage
    return int(match[1])


def check(
    launch: Any,
    arch: int,
    folder: Path,
    rounded_otherwise: str | None = ROUNDED_OTHERWISE,
    tile_bytes: int = TILE_BYTES,
) -> str:
    """Compiles a launch and returns its PTX."""
    compiled = launch.compile(arch)
    ptx: str = compiled.asm["ptx"]
    assert re.search(rf"^\.target sm_{arch}", ptx, re.M)
    if rounded_otherwise is not None:
        assert not re.findall(rounded_otherwise, ptx), "float32 arithmetic is not what the source says"
    assert stack_bytes(compiled.asm["cubin"], folder) < tile_bytes, "registers are spilled"
    return ptx


@each_arch
@pytest.mark.parametrize("case", RULES, ids=lambda case: case.id)
def test_steps(case: Case, arch: int, recorded: Recorded, tmp_path: Path) -> None:
    # Neighbouring rules and architectures take turns in dtypes: each rule has both, and so has each architecture.
    step(case, (FLOAT32, BFLOAT16)[(RULES.index(case) + ARCHS.index(arch)) % 2])
    for launch in recorded["step_kernel"]:
        ptx = check(launch, arch, tmp_path)
        assert re.search(r"ld\.global\S*\.v[248]\.b32", ptx), "full tiles are loaded by vectors"
        settled = r"bar\.sync(?:(?!(?:ld|st)\.global)[\s\S])*atom\.global\.gpu\.acq_rel"
        assert re.search(settled, ptx), "all threads are past their loads and stores when a ticket is drawn"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_dtypes(param: torch.dtype, dtype: torch.dtype, recorded: Recorded, tmp_path: Path) -> None:
    step(RULES[0], Mix(param, dtype, dtype))
    check(recorded["step_kernel"][0], 90, tmp_path)


@each_arch
def test_gradient_norm_and_table(arch: int, recorded: Recorded, tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    OPS["grad_norm"].on("triton")([torch.zeros(1, dtype=dtype) for dtype in dtypes])
    OPS["grad_squares"].on("triton")([torch.zeros(1)])
    assert len(recorded["grad_norm_kernel"]) == 4
    for launch in recorded["grad_norm_kernel"] + recorded["list_chunks_kernel"]:
        check(launch, arch, tmp_path)


RATIONAL = {
    "form A": {},
    "form B, a bias for columns": {"form": 1, "bias": True},
    "form C, all, largest": {"form": 2, "degrees": (7, 6), "bias": True, "gate": True, "dropout": 0.1},
    "form D": {"form": 3, "degrees": (3, 2)},
    "form D, all, largest": {"form": 3, "degrees": (7, 6), "bias": True, "gate": True, "dropout": 0.1},
    "planes": {"shape": (64, 96, 16, 16), "channel_dim": 1, "bias": True, "dropout": 0.1},
    "odd": {"shape": (64, 3, 7, 7), "channel_dim": 1, "groups": (3, 1), "bias": True, "gate": True, "dropout": 0.1},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow("large kernels")
@each_arch
@pytest.mark.parametrize("name", RATIONAL)
def test_rational(name: str, arch: int, recorded: Recorded, tmp_path: Path) -> None:
    options = dict(RATIONAL[name])
    turn = [*RATIONAL].index(name) + ARCHS.index(arch)
    x = torch.empty(options.pop("shape", (4096, 768)), dtype=DTYPES[turn % 3])
    call_rational(x, tables=DTYPES[turn % 2], **options)
    # Sums of products are fused on purpose, and quotients within 2 ulp.
    otherwise = r"(?:add|sub|mul|fma|sqrt|rcp)\.\S*(?:ftz|approx|full)\S*|div\.(?:approx|\S*ftz)"
    for launch in recorded.launches:
        ptx = check(launch, arch, tmp_path, otherwise)
        if launch.kernel is not recorded["finish_kernel"][0].kernel and name != "odd":
            assert re.search(r"ld\.global\S*\.v[248]\.b32", ptx), "tiles are loaded by vectors"
            assert re.search(r"st\.global\S*\.v[248]\.b32", ptx), "tiles are stored by vectors"


KV_DECODE = {
    "zipcache": {"dtype": torch.bfloat16, "width": 128},
    "kivi": {"dtype": torch.float16, "width": 80, "separable": False, "value_group": 16},
    "token and head": {"key_axis": "token", "separable": False, "width": 64},
    "wide": {"dtype": torch.bfloat16, "width": 256},
}
KV_CODECS = [("channel", None, False), ("token", None, True), ("token", 32, False)]


@pytest.mark.slow("the largest kernel")
@each_arch
def test_kv_decode(arch: int, recorded: Recorded, tmp_path: Path) -> None:
    name = [*KV_DECODE][ARCHS.index(arch)]
    attention(**KV_DECODE[name]).call("triton")
    for launch in [*recorded["decode_kernel"], *recorded["merge_kernel"]]:
        ptx = check(launch, arch, tmp_path, rounded_otherwise=None)
        if launch.kernel is recorded["decode_kernel"][0].kernel:
            assert re.search(r"mma\S*\.f32\.f16\.f16\.f32|wgmma|tcgen05", ptx), "tensor cores multiply codes"
            assert re.search(r"ld\.global\S*\.v[24]\.b32|cp\.async\.c\w\.shared\.global", ptx), "codes come in vectors"


@each_arch
@pytest.mark.parametrize("axis", KV_CODECS, ids=str)
def test_kv_codec(axis: tuple[str, int | None, bool], arch: int, recorded: Recorded, tmp_path: Path) -> None:
    turn = KV_CODECS.index(axis) + ARCHS.index(arch)
    x = torch.zeros(1, 1, 64, 128, dtype=DTYPES[turn % 3])
    options = {} if axis[0] == "channel" else {"group": axis[1], "channel_separable": axis[2]}
    q = quantize(x, (2, 4, 8)[turn // 2 % 3], axis=axis[0], backend="triton", **options)
    dequantize(q, x.dtype, backend="triton")
    for launch in recorded["codec_kernel"]:
        ptx = check(launch, arch, tmp_path)
        assert re.search(r"(?:ld|st)\.global\S*\.v[248]\.b32", ptx), "tokens come and go in vectors"


@each_arch
def test_kv_saliency(arch: int, recorded: Recorded, tmp_path: Path) -> None:
    dtype, width = [(torch.bfloat16, 128), (torch.float16, 256), (torch.float32, 128), (torch.bfloat16, 80)][
        ARCHS.index(arch)
    ]
    k = torch.zeros(1, 2, 100, width, dtype=dtype)
    probe_saliency(k, k, torch.zeros(100, dtype=torch.int64), backend="triton")
    for launch in [*recorded["log_sums_kernel"], *recorded["column_sums_kernel"]]:
        ptx = check(launch, arch, tmp_path, rounded_otherwise=None)
        assert re.search(r"mma\S*tf32|wgmma|tcgen05", ptx), "tensor cores multiply"


@each_arch
def test_kv_projection(arch: int, recorded: Recorded, tmp_path: Path) -> None:
    turn = ARCHS.index(arch)
    x = torch.zeros(1, 4, 100, (128, 256, 80, 512)[turn], dtype=DTYPES[turn % 3])
    call_projection(x, (64, 16), rotated=(0, 64)[turn % 2])
    for launch in recorded["project_kernel"]:
        ptx = check(launch, arch, tmp_path, rounded_otherwise=None)
        assert re.search(r"mma\S*tf32|wgmma|tcgen05", ptx), "tensor cores multiply"


# In float32 all but exponentials; the logarithm of float64 starts from an approximation.
SPECTRAL_ROUNDED_OTHERWISE = r"fma\.rn\.f32|(?:add|sub|mul|div|sqrt|rcp)\.\S*(?:ftz|approx|full)\S*\.f32"

# A thread holds eight numbers of a row at least.
SPECTRAL_TILE_BYTES = 32
WIDTHS = [768, 4096, 16384, 0, 77, 9001]


@each_arch
@pytest.mark.parametrize("width", WIDTHS, ids=lambda width: f"width {width}")
def test_spectral_step(width: int, arch: int, recorded: Recorded, tmp_path: Path) -> None:
    """Of short, middling and long rows, of misaligned ones, and of singular values (0)."""
    turn = WIDTHS.index(width) + ARCHS.index(arch)
    shape = (4, width) if width else (1000,)
    dtypes = DTYPES[turn % 3], DTYPES[turn // 2 % 3]
    call_spectral_step([shape], dtypes, project=turn % 2 == 0, seed=3 if turn % 4 < 2 else None, ids=[0])
    for launch in recorded["list_chunks_kernel"]:
        check(launch, arch, tmp_path)
    (launch,) = recorded["step_kernel"]
    ptx = check(launch, arch, tmp_path, tile_bytes=SPECTRAL_TILE_BYTES)
    if width not in (77, 9001):
        assert re.search(r"ld\.global\S*\.v[248]\.b32", ptx), "rows are loaded by vectors"
        assert re.search(r"st\.global\S*\.v[248]\.b32", ptx), "rows are stored by vectors"


@each_arch
@pytest.mark.parametrize("columns", [32, 4096, 77], ids=lambda columns: f"{columns} columns")
def test_spectral_rows(columns: int, arch: int, recorded: Recorded, tmp_path: Path) -> None:
    dtype = DTYPES[(columns + ARCHS.index(arch)) % 3]
    call_scale(4096, columns, dtype)
    call_lorentz(4096, columns, dtype)
    for name in ("scale_kernel", "sum_parts_kernel", "lorentz_kernel", "lorentz_backward_kernel", "sum_numbers_kernel"):
        (launch,) = recorded[name]
        ptx = check(launch, arch, tmp_path, SPECTRAL_ROUNDED_OTHERWISE)
        if columns != 77 and not name.startswith("sum"):
            assert re.search(r"ld\.global\S*\.v[248]\.b32", ptx), "tiles are loaded by vectors"
            assert re.search(r"st\.global\S*\.v[248]\.b32", ptx), "tiles are stored by vectors"


@each_arch
def test_spectral_exchange(arch: int, recorded: Recorded, tmp_path: Path) -> None:
    call_exchange(100, 10, 50)
    for launch in recorded["draw_kernel"] + recorded["swap_kernel"]:
        check(launch, arch, tmp_path, SPECTRAL_ROUNDED_OTHERWISE)
