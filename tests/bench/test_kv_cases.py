# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from singlepass.bench import checks, counted, registry, tables
from singlepass.bench.kv import caches, gates, inputs, model
from singlepass.bench.kv import cases as kv
from singlepass.bench.kv.caches import DECODE, QUANTIZE, CacheShape
from singlepass.bench.results import Row, Run
from singlepass.kv import Codec, cache_nbytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16)
MakeRow = Callable[..., Row]
MakeRun = Callable[..., Run]


def family(device: torch.device) -> list[registry.Case]:
    return [case for case in registry.cases(device) if case.family == "kv"]


def test_cases() -> None:
    decode = {(case.size, case.dtype) for case in family(CPU) if case.op == DECODE}
    assert decode == {(f"{b}x{n}", dtype) for b in (1, 4) for n in (4096, 32768) for dtype in DTYPES}
    assert {case.size for case in family(CUDA) if case.op == DECODE} == {
        f"{b}x{n}" for b in (1, 8) for n in (8192, 32768, 131072)
    }
    assert {case.op for case in family(CPU)} == set(caches.TITLES)


EACH = [(op, dtype) for op in caches.TITLES for dtype in DTYPES if op not in model.MODEL_OPS or dtype == torch.float32]


@pytest.mark.parametrize(("op", "dtype"), EACH, ids=lambda value: str(value).removeprefix("torch."))
def test_providers_compute_what_they_claim(op: str, dtype: torch.dtype) -> None:
    case = next(case for case in family(CPU) if (case.op, case.dtype) == (op, dtype))
    ran = set()
    for provider in case.providers:
        if provider.why_not(CPU) is None and provider.differs is None:
            assert provider.gate(CPU).agrees, provider.name
            ran.add(provider.name)
    assert ran >= {"native", "sdpa" if op in model.MODEL_OPS else "eager"}


def wrong(change: Callable[[inputs.Inputs], inputs.Inputs], data: inputs.Inputs) -> Callable[[], Tensor]:
    return kv.own_decode("eager", change(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: replace(data, v=data.v.flip(2)),
        lambda data: replace(data, q=data.q * 1.01),
        lambda data: replace(data, k=data.k[:, :, :-1], v=data.v[:, :, :-1]),
    ],
    ids=["values in another order", "another scale", "a token less"],
)
def test_gate_stops_another_result(change: Callable[[inputs.Inputs], inputs.Inputs]) -> None:
    assert gates.gate(partial(kv.own_decode, "eager"), kv.decode_truth, torch.float32, CPU).agrees
    assert not gates.gate(partial(wrong, change), kv.decode_truth, torch.float32, CPU).agrees


def test_floor_counts_what_the_cache_takes() -> None:
    """Less the few bytes that say where blocks and tokens stand."""
    shape = CacheShape(1, 4096)
    tokens = shape.length - caches.WINDOW
    codec = Codec(block=caches.BLOCK, regular_block=caches.REGULAR_BLOCK)
    assert codec == Codec(), "the default is what is measured"
    counted = cache_nbytes(tokens, heads=caches.HEADS, head_dim=caches.WIDTH, codec=codec)
    assert 0.99 * counted < caches.packed_bytes(shape) + caches.HEADS * tokens / 4 <= counted
    case = kv.case(DECODE, shape, torch.float32, on_gpu=False)
    assert case.bytes == caches.packed_bytes(shape) + caches.HEADS * caches.WINDOW * caches.WIDTH * 2 * 4


@pytest.fixture
def row(make_row: MakeRow) -> MakeRow:
    def make(op: str, provider: str, ms: float | None, column: str = "native", **values: object) -> Row:
        facts: dict[str, object] = {"family": "kv", "size": "1x32768", "bytes": 1 << 20, "column": column}
        return make_row(op, provider, ms, **(facts | values))

    return make


@pytest.fixture
def rows(row: MakeRow) -> list[Row]:
    return [
        row(DECODE, "native", 5.0),
        row(DECODE, "sdpa-float32", 30.0, "yardstick"),
        row(DECODE, "grouped-float32", 17.0, "yardstick"),
        row(DECODE, "transformers-quanto", 60.0, "peer"),
        row(QUANTIZE, "native", 5.0),
        row(QUANTIZE, "copy", 2.0, "yardstick"),
    ]


def verdicts(run: Run) -> list[bool | None]:
    return [check.holds for check in checks.check(run, "kv")]


def test_bars(rows: list[Row], row: MakeRow, make_run: MakeRun) -> None:
    assert verdicts(make_run(rows)) == [True, True, True]
    assert verdicts(make_run([row(DECODE, "native", 5.2), *rows[1:]])) == [False, True, True]
    assert verdicts(make_run([row(DECODE, "native", 6.1), *rows[1:]])) == [False, False, True]
    assert verdicts(make_run([*rows[:5], row(QUANTIZE, "copy", 1.6, "yardstick")])) == [True, True, False]
    assert verdicts(make_run([*rows[:3], *rows[4:]])) == [True, None, True]


def test_short_caches_need_not_be_faster(rows: list[Row], make_run: MakeRun) -> None:
    rows = [replace(r, size="1x4096") for r in rows]
    rows[0] = replace(rows[0], ms={"q20": 16.9, "q50": 16.9, "q80": 16.9, "n": 9})
    assert verdicts(make_run(rows))[0] is True


