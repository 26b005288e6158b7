# SPDX-License-Identifier: Apache-2.0
"""Builds `singlepass/_C_cpu.so` and, where it can, `singlepass/_C_cuda13.so` from `csrc/sources.json`; the number is
the toolkit's CUDA major version.

Both are plain shared libraries on the libtorch stable ABI, without Python symbols: one wheel serves every Python and
every torch at or above the floor. `docs/building.md` explains the build, `ENVS.md` lists the variables that steer it.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

try:
    from setuptools import __version__ as setuptools_version
except ImportError:
    setuptools_version = "0 (none)"


def require(condition: object, expected: str, got: object, remedy: str) -> None:
    """Ends with one line, not a traceback, unless ``condition`` holds."""
    if not condition:
        raise SystemExit(f"singlepass: expected {expected}; got {got}. {remedy}")


# What is needed to read the rest of this file and pyproject.toml.
require(sys.version_info >= (3, 10), "Python 3.10 or newer", platform.python_version(), "Use a newer Python.")
recent = int(re.match(r"\d+", setuptools_version)[0]) >= 77
require(recent, "setuptools 77 or newer", setuptools_version, 'Run: pip install -U "setuptools>=77"')

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402

PACKAGES = {  # everything is installed under one top-level name; setuptools wants relative paths
    "singlepass": "python/singlepass",
    "singlepass.triton_kernels": "triton_kernels",
    "singlepass.bench": "bench",
}
CSRC = Path("csrc")
TORCH_FLOOR = "2.10"  # as in pyproject.toml
TORCH_TARGET = "0x020a000000000000"  # the same as the headers want it
CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

PORTABLE = ["-include", "torch/glibc.h"]  # what asks for no newer glibc than torch does
BUILD_TYPES = {  # name -> what is added to the flags of the C++ compiler and of nvcc
    "Release": (["-g0", "-DNDEBUG"], ["-DNDEBUG"]),
    "RelWithDebInfo": (["-g", "-DNDEBUG"], ["-g", "-DNDEBUG", "--generate-line-info"]),
}


class NoCudaError(Exception):
    """The reason why the CUDA library is not built, and a remedy, each in one line."""


def setting(name: str, choices: list[str], default: str) -> str:
    value = os.environ.get(name) or default
    if value not in choices:
        raise SystemExit(f"{name}: expected one of {', '.join(choices)}; got {value!r}. Unset it for the default.")
    return value


def output_of(*command: str | Path, given: str = "") -> str:
    """What a command prints, errors included; if it cannot be started, why."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, input=given).stdout
    except OSError as error:
        return str(error.strerror)


def compiler() -> str:
    """The first line of what the C++ compiler says of itself. Ends where it is none, or too old."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    macros = output_of(*command, "-std=c++20", "-E", "-dM", "-x", "c++", "-", given="#include <version>\n")
    found = {name: int(value) for name, value in re.findall(r"^#define (__\w+) (\d+)L?$", macros, re.M)}
    remedy = "Install g++ 11 or newer, or set CXX to one."
    said = macros.strip().partition("\n")[0] or "no answer"
    require("__cplusplus" in found, "a C++20 compiler", f"{shlex.join(command)}: {said}", remedy)
    enough = found["__cplusplus"] >= 202002 if "__clang__" in found else found.get("__GNUC__", 0) >= 11
    name = output_of(*command, "--version").partition("\n")[0]
    require(enough, "a C++20 compiler (g++ 11 or newer)", name, remedy)
    return name


def find_cuda_toolkit() -> tuple[Path, str]:
    """Root and version of the CUDA toolkit to which nvcc belongs."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin", "nvcc")] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if place and Path(place).is_file()), None)
    if nvcc is None:
        searched = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda"
        raise NoCudaError(f"no nvcc ({searched} searched)", "Install the CUDA toolkit, or set CUDA_HOME to it")
    # nvcc on PATH may be a link or a wrapper elsewhere: only nvcc itself knows where its toolkit is.
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.M)
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if top is None or release is None:
        raise NoCudaError(f"{nvcc} does not run", "Install the CUDA toolkit again")
    root = Path(top[1].strip()).resolve()
    for needed in ("include/cuda_runtime.h", "lib*/libcudart.so"):
        if not any(root.glob(needed)):
            remedy = "Install the toolkit's headers and runtime, too"
            raise NoCudaError(f"the CUDA toolkit at {root} has no {needed}", remedy)
    return root, release[1]


