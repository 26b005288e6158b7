# SPDX-License-Identifier: Apache-2.0
"""The profiler over each call that misses a bar: `python -m proof.profile RESULT COUNT` prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from singlepass.bench import checks, results

from . import kernels

PROVIDER = "native"


def profile(case: str) -> dict[str, Any]:
    """The kernels of one call, or what was missing."""
    found = kernels.profile(case, PROVIDER)
    return {"missing": found} if isinstance(found, str) else {"kernels": found}


def main(path: str, count: str) -> None:
    below = checks.below(results.load(Path(path)))
    worst = sorted(below, key=lambda case: max(check.missed_by for check in below[case]), reverse=True)
    found = {case: profile(case) for case in worst[: int(count)]}
    for case, entry in found.items():
        entry["bars"] = [f"{check.bar}: {check.value:.3g}, allowed {check.limit:g}" for check in below[case]]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
