# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from singlepass.bench import floor, memory, probe, timing
from singlepass.bench.floor import StreamPool, floor_step, sweeps
from singlepass.bench.registry import Pass, Step
from singlepass.bench.timing import Effort, Samples

CPU = torch.device("cpu")


class FakeClock:
    """Takes the seconds that a step returns for the time that it took."""

    warmup = 2

    def ahead(self, run: Callable[[], object]) -> None:
        pass

    def time(self, run) -> float:
        return run()


def fake_steps(seconds: dict[str, float], log: list[str]) -> dict[str, Step]:
    def step(name: str) -> Step:
        def run() -> float:
            log.append(name)
            return seconds[name]

        return Step(run)

    return {name: step(name) for name in seconds}


def test_steps_take_turns() -> None:
    log: list[str] = []
    steps = fake_steps({"a": 0.1, "b": 0.1, "c": 0.1}, log)
    timing.measure(steps, FakeClock(), Effort(min_reps=3, max_reps=3, seconds=100.0))
    assert "".join(log) == "aabbcc" + "abc" + "bca" + "cab"


def test_slow_steps_leave_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What prepares a call counts too: flushing a large cache may take longer than the call."""
    now = [0.0]

    class SlowFlush(FakeClock):
        def ahead(self, run: Callable[[], object]) -> None:
            now[0] += 0.5

        def time(self, run: Callable[[], float]) -> float:
            seconds = super().time(run)
            now[0] += seconds
            return seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    samples = timing.measure(fake_steps({"slow": 2.0, "fast": 0.25}, []), SlowFlush(), Effort(3, 100, 4.5))
    assert len(samples["slow"].seconds) == 3
    assert len(samples["fast"].seconds) == 4  # of the 4.5 seconds, two warm-up calls took 1.5


def test_calls_are_numbered() -> None:
    numbers: list[int] = []
    timing.measure({"a": Step(lambda: 1.0, numbers.append)}, FakeClock(), Effort(3, 3, 1.0))
    assert numbers == [0, 1, 2, 3, 4]  # warm-up included


def test_samples_in_milliseconds() -> None:
    summary = Samples(tuple(i / 1000 for i in range(1, 12))).summary()
    assert (summary["q20"], summary["q50"], summary["q80"], summary["n"]) == (3.0, 6.0, 9.0, 11)
    assert Samples((0.5,)).summary() == {"q20": 500.0, "q50": 500.0, "q80": 500.0, "n": 1}


def test_small_inputs_are_flushed_from_the_cache() -> None:
    cache = timing.last_level_cache_bytes()
    assert timing.CpuClock(cache)._flush is not None
    assert timing.CpuClock(100 * cache)._flush is None


@pytest.mark.parametrize(("warm", "ahead"), [(False, []), (True, ["call"])])
def test_a_warm_clock_calls_once_ahead(small_buffers: None, warm: bool, ahead: list[str]) -> None:
    log: list[str] = []
    clock = timing.CpuClock(1, warm)
    clock.ahead(lambda: log.append("call"))
    assert log == ahead
    assert (clock._flush is None) == warm


def test_sweeps_of_one_size_are_the_pass_itself() -> None:
    p = Pass((400,), (400, 400))
    assert sweeps(p) == [p]


def test_sweeps_move_the_bytes_of_the_pass() -> None:
    p = Pass((200, 400), (200, 400, 800))
    assert sweeps(p) == [
        Pass((200, 200), (200, 200, 200)),
        Pass((200,), (200, 200)),
        Pass((), (400,)),
    ]
    assert sum(s.bytes for s in sweeps(p)) == p.bytes
    assert sum(sum(s.reads) for s in sweeps(p)) == sum(p.reads)


def test_floor_streams_lists_of_the_right_lengths(monkeypatch) -> None:
    import singlepass  # noqa: F401

    calls = []
    real = torch.ops.singlepass.stream_.default

    class Ops:
        class stream_:  # noqa: N801
            @staticmethod
            def default(reads: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
                calls.append(([r.numel() for r in reads], [u.numel() for u in updates]))
                real(reads, updates)

    monkeypatch.setattr(torch.ops, "singlepass", Ops)
    pool = StreamPool(CPU)
    step = floor_step((Pass((40,), ()), Pass((40, 40), (80,))), pool)
    step.run()
    assert calls == [([10], []), ([10, 10], [10]), ([], [10])]
    pool.take((4000,))
    step.run()  # buffers that have been replaced by longer ones stay alive where they are in use


@pytest.mark.serial
def test_extra_memory_sees_a_temporary() -> None:
    size = 64 << 20

    def allocate() -> None:
        torch.empty(size // 4).fill_(1.0)

    extra = memory.peak_extra_bytes(Step(allocate), CPU)
    if extra is None:
        return  # not Linux
    assert abs(extra - size) < 1 << 20  # the kernel counts pages per thread and adds them up late


@pytest.mark.serial
@pytest.mark.slow("starts a process, which keeps its memory from then on")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    code = """
import resource, torch
from singlepass.bench.memory import keep_freed_memory
assert keep_freed_memory()
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(megabytes << 18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for megabytes in (8, 64, 256):
    seen = [faults(megabytes) for _ in range(20)]
    assert max(seen[10:]) < 100, (megabytes, seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.serial
def test_extra_memory_of_a_step_in_place() -> None:
    t = torch.zeros(4 << 20)
    t.add_(1.0)  # the first call also maps pages of code
    extra = memory.peak_extra_bytes(Step(lambda: t.add_(1.0)), CPU)
    assert extra is None or extra < 1 << 20


def test_the_rate_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations for each product of elements, over the median of the times."""
    times = iter([1e-3, 5e-3, 2e-3])

    class Clock:
        def time(self, run: Callable[[], object]) -> float:
            run()
            return next(times)

    monkeypatch.setattr(floor, "clock", lambda device, working_set: Clock())
    assert floor.matrix_rate(torch.device("cpu"), repetitions=3) == pytest.approx(2 * 1024**3 / 2e-3 / 1e12)


@pytest.mark.slow("it compiles two functions, as every run does")
def test_probe(small_buffers: None) -> None:
    found = probe.probe(torch.device("cpu"))
    assert found.copy_gbps > 0.0
    assert found.matrix_tflops > 0.0
    assert found.compile_s >= 0.0
    assert found.moving(2e9) == pytest.approx(2.0 / found.copy_gbps)
    assert found.computing(3e12) == pytest.approx(3.0 / found.matrix_tflops)


def test_a_machine_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    assert probe.compile_seconds(torch.device("cpu")) == 0.0
