# SPDX-License-Identifier: Apache-2.0
"""Runs cases: each whole, all its providers in turn beside the floor; as many cases as there is time for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from . import timing
from .floor import StreamPool, floor_step
from .memory import available_bytes, peak_extra_bytes
from .probe import Probe
from .registry import Case, Gate, Provider, Step, Tier, dtype_name
from .results import Row
from .timing import Effort

FLOOR = "floor"

# How many times the floor a call of each tier is expected to take, and its compilations, until a family's first case
# has been measured.
EXPECTED_FLOORS = {Tier.FUSED: 3.0, Tier.EAGER: 60.0, Tier.COMPILED: 15.0, Tier.PEER: 30.0, Tier.SLOW: 15.0}
EXPECTED_COMPILES = {Tier.COMPILED: 3.0, Tier.SLOW: 60.0}
EXPECTED_START = 0.3  # seconds of the gate and of making inputs


@dataclass(frozen=True)
class Entry:
    """A case to be measured, and the providers that compete on it."""

    case: Case
    providers: tuple[Provider, ...]
    device: torch.device

    @property
    def available(self) -> list[Provider]:
        return [provider for provider in self.providers if provider.why_not(self.device) is None]


def plan(
    cases: Iterable[Case], device: torch.device, wanted: Callable[[Provider], bool] = lambda provider: True
) -> list[Entry]:
    """All cases, each family's in its order; families take turns, so that a short run has something of all of them."""
    entries: list[tuple[int, Entry]] = []
    turns: Counter[str] = Counter()
    for case in cases:
        providers = tuple(provider for provider in case.providers if wanted(provider))
        if providers:
            turns[case.family] += 1
            entries.append((turns[case.family], Entry(case, providers, device)))
    return [entry for _, entry in sorted(entries, key=lambda numbered: numbered[0])]


@dataclass
class Runner:
    """Measures cases on a device. `budget` in seconds counts from the first case; None measures everything.

    A case is measured whole or left out: within the budget, each family's first case is always measured, and another
    one if it is expected to end in time.
    """

    device: torch.device
    effort: Effort
    probe: Probe
    budget: float | None = None
    left_out: list[Case] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pool = StreamPool(self.device)
        self._pace: dict[str, float] = {}  # seconds taken for each that was expected, by family

    def run(self, entries: list[Entry], progress: Callable[[Entry], None] = lambda entry: None) -> Iterator[Row]:
        start = time.perf_counter()
        for entry in entries:
            family, expected = entry.case.family, self.expected_seconds(entry)
            begin = time.perf_counter()
            pace = self._pace.get(family)  # None for a family's first case, which is always measured
            if self.budget is not None and pace is not None and begin - start + expected * pace > self.budget:
                self.left_out.append(entry.case)
                continue
            progress(entry)
            yield from self._entry(entry)
            taken = (time.perf_counter() - begin) / expected
            self._pace[family] = taken if pace is None else 0.5 * (pace + taken)

    def expected_seconds(self, entry: Entry) -> float:
        """By the probe alone; the pace of the family corrects it."""
        case, total = entry.case, 0.0
        once = max(self.probe.moving(case.bytes), self.probe.computing(case.flops))
        for provider in entry.available:
            calls = provider.first_calls + 1 + self.effort.min_reps
            seconds = calls * EXPECTED_FLOORS[provider.tier] * once
            total += EXPECTED_START + max(self.effort.seconds, seconds)
            total += EXPECTED_COMPILES.get(provider.tier, 0.0) * self.probe.compile_s
        return total

    def _entry(self, entry: Entry) -> Iterator[Row]:
        case, ready = entry.case, []
        gates: dict[str, Gate] = {}
        gate_seconds: dict[str, float] = {}
        for provider in entry.providers:
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
        effort = replace(self.effort, max_reps=timing.WARM_REPS) if case.warm else self.effort
        samples = timing.measure(steps, timing.clock(self.device, case.bytes, case.warm), effort)
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
