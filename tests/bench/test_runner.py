# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import singlepass  # noqa: F401 - registers the stream of the floor
from singlepass.bench import runner
from singlepass.bench.registry import Case, Gate, Pass, Provider, Step, Tier
from singlepass.bench.runner import Runner, plan
from singlepass.bench.timing import Effort

pytestmark = pytest.mark.usefixtures("small_buffers")

CPU = torch.device("cpu")
EFFORT = Effort(min_reps=2, max_reps=2, seconds=0.0)


def provider(name: str, tier: Tier = Tier.FUSED, error: float = 0.0, **options: object) -> Provider:
    return Provider(name, "peer", tier, lambda data: Step(lambda: None), lambda device: Gate(error), **options)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    def make(*providers: Provider, op: str = "op") -> Case:
        passes = (Pass((4000,), (4000,)),)
        return Case("family", op, "size", torch.float32, (), passes, 1, 1000, 4000, 1, lambda device: None, providers)

    return make


def run(case: Case, **options: object) -> dict[str, runner.Row]:
    rows = Runner(CPU, EFFORT, **options).run(plan([case]))
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


def test_telling_stages_come_first(make_case: Callable[..., Case]) -> None:
    providers = [provider(name, tier) for name, tier in (("c", Tier.COMPILED), ("a", Tier.FUSED), ("b", Tier.EAGER))]
    cases = [replace(make_case(*providers, op=op), rank=rank) for op, rank in (("late", 1), ("one", 0), ("two", 0))]
    order = [(stage.case.op, "".join(p.name for p in stage.providers)) for stage in plan(cases)]
    assert order == [
        *(("late", "a"), ("one", "a"), ("two", "a")),
        *(("one", "b"), ("two", "b"), ("one", "c"), ("two", "c")),
        *(("late", "b"), ("late", "c")),
    ]


def test_families_take_turns(make_case: Callable[..., Case]) -> None:
    """What one family has in plenty does not keep another out of a run that is short of time."""
    providers = [provider("a"), provider("b", Tier.EAGER)]
    cases = [make_case(*providers, op=op) for op in ("x1", "x2", "x3")]
    cases += [replace(make_case(*providers, op=op), family="other") for op in ("y1", "y2")]
    order = [stage.case.op for stage in plan(cases)]
    assert order == ["x1", "y1", "x2", "y2", "x3"] * 2


def test_families_are_expected_to_take_their_own_time(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow family's last stage says nothing about the next one's."""
    now = [0.0]

    def takes(seconds: float) -> Provider:
        def gate(device: torch.device) -> Gate:
            now[0] += seconds
            return Gate(0.0)

        return replace(provider("a"), gate=gate)

    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setitem(runner.FIRST_GUESS, Tier.FUSED, 1.0)
    slow, quick = takes(30.0), takes(1.0)
    cases = [make_case(slow, op="one"), make_case(slow, op="two")]
    cases += [replace(make_case(quick, op=op), family="other") for op in ("three", "four")]
    rows = Runner(CPU, EFFORT, budget=50.0).run(plan(cases))
    assert {row.op: row.status for row in rows} == {"one": "ok", "three": "ok", "two": "skipped", "four": "ok"}


def test_first_calls_are_not_timed(make_case: Callable[..., Case]) -> None:
    calls = []
    step = Step(lambda: calls.append("run"), calls.append)
    rows = run(make_case(replace(provider("a", first_calls=3), prepare=lambda data: step)))
    assert rows["a"].ms
    assert rows["a"].ms["n"] == 2
    assert calls[:6] == [0, "run", 1, "run", 2, "run"]


def test_budget_skips_what_would_not_fit(make_case: Callable[..., Case]) -> None:
    guess = runner.FIRST_GUESS
    budget = (guess[Tier.FUSED] + guess[Tier.SLOW]) / 2
    rows = run(make_case(provider("a"), provider("c", Tier.SLOW)), budget=budget)
    assert (rows["a"].status, rows["c"].status, rows["c"].reason) == ("ok", "skipped", "out of time")


def test_groups_fit_into_memory(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "available_bytes", lambda device: 1_000_000)
    sizes = {"a": 300_000, "b": 200_000, "c": 200_000, "d": 900_000, "e": 1}
    providers = [provider(name, footprint=size) for name, size in sizes.items()]
    groups = Runner(CPU, EFFORT)._groups(providers, make_case())
    assert ["".join(p.name for p in group) for group in groups] == ["ab", "c", "d", "e"]
