# SPDX-License-Identifier: Apache-2.0
"""Ways through kernels whose instructions can be counted by hand."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from counting import cubins
from counting.cubins import NO_BARRIER, Instruction, Kernel
from counting.paths import Inner, Paths, Step
from counting.paths import Path as Way

SOURCE = r"""
// A pass of a warp: two loads and a store of 16 bytes, and four products. The loop is told not to be unrolled.
extern "C" __global__ void products(float4* x, const float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) {
    float4 a = x[i];
    const float4 b = y[i];
    a.x *= b.x, a.y *= b.y, a.z *= b.z, a.w *= b.w;
    x[i] = a;
  }
}
// The same in a loop around, with a sum of doubles that every pass of it writes.
extern "C" __global__ void nested(const float4* x, double* sums, int n, int m) {
#pragma unroll 1
  for (int j = blockIdx.x; j < m; j += gridDim.x) {
    double sum = 0.0;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 128) {
      const float4 a = x[j * n + i];
      sum += double(a.x * a.y) + double(a.z * a.w);
    }
    sums[j * 128 + threadIdx.x] = sum;
  }
}
// Which branch is taken is known at run time: three products of each element, or two square roots.
extern "C" __global__ void either(float* x, int n, bool roots) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) {
    float a = x[i];
    if (roots) {
      a = __fsqrt_rn(a + 1.0f) + __fsqrt_rn(a);
    } else {
      a = a * a * a * 3.0f;
    }
    x[i] = a;
  }
}
// A division, whose slow part is a function that is called.
extern "C" __global__ void quotients(float* x, const float* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) x[i] = __fdiv_rn(x[i], y[i]);
}
extern "C" __global__ void integer_quotients(int* x, const int* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) x[i] = x[i] / y[i];
}
// Loops of which a table has the addresses.
template <int kSquares>
__device__ void square(float* x, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) {
    float a = x[i];
    for (int k = 0; k < kSquares; ++k) a *= a;
    x[i] = a;
  }
}
extern "C" __global__ void squares(float* x, int n, int times) {
  switch (times) {
    case 1: return square<1>(x, n);
    case 2: return square<2>(x, n);
    case 3: return square<3>(x, n);
    case 4: return square<4>(x, n);
    case 5: return square<5>(x, n);
    case 6: return square<6>(x, n);
  }
}
"""
NVCC = cubins.tool("nvcc")

pytestmark = pytest.mark.xdist_group("tiny cubin")
needs_nvcc = pytest.mark.skipif(
    NVCC is None or cubins.tool("cuobjdump") is None, reason="no nvcc or no cuobjdump, which Triton has"
)


@pytest.fixture(scope="module", params=("sm_80", "sm_90"))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    folder = tmp_path_factory.mktemp("cubin")
    source, cubin = folder / "tiny.cu", folder / f"tiny.{request.param}.cubin"
    source.write_text(SOURCE)
    command = [str(NVCC), "-fmad=false", "-cubin", f"-arch={request.param}", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True)
    return cubins.read(cubin)


@needs_nvcc
def test_a_loop_and_what_it_does(kernels: dict[str, Kernel]) -> None:
    kernel = kernels["products"]
    assert 0 < kernel.registers < 64
    assert (kernel.local, kernel.shared) == (0, 0)
    way = Paths(kernel).through(Step("loop", (("LDG.128", 2), ("STG.128", 1))))
    loop = way.loop("loop")
    assert loop.unrolled == 1
    assert loop.path.count("LDG.128") == 2
    assert loop.path.count("STG.128") == 1
    assert loop.path.count("FMUL") == 4
    assert loop.path.pipes["lsu"] == 12  # 16 bytes are four times a lane's share
    assert way.count("LDG.128", "STG.128", "FMUL") == 0  # outside


@needs_nvcc
def test_loops_inside_loops(kernels: dict[str, Kernel]) -> None:
    inner = Step("inner", (("LDG.128", 1),))
    way = Paths(kernels["nested"]).through(Step("outer", (("STG.64", 1),), inside=(inner,)))
    assert way.loop("inner").path.count("DADD") == 2
    assert way.loop("inner").path.count("F2F.64") == 2
    passes = {name: count for name, count, _ in way.passes({"outer": 5, "inner": 7})}
    assert passes == {"": 1, "outer": 5, "inner": 35}


@needs_nvcc
@pytest.mark.parametrize(("wanted", "roots"), [((("FMUL", 3), ("MUFU", 0)), 0), ((("MUFU", 2),), 2)])
def test_branches_are_chosen(kernels: dict[str, Kernel], wanted: tuple[tuple[str, int], ...], roots: int) -> None:
    loop = Paths(kernels["either"]).through(Step("loop", wanted)).loop("loop")
    assert loop.path.count("MUFU") == roots


@needs_nvcc
def test_branches_outside_of_loops_are_chosen(kernels: dict[str, Kernel]) -> None:
    """The table that chooses among loops leads past all of them, too, unless something is to be loaded."""
    paths = Paths(kernels["squares"])
    assert not paths.through().loops
    with pytest.raises(ValueError, match=r"expected a way through no loop that does \{'LDG.32': 1\} in squares"):
        paths.through(does=(("LDG.32", 1),))


@needs_nvcc
def test_what_is_avoided(kernels: dict[str, Kernel]) -> None:
    paths = Paths(kernels["either"])
    assert paths.through(Step("loop", (("LDG.32", 1),), avoids=("MUFU",))).loop("loop").path.count("MUFU") == 0
    with pytest.raises(ValueError, match=r"expected a loop 'loop' that does \{'MUFU': 2\} in either on sm_"):
        paths.through(Step("loop", (("MUFU", 2),), avoids=("MUFU",)))


@needs_nvcc
def test_calls_are_gone_around(kernels: dict[str, Kernel]) -> None:
    """The slow part of a division is there, and not on the way."""
    kernel = kernels["quotients"]
    assert any(i.op == "CALL" for i in kernel.code)
    path = Paths(kernel).through(Step("loop", (("LDG.32", 2), ("STG.32", 1)))).loop("loop").path
    assert (path.calls, path.count("MUFU"), path.count("FCHK")) == (0, 1, 1)


@needs_nvcc
def test_integer_divisions_are_seen(kernels: dict[str, Kernel]) -> None:
    path = Paths(kernels["integer_quotients"]).through(Step("loop", (("LDG.32", 2),))).loop("loop").path
    assert sum("I2F.RP" in i.marks for i in path.code) == 1


@needs_nvcc
@pytest.mark.parametrize("times", range(1, 7))
def test_loops_behind_a_table(kernels: dict[str, Kernel], times: int) -> None:
    kernel = kernels["squares"]
    assert any(i.op == "BRX" for i in kernel.code)
    path = Paths(kernel).through(Step("loop", (("FMUL", times),))).loop("loop").path
    assert (path.count("LDG.32"), path.count("FMUL"), path.count("STG.32")) == (1, times, 1)


@needs_nvcc
def test_a_missing_loop_is_an_error(kernels: dict[str, Kernel]) -> None:
    with pytest.raises(ValueError, match=r"expected a loop 'loop' that does \{'LDG.128': 3\} in products .* got none"):
        Paths(kernels["products"]).through(Step("loop", (("LDG.128", 3),)))


def code(*lines: tuple[str, int, int | None, tuple[int, ...]]) -> tuple[Instruction, ...]:
    """Instructions with their stalls, the barriers that they set and those that they wait for."""
    bits = [
        sum(1 << 52 + barrier for barrier in waits) | (NO_BARRIER if sets is None else sets) << 46 | stall << 41
        for _, stall, sets, waits in lines
    ]
    return tuple(Instruction(16 * n, "", name, f"R{n}, [R{n}]", bits[n]) for n, (name, _, _, _) in enumerate(lines))


@pytest.mark.parametrize(
    ("lines", "clocks"),
    [
        ((("FADD", 4, None, ()), ("FADD", 5, None, ())), 9),
        # A load is waited for; what is done meanwhile is free.
        ((("LDG.E", 1, 0, ()), ("FADD", 4, None, ()), ("FADD", 2, None, (0,))), 1000 + 2),
        # Two that are in flight together cost one wait, two that follow each other two.
        ((("LDG.E", 1, 0, ()), ("LDG.E", 1, 1, ()), ("FADD", 2, None, (0, 1))), 1000 + 1 + 2),
        ((("LDG.E", 1, 0, ()), ("LDG.E", 1, 1, (0,)), ("FADD", 2, None, (1,))), 2000 + 2),
        ((("LDS", 1, 0, ()), ("FADD", 2, None, (0,))), 30 + 2),
        # A load that the next pass waits for is in flight while the rest of this one runs.
        ((("FADD", 2, None, (0,)), ("LDG.E", 1, 0, ()), ("FADD", 15, None, ())), 1000 + 2),
    ],
    ids=["stalls", "a load", "two at a time", "one after the other", "shared memory", "ahead"],
)  # fmt: skip
def test_clocks_of_a_pass(lines: tuple[tuple[str, int, int | None, tuple[int, ...]], ...], clocks: float) -> None:
    assert Way(code(*lines)).clocks({}, lambda loop, load: 1000.0, 30.0) == clocks


def test_clocks_of_loads_that_come_one_by_one() -> None:
    """Four, of 128 bytes of a warp each."""
    load, use = ("LDG.E", 1, 0, ()), ("FADD", 2, None, (0,))
    way = Way(code(load, load, load, load, use))
    assert way.clocks({}, lambda loop, load: 1000.0, 30.0, bytes_per_clock=2) == 3 * 64 + 1000 + 2


@pytest.mark.parametrize(("left", "clocks"), [(0, 1000), (1, 1000 / 2), (2, 1000 / 3)])
def test_clocks_of_copies_that_run_ahead(left: int, clocks: float) -> None:
    """A pass waits for a group of copies, but for those of the last passes, and asks for one."""
    wait, copy, end = code(("DEPBAR.LE", 4, None, ()), ("LDGSTS.E.128", 1, 0, ()), ("LDGDEPBAR", 1, None, ()))
    way = Way((replace(wait, operands=f"SB0, {left:#x}"), copy, end))
    assert way.clocks({}, lambda loop, load: 1000.0, 30.0) == pytest.approx(clocks, rel=0.02, abs=6)


def test_clocks_of_loops_inside() -> None:
    """What is loaded before a loop comes while it runs."""
    loop = Inner("loop", Way(code(("FADD", 10, None, ()))), at=1)
    way = Way(code(("LDG.E", 1, 0, ()), ("FADD", 2, None, (0,))), (loop,))
    assert way.clocks({"loop": 3}, lambda loop, load: 20.0, 0.0) == 1 + 30 + 2
    assert way.clocks({"loop": 1}, lambda loop, load: 20.0, 0.0) == 20 + 2


def test_an_unrolled_loop_runs_less_often() -> None:
    loop = Inner("loop", Way(code(("FADD", 10, None, ()))), unrolled=2)
    assert [count for _, count, _ in Way((), (loop,)).passes({"loop": 8})] == [1, 4]
