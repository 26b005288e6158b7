# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import singlepass  # noqa: F401 - registers the stream of the floor
from singlepass.bench import runner
from singlepass.bench.probe import Probe
from singlepass.bench.registry import Case, Gate, Pass, Provider, Step, Tier, fitting
from singlepass.bench.runner import Runner, plan
from singlepass.bench.timing import Effort

pytestmark = pytest.mark.usefixtures("small_buffers")

CPU = torch.device("cpu")
EFFORT = Effort(min_reps=2, max_reps=2, seconds=0.0)
PROBE = Probe(copy_gbps=10.0, matrix_tflops=0.1, compile_s=2.0)


def provider(name: str, tier: Tier = Tier.FUSED, error: float = 0.0, **options: object) -> Provider:
    return Provider(name, "peer", tier, lambda data: Step(lambda: None), lambda device: Gate(error), **options)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    def make(*providers: Provider, op: str = "op") -> Case:
        passes = (Pass((4000,), (4000,)),)
        return Case("family", op, "size", torch.float32, (), passes, 1, 1000, 4000, 1, lambda device: None, providers)

    return make


def run(case: Case, **options: object) -> dict[str, runner.Row]:
    rows = Runner(CPU, EFFORT, PROBE, **options).run(plan([case], CPU))
    return {row.provider: row for row in rows}


def test_measures_beside_the_floor(make_case: Callable[..., Case]) -> None:
    row = run(make_case(provider("a")))["a"]
    assert (row.status, row.bytes, row.elements) == ("ok", 12000, 1000)
    assert row.ms
    assert row.floor_ms
    assert row.ms["n"] == row.floor_ms["n"] == 2
    assert row.times_floor == row.ms["q50"] / row.floor_ms["q50"]


def test_wrong_results_are_not_timed(make_case: Callable[..., Case]) -> None:
    row = run(make_case(provider("a", error=1.5)))["a"]
    assert (row.status, row.gate_error, row.ms) == ("wrong", 1.5, None)


def test_peers_that_differ_are_timed_and_marked(make_case: Callable[..., Case]) -> None:
    rows = run(make_case(provider("a", error=9.0, differs="no decay"), provider("b", differs="only at times")))
    assert (rows["a"].status, rows["a"].differs) == ("ok", "no decay")
    assert (rows["b"].status, rows["b"].differs) == ("ok", None)


def test_reasons_are_kept(make_case: Callable[..., Case]) -> None:
    def broken(device: torch.device) -> Gate:
        raise RuntimeError("first line\nsecond line")

    away = provider("away", why_not=lambda device: "not installed")
    rows = run(make_case(away, replace(provider("broken"), gate=broken), provider("good")))
    assert (rows["away"].status, rows["away"].reason) == ("unavailable", "not installed")
    assert (rows["broken"].status, rows["broken"].reason) == ("unavailable", "RuntimeError: first line")
    assert rows["good"].status == "ok"


def test_failure_while_timing_is_a_result(make_case: Callable[..., Case]) -> None:
    def fail() -> None:
        raise MemoryError("no more")

    rows = run(make_case(replace(provider("a"), prepare=lambda data: Step(fail))))
    assert (rows["a"].status, rows["a"].reason) == ("unavailable", "MemoryError: no more")


def test_families_take_turns(make_case: Callable[..., Case]) -> None:
    """What one family has in plenty does not keep another out of a run that is short of time."""
    cases = [make_case(provider("a"), provider("b", Tier.EAGER), op=op) for op in ("x1", "x2", "x3")]
    cases += [replace(make_case(provider("a"), op=op), family="other") for op in ("y1", "y2")]
    entries = plan(cases, CPU)
    assert [entry.case.op for entry in entries] == ["x1", "y1", "x2", "y2", "x3"]
    assert [p.name for p in entries[0].providers] == ["a", "b"], "a case is measured whole"
    assert [entry.case.op for entry in plan(cases, CPU, lambda p: p.name == "b")] == ["x1", "x2", "x3"]


