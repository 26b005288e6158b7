# SPDX-License-Identifier: Apache-2.0
"""Writes locks/ with uv: exact versions of everything but torch, for each supported Python. `make locks` runs it.

torch's own requirements are resolved first. They constrain the locks, so that both fit together, and are in a lock only
if something else needs them too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib
from environment import PYTHONS, ROOT

LOCKS = ROOT / "locks"
COMPILE = ("uv", "pip", "compile", "-q", "--upgrade", "--no-annotate", "--only-binary=:all:", "--python-platform=linux")
HEADER = "--custom-compile-command=make locks"  # instead of a command with this machine's paths and indices
ALONE = '[[dependency-metadata]]\nname = "torch"\nrequires-dist = []\n'  # torch as if it needed nothing


def compile_lock(python: str, given: str, output: Path, *arguments: str | Path) -> None:
    command = [*COMPILE, f"--python-version={python}", f"--output-file={output}", HEADER, *map(str, arguments), "-"]
    subprocess.run(command, input=given, text=True, check=True, cwd=ROOT)


def main(torch: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    building = "\n".join(r for r in project["build-system"]["requires"] if not r.startswith("torch"))
    LOCKS.mkdir(exist_ok=True)
    (first, last) = PYTHONS
    with tempfile.TemporaryDirectory() as folder:
        alone, needs = Path(folder, "uv.toml"), Path(folder, "torch.txt")
        alone.write_text(ALONE, encoding="utf-8")
        for minor in range(first[1], last[1] + 1):
            python, name = f"3.{minor}", f"py3{minor}.txt"
            compile_lock(python, torch, needs)
            ours = ("pyproject.toml", f"--config-file={alone}", "--no-emit-package=torch", f"--constraint={needs}")
            # They are installed side by side, so each keeps to those before it.
            before: list[str] = []
            for extra, prefix in (("docs", "docs-"), ("dev", ""), ("bench", "bench-")):
                compile_lock(python, building, LOCKS / f"{prefix}{name}", *ours, *before, f"--extra={extra}")
                before.append(f"--constraint={LOCKS / f'{prefix}{name}'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
