# SPDX-License-Identifier: Apache-2.0
"""Builds wheels into dist/. `make wheel CUDA=...` and `make wheels` run it, in make's environment.

    wheels.py cpu|cu12|cu13     one, whose local version says for what it is: 0.1.0+cpu, +cu124, +cu130
    wheels.py release           what a release has: +cpu, one without a local version with the libraries of both CUDA
                                versions, of which the one that fits torch is loaded, and the sources

A CUDA library is built with a torch of its CUDA version, in an environment of its own under build/, and with the
toolkit in CUDA_HOME if that is of the version, else with one put together out of packages.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD, DIST = ROOT / "build" / "wheels", ROOT / "dist"
TORCH = {"12": "torch==2.10.0", "13": "torch==2.14.1"}  # which package indexes have built with that CUDA version
MOST_BYTES = 60_000_000  # of each file
PLATFORM = f"manylinux_2_28_{platform.machine()}"
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart.so.*")  # are there when the libraries are loaded
INFO = Path("singlepass", "build_info.json")


def run(*command: str | Path, **settings: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}wheels: expected {Path(command[0]).name} to succeed; got the above.")
    return done.stdout


def python_for(cuda: str) -> Path:
    """The Python of an environment with a torch of this CUDA major version, and what building takes."""
    folder = BUILD / f"env-{TORCH[cuda]}"
    done = folder / "done"
    if not done.exists():
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
        lock = (ROOT / "locks" / "py{}{}.txt".format(*sys.version_info[:2])).read_text()
        tools = re.findall(r"^(?:ninja|numpy|setuptools)==.*$", lock, re.M)
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", TORCH[cuda], *tools)
        done.touch()
    return folder / "bin" / "python"


def toolkit_for(cuda: str) -> tuple[Path, str]:
    """The toolkit of this CUDA major version, and the name of its version: cu124."""
    home = os.environ.get("CUDA_HOME")
    toolkit = Path(home or ROOT / "build" / f"cuda-{cuda}")
    if not home and not toolkit.exists():
        run(sys.executable, ROOT / "tools" / "cuda_toolkit.py", cuda, toolkit)
    found = re.search(r"release (\d+)\.(\d+)", run(toolkit / "bin" / "nvcc", "--version"))
    if found is None or found[1] != cuda:
        text = f"wheels: expected a CUDA {cuda} toolkit; got CUDA_HOME={home}. Unset it to have one put together."
        raise SystemExit(text)
    return toolkit, f"cu{found[1]}{found[2]}"


def commit_time() -> str:
    """Of the commit, in seconds: the time of every file in a wheel, so that building again gives the same bytes."""
    return run("git", "log", "-1", "--format=%ct").strip()


def build(kind: str, local: bool, **settings: str) -> Path:
    """A wheel as setuptools makes it, for a CUDA version or the CPU alone. More settings are variables of the build."""
    folder = BUILD / kind
    shutil.rmtree(folder, ignore_errors=True)
    cuda = kind.removeprefix("cu") if kind != "cpu" else ""
    settings |= {"SOURCE_DATE_EPOCH": commit_time(), "SINGLEPASS_WITH_CUDA": "1" if cuda else "0"}
    python: str | Path = sys.executable
    version = kind
    if cuda:
        python, (toolkit, version) = python_for(cuda), toolkit_for(cuda)
        settings |= {"CUDA_HOME": str(toolkit), "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"}
    settings["SINGLEPASS_LOCAL_VERSION"] = version if local else ""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-build-isolation", "--no-deps")
    run(*pip, "-w", folder, ROOT, **settings)
    (wheel,) = folder.glob("*.whl")
    return wheel


def merge(first: Path, second: Path) -> Path:
    """The first wheel with the second one's CUDA library added."""
    folder = BUILD / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    tool = (sys.executable, "-m", "wheel")
    run(*tool, "unpack", "-d", folder, first)
    (tree,) = folder.iterdir()
    info = json.loads((tree / INFO).read_text())
    with zipfile.ZipFile(second) as archive:
        info["cuda"] |= json.loads(archive.read(INFO.as_posix()))["cuda"]
        for name in archive.namelist():
            if Path(name).match("singlepass/_C_cuda*.so"):
                archive.extract(name, tree)
    (tree / INFO).write_text(json.dumps(info, indent=2) + "\n")
    run(*tool, "pack", "-d", folder, tree, SOURCE_DATE_EPOCH=commit_time())
    (wheel,) = folder.glob("*.whl")
    return wheel


def publishable(wheel: Path) -> Path:
    """The wheel in dist/, under the tag of the oldest systems that it runs on. An audit decides, not we."""
    exclude = [f"--exclude={pattern}" for pattern in OF_TORCH]
    folder = BUILD / "repaired"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"SOURCE_DATE_EPOCH": commit_time()}
    run("auditwheel", "repair", f"--plat={PLATFORM}", "--only-plat", *exclude, "-w", folder, wheel, **settings)
    (repaired,) = folder.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.move(repaired, DIST / repaired.name))


def sdist() -> Path:
    """The sources in dist/, from which an installer without a wheel for its system builds."""
    folder = BUILD / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder)
    (archive,) = folder.iterdir()
    DIST.mkdir(exist_ok=True)
    return Path(shutil.move(archive, DIST / archive.name))


def kernels(wheel: Path) -> list[str]:
    """A line for each CUDA source and library that the wheel was just built from: the bytes of its object."""
    lines = []
    with zipfile.ZipFile(wheel) as archive:
        libraries = json.loads(archive.read(INFO.as_posix()))["cuda"]
    for major, built in sorted(libraries.items()):
        folder = ROOT / "build" / f"native-torch-{built['torch']}" / f"cuda{major}"
        sources = [path.relative_to(ROOT) for path in (ROOT / "csrc").glob("*/*.cu")]
        sizes = {source: (folder / source).with_suffix(".o").stat().st_size for source in sources}
        largest_first = sorted(sizes, key=sizes.__getitem__, reverse=True)
        lines += [f"  _C_cuda{major}.so  {sizes[source]:>11,}  {source}" for source in largest_first]
    return lines


def report(made: list[Path]) -> None:
    """Prints the size of each file. Ends where one is too large."""
    for path in made:
        lines = kernels(path) if path.suffix == ".whl" else []
        print(f"{path.name}: {path.stat().st_size:,} bytes", *lines, sep="\n")
    if large := [path.name for path in made if path.stat().st_size > MOST_BYTES]:
        got = f"more in {', '.join(large)}"
        raise SystemExit(f"wheels: expected at most {MOST_BYTES:,} bytes a file; got {got}. Make its kernels smaller.")


def main(kind: str) -> None:
    if kind == "release":
        wheels = [build("cpu", local=True), merge(build("cu13", local=False), build("cu12", local=False))]
        report([*map(publishable, wheels), sdist()])
    else:
        report([publishable(build(kind, local=True))])


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("cpu", "cu12", "cu13", "release"):
        got = " ".join(sys.argv[1:]) or "none"
        raise SystemExit(f"make wheel: expected CUDA=cpu, cu12 or cu13; got {got}.")
    main(sys.argv[1])
