# SPDX-License-Identifier: Apache-2.0
"""Every kernel on small inputs, compared with float64: what a sanitizer watches. `python -m proof.small [DEVICE]`

Benchmark cases bring the inputs: each op and dtype once, by each of our backends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from singlepass._ops.optim import stream_
from singlepass.bench.registry import Case, Provider, cases, dtype_name

OURS = ("native", "triton")


def checks(device: torch.device) -> Iterator[tuple[str, Case, Provider]]:
    """Name, case and provider, each op and dtype once."""
    seen = set()
    for case in cases(device):
        for provider in case.providers:
            name = f"{case.family}/{case.op}/{dtype_name(case.dtype)}/{provider.name}"
            if provider.name in OURS and name not in seen:
                seen.add(name)
                yield name, case, provider


def main(device: torch.device) -> int:
    """Prints a line for each; returns 1 if any disagrees."""
    failed = 0
    for name, _, provider in checks(device):
        if reason := provider.why_not(device):
            print(f"{name}: not run: {reason}")
            continue
        try:
            error = provider.gate(device).error
            verdict = "ok" if error <= 1.0 else f"WRONG: {error:.3g} times the allowed error"
        except Exception as caught:  # the others are still to be seen
            verdict = f"WRONG: {type(caught).__name__}: {caught}"
        failed += verdict != "ok"
        print(f"{name}: {verdict}", flush=True)
    values = torch.ones(1000, device=device)
    stream_.on("native")([values.clone()], [values])
    print(f"stream_/native: {'ok' if bool((values == 1).all()) else 'WRONG'}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(torch.device(*sys.argv[1:] or ("cuda",))))
