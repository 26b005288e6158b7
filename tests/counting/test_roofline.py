# SPDX-License-Identifier: Apache-2.0
"""The roofline on launches whose times are known by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from counting.gpus import GPUS, Gpu
from counting.roofline import LAUNCH_US, Launch, Warp, predict, resident

GPU = {gpu.name: gpu for gpu in GPUS}
H100 = GPU["H100"]
# Ten full waves of blocks, all of whose warps only move bytes.
COPY = Launch("copy", 3e9, 10 * 132 * 8, warps=8, registers=32, shared=0, warp=Warp(100, 1100, 600))


@pytest.mark.parametrize(
    ("gpu", "warps", "registers", "shared", "blocks"),
    [
        ("H100", 8, 32, 0, 8),  # by threads
        ("H100", 8, 85, 0, 2),  # by registers, which come in eights: 88
        ("H100", 4, 168, 0, 3),
        ("H100", 6, 40, 0, 8),
        ("H100", 8, 32, 32 * 1024, 6),  # by shared memory, of which the driver keeps 1 KB
        ("RTX 4090", 8, 32, 32 * 1024, 3),
        ("RTX 4090", 1, 16, 0, 24),  # by blocks
        ("H100", 8, 255, 0, 1),
    ],
)
def test_blocks_on_an_sm(gpu: str, warps: int, registers: int, shared: int, blocks: int) -> None:
    assert resident(GPU[gpu], warps, registers, shared) == blocks


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_what_only_moves_bytes_nears_a_copy(gpu: Gpu) -> None:
    found = predict(gpu, COPY)
    assert found.floor_us == pytest.approx(3e9 / gpu.copy / 1e6)
    assert found.binds == "memory"
    assert 0.92 < found.share < 0.94


def test_instructions_bind_where_there_are_many() -> None:
    busy = replace(COPY, warp=Warp(30_000, 0, 0))
    clocks = 10 * 8 * 8 * 30_000 / 4 / 0.8
    assert predict(H100, busy).binds == "issue"
    assert predict(H100, busy).us - LAUNCH_US == pytest.approx(clocks / 1755, rel=0.05)


def test_a_slow_pipe_binds_on_the_gpu_that_has_it() -> None:
    doubles = replace(COPY, warp=Warp(100, 0, 0, {"fp64": 1000}))
    assert {gpu.name: predict(gpu, doubles).binds for gpu in GPUS}["RTX 4090"] == "fp64"
    assert predict(H100, doubles).binds == "memory"


def test_conversions_take_the_float64_lanes_where_they_are_the_same() -> None:
    both = replace(COPY, bytes=0, warp=Warp(0, 0, 0, {"fp64": 1000, "convert64": 1000}))
    alone = replace(both, warp=Warp(0, 0, 0, {"fp64": 2000}))
    ada, hopper = GPU["RTX 4090"], H100
    assert predict(ada, both) == predict(ada, alone)
    assert predict(hopper, both).binds == "convert64"


def test_waiting_binds_where_few_warps_wait_often() -> None:
    alone = Launch("chain", 0, blocks=132, warps=1, registers=32, shared=0, warp=Warp(10, 100_000, 50_000))
    found = predict(H100, alone)
    assert found.binds == "latency"
    assert found.us - LAUNCH_US == pytest.approx(50_000 / 1755, rel=0.01)


def test_loads_take_longer_while_the_memory_is_busy() -> None:
    """Between both latencies, and the nearer to the longer one the more bytes are moved."""
    chain = Launch("chain", 0, blocks=132, warps=1, registers=32, shared=0, warp=Warp(10, 100_000, 50_000))
    half, full = (predict(H100, replace(chain, bytes=3e12 * us / 1e6)).us - LAUNCH_US for us in (20, 50))
    assert 50_000 / 1755 < half < full
    assert full == pytest.approx(100_000 / 1755, rel=0.2)


def test_a_small_launch_costs_its_launch() -> None:
    assert predict(H100, replace(COPY, blocks=1, bytes=1e3)).binds == "launch"


def test_the_rest_of_a_wave_costs_what_its_sms_need() -> None:
    """Half a wave more of what instructions bind takes half a wave's time more; a single block, that of a block."""
    busy = replace(COPY, warp=Warp(100_000, 0, 0), bytes=0)
    times = [predict(H100, replace(busy, blocks=132 * 8 * 2 + more)).us for more in (0, 132 * 4, 1, 132 * 8)]
    wave = times[3] - times[0]
    assert times[1] - times[0] == pytest.approx(wave / 2)
    assert times[2] - times[0] == pytest.approx(wave / 8)