def test_providers_that_cannot_run_are_not_announced(make_case: Callable[..., Case]) -> None:
    away = provider("away", why_not=lambda device: "not installed")
    (entry,) = plan([make_case(away, provider("here"))], CPU)
    assert [p.name for p in entry.available] == ["here"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def taking(seconds: float, clock: list[float], tier: Tier = Tier.FUSED) -> Provider:
    def gate(device: torch.device) -> Gate:
        clock[0] += seconds
        return Gate(0.0)

    return replace(provider("a", tier), gate=gate)


def test_a_case_is_measured_whole_or_left_out(make_case: Callable[..., Case], clock: list[float]) -> None:
    """The first of each family in any case; another one if the family's pace says that it ends in time."""
    slow, quick = taking(30.0, clock), taking(1.0, clock)
    cases = [make_case(slow, op=op) for op in ("one", "two", "three")]
    cases += [replace(make_case(quick, op=op), family="other") for op in ("four", "five", "six")]
    run = Runner(CPU, EFFORT, PROBE, budget=50.0)
    rows = list(run.run(plan(cases, CPU)))
    assert [row.op for row in rows] == ["one", "four", "five", "six"]
    assert {row.status for row in rows} == {"ok"}
    assert [case.op for case in run.left_out] == ["two", "three"]


def test_without_a_budget_nothing_is_left_out(make_case: Callable[..., Case], clock: list[float]) -> None:
    run = Runner(CPU, EFFORT, PROBE)
    cases = [make_case(taking(1e6, clock), op=op) for op in ("one", "two")]
    assert [row.op for row in run.run(plan(cases, CPU))] == ["one", "two"]
    assert run.left_out == []


def test_what_a_case_is_expected_to_take(make_case: Callable[..., Case]) -> None:
    """More on a machine that moves bytes, multiplies or compiles more slowly; nothing for what cannot run."""

    def seconds(probe: Probe, *providers: Provider, **facts: int) -> float:
        (entry,) = plan([replace(make_case(*providers), **facts)], CPU)
        return Runner(CPU, EFFORT, probe).expected_seconds(entry)

    eager, compiled = provider("e", Tier.EAGER), provider("c", Tier.COMPILED)
    large = {"passes": (Pass((10**9,), (10**9,)),)}
    assert seconds(replace(PROBE, copy_gbps=1.0), eager, **large) > 5 * seconds(PROBE, eager, **large)
    assert seconds(replace(PROBE, compile_s=9.0), compiled) >= 21.0 + seconds(PROBE, compiled)
    assert seconds(replace(PROBE, matrix_tflops=0.01), eager, flops=10**11) > 5 * seconds(PROBE, eager, flops=10**11)
    away = provider("away", why_not=lambda device: "not installed")
    assert seconds(PROBE, eager, away) == seconds(PROBE, eager)


def test_the_largest_size_that_fits() -> None:
    assert fitting((8, 4, 2), float, 5.0) == 4
    assert fitting((8, 4, 2), float, 1.0) == 2, "the smallest if none does"


def test_first_calls_are_not_timed(make_case: Callable[..., Case]) -> None:
    calls = []
    step = Step(lambda: calls.append("run"), calls.append)
    rows = run(make_case(replace(provider("a", first_calls=3), prepare=lambda data: step)))
    assert rows["a"].ms
    assert rows["a"].ms["n"] == 2
    assert calls[:6] == [0, "run", 1, "run", 2, "run"]


def test_groups_fit_into_memory(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "available_bytes", lambda device: 1_000_000)
    sizes = {"a": 300_000, "b": 200_000, "c": 200_000, "d": 900_000, "e": 1}
    providers = [provider(name, footprint=size) for name, size in sizes.items()]
    groups = Runner(CPU, EFFORT, PROBE)._groups(providers, make_case())
    assert ["".join(p.name for p in group) for group in groups] == ["ab", "c", "d", "e"]