def cuda_toolkit(wish: str, torch_version: str, torch_cuda: str | None) -> tuple[Path, str]:
    """The toolkit to build with. Whether a GPU is present plays no part: builders often have none."""
    if wish == "0":
        raise NoCudaError("SINGLEPASS_WITH_CUDA=0", "")
    root, version = find_cuda_toolkit()
    if torch_cuda is None:
        raise NoCudaError(f"torch {torch_version} is built without CUDA", "Install a CUDA build of torch")
    if torch_cuda.split(".")[0] != version.split(".")[0]:
        reason = f"nvcc is of CUDA {version}, torch {torch_version} of CUDA {torch_cuda}"
        raise NoCudaError(reason, "Make the major versions agree")
    return root, version


def default_archs(toolkit: Path) -> str:
    """Every supported architecture that this nvcc can compile for, and PTX of the last for those that come after it."""
    known = output_of(toolkit / "bin" / "nvcc", "--list-gpu-arch").split()
    return ";".join(arch for arch in CUDA_ARCHS if "compute_" + arch.replace(".", "") in known) + "+PTX"


def require_torch() -> None:
    """Not at the top: source distributions and metadata need no torch."""
    remedy = f'Run: pip install "torch>={TORCH_FLOOR}", or leave out --no-build-isolation.'
    try:
        import torch
    except (ImportError, OSError) as error:
        require(False, f"torch {TORCH_FLOOR} or newer", str(error).partition("\n")[0], remedy)
    numbers = [tuple(map(int, version.split(".")[:2])) for version in (torch.__version__, TORCH_FLOOR)]
    require(numbers[0] >= numbers[1], f"torch {TORCH_FLOOR} or newer", torch.__version__, remedy)


def sources_of(device: str, folders: list[str]) -> list[str]:
    """The kernels of a device, by their suffix, and what registers them with PyTorch."""
    suffix = {"cpu": ".cpp", "cuda": ".cu"}[device]
    kernels = [path for folder in folders for path in sorted((CSRC / folder).glob(f"*{suffix}"))]
    return [str(path) for path in [*kernels, registration(device)]]


def registration(device: str) -> Path:
    """The source that registers a device's kernels. Another namespace compiles this one anew, and no kernel."""
    source, namespace = CSRC / "torch" / f"{device}.cpp", os.environ.get("SINGLEPASS_NAMESPACE")
    if not namespace:
        return source
    if not re.fullmatch(r"[a-z]\w*", namespace, re.ASCII):
        raise SystemExit(f"SINGLEPASS_NAMESPACE: expected a name such as singlepass_2; got {namespace!r}. Unset it.")
    wrapped = Path("build", "namespaces", namespace, source.name)
    wrapped.parent.mkdir(parents=True, exist_ok=True)
    wrapped.write_text(f'#define SINGLEPASS_NAMESPACE {namespace}\n#include "torch/{source.name}"\n')
    return wrapped


