# SPDX-License-Identifier: Apache-2.0
"""Steps that keep rows at unit length, as CUDA kernels on the CPU and in C++, against float64."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from .arrays import DTYPES, assert_same_bits, decode, encode
from .spectral import Step, Tensors, options, unit_rows
from .steps import Dtypes, assert_within

each_device = pytest.mark.parametrize("device", ["simt", "cpu"])

# Rows and columns, or values alone.
SHAPES: list[tuple[int, ...]] = [(3, columns) for columns in (1, 7, 8, 31, 33, 127, 129, 1000)]
SHAPES += [(0, 8), (5, 0), (1, 16), (40, 24), (0,), (1,), (7,), (129,), (1000,)]
MIXES = [
    Dtypes(param, grad, state) for param in DTYPES for grad in DTYPES for state in dict.fromkeys(["float32", param])
]
FLOATS = Dtypes()
# Threads of a block, elements of a chunk, elements of a row in shared memory.
LAUNCHES = [(64, 256, 11264), (64, 256, 11264), (32, 8, 11264), (256, 4096, 11264), (96, 100, 8), (64, 64, 0)]


def with_representable_eps(step: Step, dtypes: Dtypes) -> Step:
    """float16 has no squares of small gradients: with a tiny eps nothing is promised of them but overflow."""
    return replace(step, eps=0.1) if dtypes.state == "float16" else step


def tensors(shapes: list[tuple[int, ...]], dtypes: Dtypes = FLOATS, seed: int = 0) -> Tensors:
    """Unit rows and values of any sign, in the middle of their training."""
    rng = np.random.default_rng(seed)

    def drawn(size: float, dtype: str) -> list[np.ndarray]:
        return [encode(size * rng.standard_normal(shape), dtype) for shape in shapes]

    params = [
        encode(unit_rows(rng, *shape) if len(shape) == 2 else rng.standard_normal(shape), dtypes.param)
        for shape in shapes
    ]
    squares = [encode(np.abs(decode(x)), dtypes.state) for x in drawn(1e-2, dtypes.state)]
    steps = [float(i % 3) for i in range(len(shapes))]
    return Tensors(params, drawn(1.0, dtypes.grad), drawn(0.1, dtypes.state), squares, steps)


class Expected:
    """What a step should make of tensors."""

    def __init__(self, before: Tensors, step: Step, dtypes: Dtypes = FLOATS) -> None:
        self.kinds = {"parameter": dtypes.param, "mean": dtypes.state, "square": dtypes.state}
        self.bounds = [before.expected(i, step) for i in range(len(before.params))]
        self.steps = [count + 1.0 for count in before.steps]

    def check(self, after: Tensors) -> None:
        found = zip(after.params, after.exp_avg, after.exp_avg_sq, strict=True)
        for arrays, bounds in zip(found, self.bounds, strict=True):
            for array, bound, (name, kind) in zip(arrays, bounds, self.kinds.items(), strict=True):
                assert_within(decode(array).ravel(), bound, kind, f"{array.shape}: {name}")
        assert after.steps == self.steps


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_each_step_is_right_in_every_mix_of_dtypes(core: ModuleType, dtypes: Dtypes) -> None:
    core.set_seed(2)
    step = with_representable_eps(Step(project=MIXES.index(dtypes) % 2 == 1), dtypes)
    before = tensors(SHAPES, dtypes)
    expected = Expected(before, step, dtypes)
    for place in (options(core, "simt"), options(core, "simt", misalignment=1), options(core, "cpu")):
        expected.check(before.run(core, step, place))


@each_device
@pytest.mark.parametrize("columns", [4096, 11264, 11271, 16384])
def test_long_rows(core: ModuleType, device: str, columns: int) -> None:
    """Also those of which shared memory holds a part."""
    for dtypes in (FLOATS, Dtypes("bfloat16", "bfloat16", "float32")):
        before = tensors([(2, columns), (9,)], dtypes)
        step = Step(project=True)
        Expected(before, step, dtypes).check(before.run(core, step, options(core, device, threads=256)))


@pytest.mark.parametrize("project", [False, True])
def test_launch_shapes_do_not_matter_but_for_the_sums(core: ModuleType, project: bool) -> None:
    """A sum in double precision that differs in its last bits may, seldom, turn a bit of a row in float32."""
    dtypes = Dtypes("float32", "bfloat16", "float32")
    before, step = tensors(SHAPES, dtypes), Step(project=project)
    expected, results = Expected(before, step, dtypes), []
    for seed, (threads, chunk, held) in enumerate(LAUNCHES):
        core.set_seed(seed)
        after = before.run(core, step, options(core, "simt", threads=threads, chunk=chunk, held=held))
        expected.check(after)
        results.append(after.bits())
    assert_same_bits(results[0], results[1])
    for other in results[2:]:
        off = [np.abs(decode(a) - decode(b)).max(initial=0.0) for a, b in zip(results[0], other, strict=True)]
        assert max(off) <= 2.0**-23


def test_no_schedule_changes_a_bit(core: ModuleType) -> None:
    """Whichever block comes last counts the step that all of them read; three steps share one table."""
    before = tensors([(40, 24), (300,), (5, 200)], Dtypes("bfloat16", "float32", "float32"))
    results = []
    for seed in range(10):
        core.set_seed(seed)
        after = before.run(core, Step(project=True), options(core, "simt"), repeats=3)
        assert after.steps == [count + 3.0 for count in before.steps]
        results.append(after.bits())
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_threads_do_not_matter(core: ModuleType) -> None:
    before = tensors(SHAPES, Dtypes("float32", "float16", "float32"))
    results = [before.run(core, Step(project=True), options(core, "cpu", workers=n)).bits() for n in (1, 2, 5)]
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_states_and_values_have_the_same_bits_on_both_engines(core: ModuleType) -> None:
    """Rows are only as equal as sums in double precision are in other orders: to a bit of float32."""
    before = tensors(SHAPES)
    one, other = (before.run(core, Step(), options(core, device)) for device in ("simt", "cpu"))
    assert_same_bits([*one.exp_avg, *one.exp_avg_sq], [*other.exp_avg, *other.exp_avg_sq])
    values = [i for i, shape in enumerate(SHAPES) if len(shape) == 1]
    assert_same_bits([one.params[i] for i in values], [other.params[i] for i in values])


@each_device
def test_gradients_are_unscaled_and_negated(core: ModuleType, device: str) -> None:
    before = tensors([(3, 33), (3, 40), (50,)])
    for grad_scale, maximize in ((3.0, False), (None, True), (0.7, True)):
        for project in (False, True):
            step = Step(grad_scale=grad_scale, maximize=maximize, project=project)
            Expected(before, step).check(before.run(core, step, options(core, device)))


@each_device
def test_a_step_with_found_inf_changes_nothing(core: ModuleType, device: str) -> None:
    before = tensors([(3, 33), (50,), (0, 8)])
    place = options(core, device)
    after = before.run(core, Step(found_inf=1.0), place, repeats=2)
    assert_same_bits(after.bits(), before.bits())
    assert after.steps == before.steps
    taken = [before.run(core, Step(found_inf=found), place).bits() for found in (0.0, None)]
    assert_same_bits(*taken)


@each_device
def test_the_learning_rate_may_stand_in_device_memory(core: ModuleType, device: str) -> None:
    before, lr = tensors([(3, 33), (50,)]), float(np.float32(1e-2))
    results = [before.run(core, Step(lr=lr, lr_on_device=given), options(core, device)) for given in (False, True)]
    assert_same_bits(results[0].bits(), results[1].bits())


def test_a_learning_rate_that_is_slightly_wrong_is_noticed(core: ModuleType) -> None:
    before = tensors([(3, 1000)])
    after = before.run(core, Step(lr=1e-2 * (1.0 + 1e-4)), options(core, "simt"))
    with pytest.raises(AssertionError, match="elements are wrong"):
        Expected(before, Step()).check(after)


@each_device
def test_rows_have_unit_length_and_values_no_sign(core: ModuleType, device: str) -> None:
    before = tensors([(40, 65), (200,)])
    after = before.run(core, Step(), options(core, device), repeats=4)
    np.testing.assert_allclose(np.linalg.norm(decode(after.params[0]), axis=1), 1.0, rtol=2e-7)
    assert decode(after.params[1]).min() == 0.0
    assert (decode(after.params[1]) > 0.0).any()


@each_device
def test_rows_of_zeros_stay_and_what_is_not_finite_stays_in_its_row(core: ModuleType, device: str) -> None:
    place = options(core, device)
    before = tensors([(6, 40), (6, 33)])
    for i in range(2):
        for array in (before.params[i], before.grads[i], before.exp_avg[i], before.exp_avg_sq[i]):
            array[1] = 0.0
    after = before.run(core, Step(), place)
    assert all(not decode(after.params[i])[1].any() for i in range(2))
    for i in range(2):
        before.grads[i][2, 3], before.grads[i][4, 0] = np.nan, np.inf
    broken = before.run(core, Step(), place)
    for whole, part in zip(after.params, broken.params, strict=True):
        others = [0, 1, 3, 5]
        assert_same_bits([part[others]], [whole[others]])
        assert np.isnan(part[2, 3])
        assert not np.isfinite(part[4]).all()


def test_one_launch_for_all_tensors(core: ModuleType) -> None:
    before = tensors([(i % 5, 8 + i % 7) if i % 3 else (i,) for i in range(120)])
    place: Any = options(core, "simt", threads=32)
    once, twice = core.launches(), 0
    before.run(core, Step(), place)
    once = core.launches() - once
    twice = core.launches()
    after = before.run(core, Step(), place, repeats=2)
    assert core.launches() - twice == once + 1
    cpu = before.run(core, Step(), options(core, "cpu"), repeats=2)
    assert after.steps == cpu.steps


@pytest.mark.parametrize("project", [False, True])
def test_stochastic_rounding_draws_the_same_numbers_on_both_engines(core: ModuleType, project: bool) -> None:
    """However tensors are cut and aligned. Sums in other orders turn few roundings, wrong numbers a third of all."""
    dtypes = Dtypes("bfloat16", "bfloat16", "float32")
    before = tensors([*SHAPES, (3, 12), (2, 4100)], dtypes)
    step = Step(lr=1e-3, project=project, seed=3)
    cpu = before.run(core, step, options(core, "cpu"))
    placements = [{"misalignment": 4}, {"misalignment": 1}]
    placements += [{"threads": threads, "chunk": chunk, "held": held} for threads, chunk, held in LAUNCHES]
    for placement in placements:
        simt = before.run(core, step, options(core, "simt", **placement))
        for ours, theirs in zip(simt.params, cpu.params, strict=True):
            off = (ours != theirs).sum()
            assert off == 0 if ours.ndim == 1 else off <= 0.01 * ours.size + 1


def test_stochastic_rounding_is_unbiased(core: ModuleType) -> None:
    before = tensors([(40, 65), (2000,)], Dtypes("bfloat16", "bfloat16", "float32"))
    for i in range(2):
        before.exp_avg[i][...] = 0.0
    step = Step(lr=1e-3)
    exact = [before.expected(i, step)[0].value for i in range(2)]
    seeds = 20
    runs = [before.run(core, replace(step, seed=seed), options(core, "simt")) for seed in range(seeds)]
    for i, truth in enumerate(exact):
        found = np.stack([decode(after.params[i]).ravel() for after in runs])
        spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(truth), 2.0**-126))) - 7)
        assert (np.abs(found - truth) <= spacing + 1e-5 * np.abs(truth)).all()
        deviation = np.sqrt(0.25 * np.square(spacing).sum() / seeds)
        assert abs((found.mean(0) - truth).sum()) <= 5.0 * deviation + 1e-6 * np.abs(truth).sum()
        assert (found.min(0) < found.max(0)).any()
