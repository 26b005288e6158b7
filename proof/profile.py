# SPDX-License-Identifier: Apache-2.0
"""The profiler over each call that misses a bar: `python -m proof.profile RESULT COUNT` prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from singlepass.bench import checks, results

from . import kernels

PROVIDER = "native"
SECONDS = 60


def profile(case: str) -> dict[str, Any]:
    """The kernels of one call, or what was missing."""
    command = kernels.profiler_command(sys.executable, case, PROVIDER)
    if isinstance(command, str):
        return {"missing": command}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"missing": "the profiler ran out of time"}
    found = kernels.parse_profile(done.stdout)
    if not found:
        return {"missing": " ".join((done.stdout + done.stderr).split())[-300:]}
    return {"kernels": found}


def main(path: str, count: str) -> None:
    below = checks.below(results.load(Path(path)))
    worst = sorted(below, key=lambda case: max(check.missed_by for check in below[case]), reverse=True)
    found = {case: profile(case) for case in worst[: int(count)]}
    for case, entry in found.items():
        entry["bars"] = [f"{check.bar}: {check.value:.3g}, allowed {check.limit:g}" for check in below[case]]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
