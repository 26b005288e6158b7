# SPDX-License-Identifier: Apache-2.0
"""Builds `singlepass/_C_cpu.so` and, where it can, `singlepass/_C_cuda.so` from `csrc/sources.json`.

Both are plain shared libraries on the libtorch stable ABI, without Python symbols: one wheel serves every Python and
every torch at or above the floor. `docs/building.md` explains the build, `ENVS.md` lists the variables that steer it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

PACKAGES = {  # everything is installed under one top-level name; setuptools wants relative paths
    "singlepass": "python/singlepass",
    "singlepass.triton_kernels": "triton_kernels",
    "singlepass.bench": "bench",
}
CSRC = Path("csrc")
TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the floor in pyproject.toml
CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

BUILD_TYPES = {  # name -> what is added to the flags of the C++ compiler and of nvcc
    "Release": (["-g0", "-DNDEBUG"], ["-DNDEBUG"]),
    "RelWithDebInfo": (["-g", "-DNDEBUG"], ["-g", "-DNDEBUG", "--generate-line-info"]),
}


class NoCudaError(Exception):
    """The reason why the CUDA library is not built, in one line."""


def setting(name: str, choices: list[str], default: str) -> str:
    value = os.environ.get(name) or default
    if value not in choices:
        raise SystemExit(f"{name}: expected one of {', '.join(choices)}; got {value!r}. Unset it for the default.")
    return value


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def find_cuda_toolkit() -> tuple[Path, str]:
    """Root and version of the CUDA toolkit to which nvcc belongs."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin", "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if place and Path(place).is_file()), None)
    if nvcc is None:
        raise NoCudaError(f"no nvcc ({f'CUDA_HOME={home}' if home else 'PATH and /usr/local/cuda'} searched)")
    # nvcc on PATH may be a link or a wrapper elsewhere: only nvcc itself knows where its toolkit is.
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if top is None or release is None:
        raise NoCudaError(f"{nvcc} does not run")
    root = Path(top[1].strip()).resolve()
    for needed in ("include/cuda_runtime.h", "lib*/libcudart.so"):
        if not any(root.glob(needed)):
            raise NoCudaError(f"the CUDA toolkit at {root} has no {needed}")
    return root, release[1]


def cuda_toolkit(wish: str, torch_version: str, torch_cuda: str | None) -> tuple[Path, str]:
    """The toolkit to build with. Whether a GPU is present plays no part: builders often have none."""
    if wish == "0":
        raise NoCudaError("SINGLEPASS_WITH_CUDA=0")
    root, version = find_cuda_toolkit()
    if torch_cuda is None:
        raise NoCudaError(f"torch {torch_version} is built without CUDA")
    if torch_cuda.split(".")[0] != version.split(".")[0]:
        raise NoCudaError(f"nvcc is of CUDA {version}, torch {torch_version} of CUDA {torch_cuda}")
    return root, version


def default_archs(toolkit: Path) -> str:
    """Every supported architecture that this nvcc can compile for, and PTX of the last for those that come after it."""
    known = output_of(toolkit / "bin" / "nvcc", "--list-gpu-arch").split()
    return ";".join(arch for arch in CUDA_ARCHS if "compute_" + arch.replace(".", "") in known) + "+PTX"


