# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources under the CUDA compiler, which needs no GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from torch.utils.cpp_extension import include_paths

from ..simt.build import cubin_folder

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
NVCC_FLAGS = json.loads((ROOT / "csrc" / "sources.json").read_text())["nvcc_flags"]
ARCHS = (80, 90, 100, 120)

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is neither on PATH nor in /usr/local/cuda"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH"),
]


def run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.xdist_group("cubins")
@pytest.mark.deep("every kernel through nvcc for four architectures: four minutes")
def test_every_kernel_compiles_for_every_architecture_without_spills() -> None:
    kernels = list((ROOT / "csrc").glob("*/*.cu"))
    assert kernels
    expected = {f"{kernel.parent.name}_{kernel.stem}.sm_{arch}.cubin" for kernel in kernels for arch in ARCHS}
    assert expected <= {path.name for path in cubin_folder().glob("*.cubin")}


@pytest.mark.slow("starts nvcc")
def test_a_warning_about_a_kernel_fails(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel(float* x) {\n  int unused;\n  x[0] = 1.0f;\n}\n")
    settings = {"NVCC": NVCC, "ARCH": 90, "SOURCE": source, "CUBIN": tmp_path / "cubin", "FLAGS": ";".join(NVCC_FLAGS)}
    script = ROOT / "csrc" / "tests" / "cubin_check.cmake"
    command = ["cmake", *(f"-D{name}={value}" for name, value in settings.items()), "-P", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'variable "unused" was declared but never' in done.stderr


@pytest.mark.slow("nvcc compiles a kernel for two architectures")
@pytest.mark.parametrize("kernel", ["decode", "project", "saliency"])
def test_products_without_tensor_cores_do_not_blow_up_a_kernel(kernel: str, tmp_path: Path) -> None:
    """sm_75, the oldest in a wheel, has none for bfloat16 and TF32. Unrolled, these loops took compilers minutes."""
    sizes = {}
    for arch in (75, 80):
        ptx = tmp_path / f"{arch}.ptx"
        flags = (*NVCC_FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-ptx")
        run(str(NVCC), *flags, ROOT / "csrc" / "kv" / f"{kernel}.cu", "-o", ptx)
        sizes[arch] = ptx.stat().st_size
    assert sizes[75] < 3 * sizes[80]


@pytest.mark.slow("a C++ compiler reads torch's headers")
def test_registration_compiles_against_this_torch() -> None:
    """Also where torch is built without CUDA, and no library can be linked."""
    csrc = ROOT / "csrc"
    flags = ["-std=c++20", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    folders = [csrc, *include_paths("cpu"), cuda_headers()]
    run("c++", *flags, *(f"-I{folder}" for folder in folders), csrc / "torch" / "cuda.cpp")


@pytest.mark.slow("nvcc compiles a kernel four times")
def test_another_folder_changes_names_alone(tmp_path: Path) -> None:
    """A kernel's name has a hash of its source's path in it, and an object the names of nvcc's temporary files."""
    cubins, objects = [], []
    for place in (tmp_path / "one", tmp_path / "another"):
        shutil.copytree(ROOT / "csrc", place / "csrc")
        compiler = [
            str(NVCC),
            *NVCC_FLAGS,
            "-arch=sm_90",
            f"-I{place / 'csrc'}",
            f"-Xcompiler=-ffile-prefix-map={place}/=",
        ]
        source = place / "csrc" / "optim" / "grad_norm.cu"
        run(*compiler, "-cubin", source, "-o", place / "cubin")
        run(*compiler, "-c", source, "-o", place / "object")
        cubins.append(re.sub(rb"_[0-9a-f]{8}_(\d+_\w+?_cu)_[0-9a-f]{8}", rb"\1", (place / "cubin").read_bytes()))
        with (place / "object").open("rb") as file:
            objects.append([(section.name, section.data()) for section in ELFFile(file).iter_sections()])
    assert cubins[0] == cubins[1]
    differ = {first[0] for first, second in zip(*objects, strict=True) if first != second}
    assert differ <= {".nv_fatbin", ".rodata.str1.8", ".strtab"}


def cuda_headers() -> Path:
    """Asked of nvcc itself, because what is on PATH may be a wrapper."""
    dry_run = subprocess.run([str(NVCC), "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
    (top,) = [line.removeprefix("#$ TOP=") for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(top.strip()).resolve() / "include"
