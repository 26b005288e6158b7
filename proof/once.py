# SPDX-License-Identifier: Apache-2.0
"""One call of a benchmark case, which is all that a profiler sees: `python -m proof.once CASE PROVIDER`."""

from __future__ import annotations

import sys

import torch

from singlepass.bench.registry import cases


def main(wanted: str, name: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = next(case for case in cases(device) if case.name == wanted)
    provider = next(provider for provider in case.providers if provider.name == name)
    step = provider.prepare(case.inputs(device))
    for i in range(max(2, provider.first_calls)):
        step.before(i)
        step.run()
    step.before(0)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