def libraries() -> tuple[list[Extension], dict[str, object]]:
    """The libraries to build, and what `build_info.json` is to say about them."""
    import torch  # not at the top: source distributions and metadata need no torch

    build_type = setting("SINGLEPASS_BUILD_TYPE", list(BUILD_TYPES), "Release")
    wish = setting("SINGLEPASS_WITH_CUDA", ["0", "1", "auto"], "auto")
    sources = json.loads((CSRC / "sources.json").read_text())
    cxx_flags = sources["cxx_flags"] + BUILD_TYPES[build_type][0]
    nvcc_flags = sources["nvcc_flags"] + ["-Xcompiler=-fvisibility=hidden"] + BUILD_TYPES[build_type][1]
    toolkit, cuda, archs, obstacle = None, None, "", ""
    try:
        toolkit, cuda = cuda_toolkit(wish, torch.__version__, torch.version.cuda)
        os.environ["CUDA_HOME"] = str(toolkit)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs  # unset, torch would ask the GPU, and fail where there is none
        print(f"singlepass: building the CPU library, and the CUDA library with CUDA {cuda} for {archs}")
    except NoCudaError as error:
        obstacle = str(error)
        if wish == "1":
            raise SystemExit(f"SINGLEPASS_WITH_CUDA: expected 1 to be possible; got: {obstacle}. Unset it.") from None
        print(f"singlepass: building the CPU library only: {obstacle}")

    from torch.utils.cpp_extension import include_paths, library_paths  # reads CUDA_HOME when it is imported

    threads = os.environ.get("NVCC_THREADS") or "2"

    def library(device: str, macros: list[str], links: list[str]) -> Extension:
        return Extension(
            f"singlepass._C_{device}",
            [str(CSRC / path) for path in sources[f"core_{device}"] + sources[f"torch_{device}"]],
            include_dirs=[str((CSRC / "include").resolve()), *include_paths(device)],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *((macro, None) for macro in macros)],
            library_dirs=library_paths(device),
            libraries=["torch_cpu", "c10", *links],
            extra_compile_args={"cxx": cxx_flags, "nvcc": [*nvcc_flags, f"--threads={threads}"]},
            extra_link_args=["-Wl,-z,defs", f"-Wl,--version-script={CSRC / 'no_exports.map'}"],
            language="c++",
        )

    built = [library("cpu", ["TORCH_STABLE_ONLY"], [])]
    if toolkit is not None:
        built.append(library("cuda", ["TORCH_STABLE_ONLY", "USE_CUDA"], ["torch_cuda", "cudart"]))
    compiler = output_of(*shlex.split(os.environ.get("CXX") or "c++"), "--version").partition("\n")[0]
    info = {"version": version(), "torch": torch.__version__, "torch_target": TORCH_TARGET, "build_type": build_type}
    info |= {"machine": platform.machine(), "compiler": compiler, "cxx_flags": cxx_flags}
    info |= {"cuda": cuda, "cuda_reason": obstacle, "cuda_archs": archs, "nvcc_flags": nvcc_flags if cuda else []}
    return built, info


def version() -> str:
    written = re.search(r'^__version__ = "(.+)"$', Path("python/singlepass/__init__.py").read_text(), re.M)
    local = os.environ.get("SINGLEPASS_LOCAL_VERSION")
    return f"{written[1]}+{local}" if local else written[1]


class CleanBuild(build):
    """Starts from an empty build_lib, so that a module deleted from the tree is not in the next wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    """The libraries have no Python symbols: one wheel for all Pythons of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def native() -> dict[str, object]:
    """The part of setup's arguments that needs torch."""
    extensions, info = libraries()
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)):  # type: ignore[misc]
        def finalize_options(self) -> None:
            super().finalize_options()
            # One place for editable and wheel builds alike, so that ninja compiles again only what has changed.
            self.build_temp = f"build/native-torch-{info['torch']}"

        def run(self) -> None:
            super().run()
            built = {Path(self.get_ext_fullpath(extension.name)) for extension in extensions}
            package = next(iter(built)).parent
            for stale in {path.name for path in package.glob("_C_*.so")} - {path.name for path in built}:
                (package / stale).unlink()  # of an earlier build in place, with other settings
            (package / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    return {
        "ext_modules": extensions,
        "cmdclass": {"bdist_wheel": AnyPythonWheel, "build": CleanBuild, "build_ext": BuildLibraries},
    }


needs_compiler = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
packages = [name + sub for name, folder in PACKAGES.items() for sub in ("", *("." + p for p in find_packages(folder)))]
package_dir = {"": "python"} | PACKAGES
setup(version=version(), packages=packages, package_dir=package_dir, **(native() if needs_compiler else {}))
