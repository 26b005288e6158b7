# SPDX-License-Identifier: Apache-2.0
"""Runs cases: gate, interleaved timing beside the floor, memory; the most telling first, within a time budget."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from . import timing
from .floor import StreamPool, floor_step
from .memory import available_bytes, peak_extra_bytes
from .registry import Case, Gate, Provider, Step, Tier, dtype_name
from .results import Row
from .timing import Effort

FLOOR = "floor"

# Seconds that a stage of each tier is expected to take until one has been seen.
FIRST_GUESS = {Tier.FUSED: 10.0, Tier.EAGER: 20.0, Tier.COMPILED: 20.0, Tier.PEER: 30.0, Tier.SLOW: 200.0}


@dataclass(frozen=True)
class Stage:
    """The providers of one tier of one case: what is measured, or left out, together."""

    case: Case
    tier: Tier
    providers: tuple[Provider, ...]


def plan(cases: Iterable[Case], wanted: Callable[[Provider], bool] = lambda provider: True) -> list[Stage]:
    """All stages, the most telling first: the first tier of all cases, then the other tiers rank by rank.

    Within each, families take turns, so that a run that is short of time has something of all of them.
    """
    stages: list[tuple[tuple[int, Tier, int], Stage]] = []
    turns: Counter[str] = Counter()
    for case in cases:
        turns[case.family] += 1
        for tier in Tier:
            providers = tuple(p for p in case.providers if p.tier == tier and wanted(p))
            if providers:
                late = 0 if tier == Tier.FUSED else 1 + case.rank
                stages.append(((late, tier, turns[case.family]), Stage(case, tier, providers)))
    return [stage for _, stage in sorted(stages, key=lambda entry: entry[0])]


@dataclass
class Runner:
    """Measures stages on a device. `budget` in seconds counts from the first stage; None measures everything."""

    device: torch.device
    effort: Effort
    budget: float | None = None

    def __post_init__(self) -> None:
        self._pool = StreamPool(self.device)
        self._begin = time.perf_counter()
        self._longest: dict[tuple[str, Tier], float] = {}

    def run(self, stages: list[Stage], progress: Callable[[Stage], None] = lambda stage: None) -> Iterator[Row]:
        for stage in stages:
            progress(stage)
            if not self._in_time(stage):
                for provider in stage.providers:
                    yield self._row(stage.case, provider, "skipped", reason="out of time")
                continue
            begin = time.perf_counter()
            yield from self._stage(stage)
            taken = time.perf_counter() - begin
            kind = stage.case.family, stage.tier
            self._longest[kind] = max(taken, self._longest.get(kind, 0.0))

    def _in_time(self, stage: Stage) -> bool:
        expected = self._longest.get((stage.case.family, stage.tier), FIRST_GUESS[stage.tier])
        return self.budget is None or time.perf_counter() - self._begin + expected < self.budget

    def _stage(self, stage: Stage) -> Iterator[Row]:
        case, ready = stage.case, []
        gates: dict[str, Gate] = {}
        gate_seconds: dict[str, float] = {}
        for provider in stage.providers:
            if reason := provider.why_not(self.device):
                yield self._row(case, provider, "unavailable", reason=reason)
                continue
            try:  # whatever stops a provider is its result
                begin = time.perf_counter()
                gate = gates[provider.name] = provider.gate(self.device)
                gate_seconds[provider.name] = time.perf_counter() - begin
            except Exception as error:
                yield self._row(case, provider, "unavailable", reason=f"{type(error).__name__}: {first_line(error)}")
                continue
            if not gate.agrees and provider.differs is None:
                yield self._row(case, provider, "wrong", gate_error=gate.error, reason="disagrees with the reference")
                continue
            ready.append(provider)
        for group in self._groups(ready, case):
            try:
                rows = self._measure(case, group)
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                rows = [self._row(case, provider, "unavailable", reason=reason) for provider in group]
            for row in rows:
                row.gate_error = gates[row.provider].error
                if gates[row.provider].agrees:
                    row.differs = None
                if row.startup_s is not None:
                    row.startup_s += gate_seconds[row.provider]
                yield row

    def _groups(self, providers: list[Provider], case: Case) -> Iterator[list[Provider]]:
        """Providers that fit into memory together, beside the floor's buffers and the shared inputs."""
        limit = 0.6 * available_bytes(self.device) - case.bytes
        group: list[Provider] = []
        for provider in providers:
            if group and sum(p.footprint for p in group) + provider.footprint > limit:
                yield group
                group = []
            group.append(provider)
        if group:
            yield group

    def _measure(self, case: Case, providers: list[Provider]) -> list[Row]:
        data = case.inputs(self.device)
        floor = floor_step(case.passes, self._pool)
        floor.run()
        steps, rows = {FLOOR: floor}, []
        for provider in providers:
            step, row = provider.prepare(data), self._row(case, provider, "ok")
            row.startup_s, row.extra_bytes = self._start(provider, step)
            steps[provider.name] = step
            rows.append(row)
        samples = timing.measure(steps, timing.clock(self.device, case.bytes), self.effort)
        for row in rows:
            row.ms, row.floor_ms = samples[row.provider].summary(), samples[FLOOR].summary()
            if self.device.type == "cuda":
                row.host_us = timing.host_microseconds(steps[row.provider], self.device)
                row.launches = timing.kernel_launches(steps[row.provider], self.device)
        return rows

    def _start(self, provider: Provider, step: Step) -> tuple[float, int | None]:
        """Make the first calls: (their seconds, peak memory of one more)."""
        begin = time.perf_counter()
        for i in range(provider.first_calls):
            step.before(i)
            step.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin, peak_extra_bytes(step, self.device)

    @staticmethod
    def _row(
        case: Case, provider: Provider, status: str, reason: str | None = None, gate_error: float | None = None
    ) -> Row:
        return Row(
            family=case.family,
            op=case.op,
            size=case.size,
            dtype=dtype_name(case.dtype),
            provider=provider.name,
            column=provider.column,
            status=status,
            reason=reason,
            differs=provider.differs,
            gate_error=gate_error,
            elements=case.elements,
            tensors=case.tensors,
            input_bytes=case.input_bytes,
            bytes=case.bytes,
            flops=case.flops,
        )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
