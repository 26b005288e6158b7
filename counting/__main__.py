# SPDX-License-Identifier: Apache-2.0
"""`python -m counting`: times on GPUs that are predicted from the compiled kernels, shown and written into a file."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

from singlepass.bench import predictions, results, screen

from . import model
from .cubins import tool

WIDTH = 160  # of a case and its time on five GPUs


def nvcc_version() -> str:
    """Major and minor.

    Raises:
        ValueError: there is no nvcc.
    """
    nvcc = tool("nvcc")
    if nvcc is None:
        raise ValueError("counting: expected nvcc; got none. Install the CUDA toolkit")
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else "unknown"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m counting", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        before, after = results.newest_model(arguments.results), model.make(nvcc_version())
    except ValueError as error:
        raise SystemExit(str(error)) from None
    runs = [run for run in (results.newest("cuda"),) if run is not None]
    to = screen.console()
    to.width = WIDTH
    screen.show([predictions.model_grid(after, runs, family) for family in model.PLANS], to)
    if before is not None:
        changed = model.changes(before, after)
        print(f"against the prediction at {before['commit']}: {len(changed)} times changed", *changed, sep="\n")
    print(model.save(after, arguments.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
