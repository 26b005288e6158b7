# SPDX-License-Identifier: Apache-2.0
"""Puts a CUDA toolkit together out of packages, for machines without one: 12.4 or 13.0, the oldest that are to be had
of each major version, so that the oldest drivers run what is built.

    cuda_toolkit.py 12|13 FOLDER        then: CUDA_HOME=FOLDER

Nothing is installed on the machine. CUDA 13 comes from a Python index alone. No Python package has CUDA 12's nvcc: that
one comes from a package of Debian 13, which takes apt-get and dpkg-deb and an x86-64 machine.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WHEELS = {
    "12": (
        "nvidia-cuda-cccl-cu12==12.4.127.post1",
        "nvidia-cuda-nvcc-cu12==12.4.131",
        "nvidia-cuda-runtime-cu12==12.4.127",
    ),
    "13": (
        "nvidia-cuda-cccl==13.0.85",
        "nvidia-cuda-crt==13.0.88",
        "nvidia-cuda-nvcc==13.0.88",
        "nvidia-cuda-runtime==13.0.96",
        "nvidia-nvvm==13.0.88",
    ),
}
DEB = "nvidia-cuda-toolkit=12.4.131~12.4.1-2"
SOURCE = """Types: deb
URIs: http://deb.debian.org/debian
Suites: trixie
Components: main contrib non-free
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
BINARIES = ("cudafe++", "fatbinary", "nvlink", "ptxas")
PROFILE = """TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib"
"""


def run(*command: str | Path, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}cuda_toolkit: expected {command[0]} to succeed; got the above.")


def wheels(major: str, folder: Path) -> Path:
    """The folder of what NVIDIA's Python packages hold."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-compile")
    run(*pip, "--target", folder, *WHEELS[major])
    return folder / "nvidia"


def unpacked_deb(folder: Path) -> Path:
    """Debian's package, fetched with an apt state of its own."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            text = f"cuda_toolkit: expected {tool}, for CUDA 12's nvcc; got none. Set CUDA_HOME to a toolkit instead."
            raise SystemExit(text)
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "debian.sources").write_text(SOURCE)
    own = [f"-oDir::Etc::sourcelist={folder / 'debian.sources'}", "-oDir::Etc::sourceparts=-"]
    own += [f"-oDir::State={folder / 'state'}", f"-oDir::Cache={folder / 'cache'}", "-oAPT::Sandbox::User=root"]
    run("apt-get", "-qq", *own, "update")
    run("apt-get", "-qq", *own, "download", DEB, folder=folder)
    (deb,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", deb, folder / "deb")
    return folder / "deb" / "usr"


def assemble_12(scratch: Path, toolkit: Path) -> None:
    packages, debian = wheels("12", scratch / "wheels"), unpacked_deb(scratch)
    for package in ("cuda_nvcc", "cuda_runtime", "cuda_cccl"):
        shutil.copytree(packages / package / "include", toolkit / "include", dirs_exist_ok=True)
    shutil.copytree(packages / "cuda_runtime" / "lib", toolkit / "lib")
    inner = debian / "lib" / "nvidia-cuda-toolkit"
    shutil.copytree(inner / "bin" / "crt", toolkit / "bin" / "crt")
    shutil.copy2(inner / "bin" / "nvcc", toolkit / "bin")
    for name in BINARIES:
        shutil.copy2(debian / "bin" / name, toolkit / "bin")
    (toolkit / "nvvm" / "bin").mkdir(parents=True)
    shutil.copy2(inner / "bin" / "cicc", toolkit / "nvvm" / "bin")
    shutil.copytree(inner / "libdevice", toolkit / "nvvm" / "libdevice")
    (toolkit / "bin" / "nvcc.profile").write_text(PROFILE)


def assemble_13(scratch: Path, toolkit: Path) -> None:
    shutil.copytree(wheels("13", scratch / "wheels") / "cu13", toolkit)


def main(major: str, folder: str) -> None:
    toolkit = Path(folder).resolve()
    toolkit.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=toolkit.parent) as scratch:
        made = Path(scratch, "toolkit")
        {"12": assemble_12, "13": assemble_13}[major](Path(scratch), made)
        (runtime,) = made.glob("lib/libcudart.so.*")
        (made / "lib" / "libcudart.so").symlink_to(runtime.name)
        made.rename(toolkit)  # at once: a toolkit that is there is whole


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in WHEELS:
        raise SystemExit("usage: cuda_toolkit.py 12|13 FOLDER")
    main(*sys.argv[1:])