def libraries() -> tuple[list[Extension], dict[str, object]]:
    """The libraries to build, and what `build_info.json` is to say about them."""
    require(sys.platform == "linux", "Linux", sys.platform, "Build in a Linux machine or container.")
    cxx = compiler()
    require_torch()
    import torch

    build_type = setting("SINGLEPASS_BUILD_TYPE", list(BUILD_TYPES), "Release")
    wish = setting("SINGLEPASS_WITH_CUDA", ["0", "1", "auto"], "auto")
    sources = json.loads((CSRC / "sources.json").read_text())
    cxx_flags = sources["cxx_flags"] + BUILD_TYPES[build_type][0] + PORTABLE
    nvcc_flags = sources["nvcc_flags"] + ["-Xcompiler=-fvisibility=hidden"] + BUILD_TYPES[build_type][1] + PORTABLE
    toolkit, cuda, archs, obstacle = None, "", "", ""
    try:
        toolkit, cuda = cuda_toolkit(wish, torch.__version__, torch.version.cuda)
        os.environ["CUDA_HOME"] = str(toolkit)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs  # unset, torch would ask the GPU, and fail where there is none
        print(f"singlepass: building the CPU library, and the CUDA library with CUDA {cuda} for {archs}")
    except NoCudaError as error:
        obstacle, remedy = error.args
        if wish == "1":
            text = f"SINGLEPASS_WITH_CUDA: expected 1 to be possible; got: {obstacle}. {remedy}, or unset it."
            raise SystemExit(text) from None
        print(f"singlepass: building the CPU library only: {obstacle}")

    from torch.utils.cpp_extension import include_paths, library_paths  # reads CUDA_HOME when it is imported

    threads = os.environ.get("NVCC_THREADS") or "2"
    major = cuda.split(".")[0]
    # No path of this machine in a library: the same commit gives the same bytes in every folder.
    here = [f"-ffile-prefix-map={folder}/=" for folder in (Path.cwd(), Path(torch.__file__).parents[1])]
    compile_args = {
        "cxx": cxx_flags + here,
        "nvcc": [*nvcc_flags, *(f"-Xcompiler={flag}" for flag in here), f"--threads={threads}"],
    }

    def library(device: str, macros: list[str], links: list[str]) -> Extension:
        return Extension(
            f"singlepass._C_{device}{major if device == 'cuda' else ''}",
            sources_of(device, sources["folders"]),
            include_dirs=[str(CSRC.resolve()), *include_paths(device)],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *((macro, None) for macro in macros)],
            library_dirs=library_paths(device),
            libraries=["torch_cpu", "c10", *links, "dl"],  # dl is empty from glibc 2.34 on
            extra_compile_args=compile_args,
            extra_link_args=["-Wl,-z,defs", f"-Wl,--version-script={CSRC / 'no_exports.map'}"],
            language="c++",
        )

    built = [library("cpu", ["TORCH_STABLE_ONLY"], [])]
    if toolkit is not None:
        built.append(library("cuda", ["TORCH_STABLE_ONLY", "USE_CUDA"], ["torch_cuda", "cudart"]))
    info = {"version": version(), "torch": torch.__version__, "torch_target": TORCH_TARGET, "build_type": build_type}
    info |= {"machine": platform.machine(), "compiler": cxx, "cxx_flags": cxx_flags}
    info |= {"cuda": {}, "cuda_reason": obstacle}
    if toolkit is not None:
        info["cuda"] = {major: {"version": cuda, "torch": torch.__version__, "archs": archs, "nvcc_flags": nvcc_flags}}
    return built, info


def description(repository: str) -> str:
    """README.md as a package index shows it: links to files of this commit are those to its tag in the repository."""

    def absolute(link: re.Match[str]) -> str:
        return f"{link[1]}[{link[2]}]({repository}/{'raw' if link[1] else 'blob'}/v{number()}/{link[3]})"

    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)", absolute, text) if repository else text


def addresses(repository: str) -> dict[str, str]:
    """What an index shows beside the description."""
    files = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    pages = {name: f"{repository}/blob/v{number()}/{file}" for name, file in files.items()}
    return {"Source": repository, "Issues": f"{repository}/issues", **pages} if repository else {}


def number() -> str:
    return re.search(r'^__version__ = "(.+)"$', Path("python/singlepass/__init__.py").read_text(), re.M)[1]


def version() -> str:
    local = os.environ.get("SINGLEPASS_LOCAL_VERSION")
    return f"{number()}+{local}" if local else number()


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
            self.objects = f"build/native-torch-{info['torch']}"

        def build_extension(self, extension: Extension) -> None:
            # Apart for each library: decode.cpp and decode.cu would leave their objects under one name, and ninja would
            # compile both again in every build.
            self.build_temp = f"{self.objects}/{extension.name.rpartition('_')[2]}"
            super().build_extension(extension)

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
repository = os.environ.get("SINGLEPASS_REPOSITORY", "").rstrip("/")
setup(
    version=version(),
    long_description=description(repository),
    long_description_content_type="text/markdown",
    project_urls=addresses(repository),
    packages=packages,
    package_dir=package_dir,
    **(native() if needs_compiler else {}),
)
