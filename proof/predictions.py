# SPDX-License-Identifier: Apache-2.0
"""What was predicted of this GPU, each beside what is measured: `python -m proof.predictions [DEVICE]` prints JSON.

Times come from the newest file of `make gpu-model`, the others from counts. Each of them can turn out to be wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from singlepass.bench import results, runner, timing
from singlepass.bench.floor import copy_bandwidth, matrix_rate
from singlepass.bench.probe import Probe
from singlepass.bench.registry import Step, cases

from . import kernels

PROVIDER = "native"
COPY_OFF = 0.025  # that the bandwidth of a copy may be off, as a part of what is assumed
SHARE_OFF = 0.02  # that a share of it may be below what is predicted of a kernel that moves bytes and does little else
STREAMS = ("optim/AdamW/gpt2-small/float32", "optim/Lion/gpt2-small/float32")
TIMES_OFF = {  # that times of others may be off
    "rational/rational/128x197x3072/bfloat16": 0.08,
    "rational/rational_backward/128x197x3072/bfloat16": 0.11,
    "kv/kv_decode/8x32768/bfloat16": 0.20,
    "kv/kv_decode/1x32768/bfloat16": 0.20,
    "kv/kv_saliency/1x8192/bfloat16": 0.25,
}
HOST_TIMES = 3.0  # that a step of ZipCacheLayer may take the host over one without compression
SECTORS, SECTORS_OFF = 16.0, 0.01  # of 32 bytes: what 32 lanes store of 16 bytes each
COUNTED_CASE = STREAMS[1]


@dataclass(frozen=True)
class Prediction:
    """low, high: between which the number is to be. measured: None where it could not be, for the reason `missing`."""

    what: str
    unit: str
    low: float
    high: float
    measured: float | None
    missing: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.measured is None else self.low <= self.measured <= self.high


def around(value: float, off: float) -> tuple[float, float]:
    return value * (1.0 - off), value * (1.0 + off)


def measure(device: torch.device, names: Iterable[str]) -> results.Run:
    """Our kernels on these cases, as the benchmark measures them."""
    found = Probe(copy_bandwidth(device), matrix_rate(device), compile_s=0.0)
    run, chosen = results.start(device, found, None), [case for case in cases(device) if case.name in set(names)]
    entries = runner.plan(chosen, device, lambda provider: provider.name == PROVIDER)
    run.rows += runner.Runner(device, timing.QUICK, found).run(entries)
    return run


def of_kernels(model: dict[str, Any], gpu: str, run: results.Run) -> Iterator[Prediction]:
    """The copy, and then each case."""
    copy = around(model["gpus"][gpu]["copy"], COPY_OFF)
    yield Prediction("a copy", "TB/s", *copy, run.copy_gbps / 1e3)
    predicted = {"/".join((r["family"], r["op"], r["size"], r["dtype"])): r["gpus"][gpu] for r in model["rows"]}
    measured = {"/".join(row.key[:-1]): row for row in run.rows}
    for name in (*STREAMS, *TIMES_OFF):
        row, cell = measured.get(name), predicted[name]
        missing = "not measured" if row is None else row.reason or ""
        if name in STREAMS:
            share = row.gbps / run.copy_gbps if row is not None and row.gbps is not None else None
            yield Prediction(name, "of the copy's bandwidth", cell["share"] - SHARE_OFF, 1.0, share, missing)
        else:
            us = 1e3 * row.median if row is not None and row.median is not None else None
            yield Prediction(name, "µs", *around(cell["us"], TIMES_OFF[name]), us, missing)


def of_host(device: torch.device) -> Prediction:
    """A step of a layer that compresses nothing, over the same with two concatenations and PyTorch's attention."""
    times = [host_us(make(device), device) for make in (compressed_step, dense_step)]
    what = "the host's time for a token of ZipCacheLayer, over two concatenations and scaled_dot_product_attention"
    return Prediction(what, "times", 0.0, HOST_TIMES, times[0] / times[1])


def host_us(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        call()
    return timing.host_microseconds(Step(call), device)


def tokens(device: torch.device, count: int) -> torch.Tensor:
    return torch.randn(1, 8, count, 128, dtype=torch.bfloat16, device=device)


def compressed_step(device: torch.device) -> Callable[[], object]:
    from singlepass.kv import ZipCacheLayer

    layer, prompt, new = ZipCacheLayer(backend=PROVIDER), tokens(device, 512), tokens(device, 1)
    layer.prefill(prompt, prompt, prompt)
    return lambda: layer.step(new, new, new)


def dense_step(device: torch.device) -> Callable[[], object]:
    """What DynamicCache does of Transformers, which not every machine has."""
    prompt, new = tokens(device, 512), tokens(device, 1)

    def call() -> torch.Tensor:
        k, v = (torch.cat((prompt, new), 2) for _ in "kv")
        return torch.nn.functional.scaled_dot_product_attention(new, k, v)

    return call


def of_sectors() -> Prediction:
    """By the profiler over one step of Lion, whose stores are those of its vectors alone."""
    what = f"sectors for each store, {COUNTED_CASE}"
    made = partial(Prediction, what, "sectors", *around(SECTORS, SECTORS_OFF))
    found = kernels.profile(COUNTED_CASE, PROVIDER)
    if isinstance(found, str):
        return made(None, found)
    said = next((said for kernel in found if (said := kernel["numbers"].get(kernels.WANTED[kernels.SECTORS]))), None)
    return made(float(said.split()[0])) if said else made(None, "the profiler did not count them")


def main(device: torch.device) -> None:
    name, model = torch.cuda.get_device_name(device), results.newest_model()
    gpu = next((gpu for gpu in model["gpus"] if gpu in name), None) if model is not None else None
    found: list[Prediction] = []
    if model is not None and gpu is not None:
        found += of_kernels(model, gpu, measure(device, (*STREAMS, *TIMES_OFF)))
    found += [of_host(device), of_sectors()]
    of_model = {"gpu": gpu, "commit": model["commit"] if model is not None else None}
    print(json.dumps(of_model | {"predictions": [asdict(p) | {"holds": p.holds} for p in found]}, indent=1))


if __name__ == "__main__":
    main(torch.device(*sys.argv[1:] or ("cuda",)))
