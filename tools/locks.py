# SPDX-License-Identifier: Apache-2.0
"""Writes locks/ with uv: exact versions of everything but torch, for each supported Python. `make locks` runs it.

    locks.py TORCH              moves them to the newest releases that fit
    locks.py TORCH check        says which no longer fit pyproject.toml, and writes nothing

torch's own requirements are resolved first. They constrain the locks, so that both fit together, and are in a lock only
if something else needs them too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib
from environment import PYTHONS, ROOT, fail

LOCKS = ROOT / "locks"
COMPILE = ("uv", "pip", "compile", "-q", "--no-annotate", "--only-binary=:all:", "--python-platform=linux")
HEADER = "--custom-compile-command=make locks"  # instead of a command with this machine's paths and indices
# What a lock is for, before the version of Python in its name -> what has to be installed, and which group beside it.
# They are installed side by side, so each keeps to those before it.
KINDS = {"docs-": ("-e .", "--group=docs"), "": ("-e .", "--group=dev"), "bench-": ("-e .[bench]",)}


def compile_lock(python: str, given: str, output: Path, *arguments: str | Path) -> None:
    command = [*COMPILE, f"--python-version={python}", f"--output-file={output}", HEADER, *map(str, arguments), "-"]
    subprocess.run(command, input=given, text=True, check=True, cwd=ROOT)


def metadata(project: dict) -> str:
    """For uv's settings: torch as if it needed nothing, and our own requirements, so that uv need not build us."""
    extras = project["optional-dependencies"]
    ours = [f"{requirement}; extra == '{extra}'" for extra in extras for requirement in extras[extra]]
    table = '[[dependency-metadata]]\nname = "{}"\nversion = "{}"\nrequires-dist = {}\nprovides-extra = {}\n'
    ours = table.format("singlepass", 0, json.dumps([*project["dependencies"], *ours]), json.dumps([*extras]))
    return f'{ours}[[dependency-metadata]]\nname = "torch"\nrequires-dist = []\n'


def write(torch: str, folder: Path, *options: str) -> None:
    """All locks into a folder. What is there stays, wherever it still fits, unless the options say otherwise."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    building = [r for r in pyproject["build-system"]["requires"] if not r.startswith("torch")]
    first, last = PYTHONS
    with tempfile.TemporaryDirectory() as scratch:
        settings, needs = Path(scratch, "uv.toml"), Path(scratch, "torch.txt")
        settings.write_text(metadata(pyproject["project"]), encoding="utf-8")
        for minor in range(first[1], last[1] + 1):
            python, name = f"3.{minor}", f"py3{minor}.txt"
            if (folder / name).exists():
                shutil.copy(folder / name, needs)
            compile_lock(python, torch, needs, *options)
            kept_to = [f"--constraint={needs}"]
            for prefix, (package, *group) in KINDS.items():
                lock, given = folder / f"{prefix}{name}", "\n".join([package, *building])
                ours = (f"--config-file={settings}", "--no-emit-package=torch", "--no-emit-package=singlepass")
                compile_lock(python, given, lock, *options, *ours, *kept_to, *group)
                kept_to.append(f"--constraint={lock}")


def check(torch: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(shutil.copytree(LOCKS, Path(scratch, "locks")))
        write(torch, made)
        stale = [lock.name for lock in sorted(made.iterdir()) if lock.read_bytes() != (LOCKS / lock.name).read_bytes()]
    if stale:
        fail("locks that fit pyproject.toml", f"others in {', '.join(stale)}", "Run make locks, then make test.")


def main(torch: str, *command: str) -> None:
    if command == ("check",):
        check(torch)
    else:
        LOCKS.mkdir(exist_ok=True)
        write(torch, LOCKS, "--upgrade")


if __name__ == "__main__":
    main(*sys.argv[1:])