def test_bars_of_low_rank(row: MakeRow, make_run: MakeRun) -> None:
    """A processor whose bfloat16 is fast is asked for less; projecting is judged by the attention of the same run."""
    fast, slow = row(caches.LOW_RANK_CODES, "native", 4.5), row(caches.LOW_RANK_CODES, "sdpa", 20.0, "yardstick")
    assert verdicts(make_run([fast, slow])) == [False]
    intel = make_run([fast, slow])
    intel.machine = intel.machine | {"device": "Intel(R) Xeon(R)"}
    assert verdicts(intel) == [True]
    attention = row(caches.LOW_RANK, "native", 2.0, size="1x4096")
    for ms, holds in ((0.19, True), (0.23, False)):
        assert verdicts(make_run([attention, row(caches.PROJECT, "native", ms, size="1x4096")])) == [holds]
    assert verdicts(make_run([row(caches.PROJECT, "native", 0.1, size="1x4096")])) == [None]


def test_grid(rows: list[Row], make_run: MakeRun) -> None:
    (grid,) = tables.grids(make_run(rows), family="kv")
    assert grid.title == "compressed KV cache, float32: ms (multiple of the floor)"
    line = dict(zip(grid.head, grid.lines[0], strict=True))
    assert line["batch x tokens, op"] == "1x32768, decode attention"
    assert line["torch, 16/32 bits"].startswith("17.0 (")
    assert grid.notes[0] == "[1] grouped-float32."
    assert line["best peer"].startswith("60.0 (")


def test_whole_models_are_told_in_seconds_and_tokens(make_row: MakeRow, make_run: MakeRun) -> None:
    """And judged against an uncompressed cache, where there is a target."""
    facts = {"family": "kv", "dtype": "float32"}
    rows = [
        make_row(op, provider, ms, column=column, size=size, **facts)
        for size, times in (("1x1024", (2000.0, 50.0)), ("1x7000", (25000.0, 100.0)))
        for op, ms in zip(model.MODEL_OPS, times, strict=True)
        for provider, column, ms in (("native", "native", 0.9 * ms), ("sdpa", "yardstick", ms))
    ]
    grid = tables.token_grid(make_run(rows))
    assert [line[:2] for line in grid.lines[:2]] == [["1,024", "uncompressed"], ["1,024", "**ZipCache**"]]
    assert [[float(x) for x in line[2:]] for line in grid.lines] == [
        [2.0, 20.0],
        [1.8, 22.2],
        [25.0, 10.0],
        [22.5, 11.1],
    ]
    found = [(check.case, check.value, check.holds) for check in checks.check(make_run(rows))]
    assert found == [
        ("a model's next token, 1x1024 float32", pytest.approx(0.9), True),
        ("a model's first token, 1x7000 float32", pytest.approx(0.9), True),
        ("a model's next token, 1x7000 float32", pytest.approx(0.9), False),
    ]


def test_grid_of_bytes() -> None:
    grid = counted.cache_grid()
    assert grid.lines[0][1:] == ["512", "16.00", "1.00"]
    sizes = {line[0]: float(line[1]) for line in grid.lines[1:]}
    assert len(sizes) == len(grid.lines) - 1
    settings = (", one block for the prompt", ", blocks of 128", " in 4 bits, the rest in 2", ", regular blocks of 16")
    own = [sizes[f"ZipCache, 60 %{setting}"] for setting in settings]
    assert own == sorted(own)
    assert sizes["ZipCache's codec, all in 2 bits"] < sizes["ZipCache, 40 %"] < sizes["ZipCache, 80 %"]
    assert sizes["8 bits for each token and head"] == pytest.approx(256 + 8 + 0.25, abs=0.1)


def test_kivi_is_called_as_its_kernels_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for its kernels, which are not here, take and give what those do, and keep numbers as they are."""

    def pack(x: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        assert x.is_contiguous()
        assert x.shape[-1] % group == 0
        return x, x[..., ::group], x[..., ::group]

    def product(group: int, a: Tensor, b: Tensor, scales: Tensor, minima: Tensor, bits: int) -> Tensor:
        assert a.dtype == torch.float16
        assert scales.shape == minima.shape == (*b.shape[:-1], b.shape[-1] // group)
        rows = a.reshape(len(b), b.shape[1], -1, a.shape[-1])
        return (rows @ b).view(*a.shape[:-1], b.shape[-1])

    modules = {
        "new_pack": {"triton_quantize_and_pack_along_last_dim": pack},
        "matmul": {"cuda_bmm_fA_qB_outer": product},
    }
    monkeypatch.setitem(sys.modules, "quant", ModuleType("quant"))
    for name, functions in modules.items():
        module = ModuleType(f"quant.{name}")
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, f"quant.{name}", module)
    data = inputs.make_inputs(gates.GATE_SHAPE, torch.float32, CPU)
    torch.testing.assert_close(kv.kivi(data)().float(), kv.dense_truth(data).float(), rtol=1e-2, atol=2e-3)
    peers = [
        {p.name: p.differs for case in family(d) for p in case.providers if p.column == "peer"} for d in (CPU, CUDA)
    ]
    assert [sorted(names) for names in peers] == [["transformers-quanto"], ["kivi", "transformers-quanto"]]
    assert "4 bits" in str(peers[1]["transformers-quanto"])
    assert "2 bits" in str(peers[1]["kivi"])
