# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels and launchers on the CPU, and the C++ engine, against each optimizer's equations in float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from .arrays import DTYPES, assert_same_bits, decode, encode
from .bounded import Bounded
from .steps import Dtypes, Run, State, with_representable_eps
from .truth import CASES, Case

STEPS = 10
MIXES = [
    Dtypes(param, grad, state) for param in DTYPES for grad in DTYPES for state in dict.fromkeys(["float32", param])
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def test_every_rule_has_a_case(core: ModuleType) -> None:
    assert {case.rule for case in CASES} == set(core.rules())


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@each_case
def test_each_step_is_right_and_both_engines_agree(core: ModuleType, case: Case, dtypes: Dtypes) -> None:
    case = with_representable_eps(case, dtypes)
    core.set_seed(1)
    simt = Run(core, case, "simt", dtypes)
    cpu = Run(core, case, "cpu", dtypes, workers=2)
    for step in range(STEPS):
        before = simt.exact()
        simt.step()
        cpu.step()
        simt.check(simt.expected(before))
        assert_same_bits(simt.bits(), cpu.bits())
        assert simt.stepper.steps() == cpu.stepper.steps() == [step + 1.0] * len(simt.sizes)


@each_case
def test_ten_steps_stay_on_the_float64_trajectory(core: ModuleType, case: Case) -> None:
    run = Run(core, case, "simt", sizes=[8209, 3], chunk=1024)
    trajectory = run.exact()
    for _ in range(STEPS):
        run.step()
        trajectory = run.expected(trajectory)
    run.check(trajectory)


@each_case
def test_a_tensor_of_several_chunks_of_the_default_size(core: ModuleType, case: Case) -> None:
    simt, cpu = (Run(core, case, device, sizes=[65537], threads=256, chunk=16384) for device in ("simt", "cpu"))
    for _ in range(2):
        before = simt.exact()
        simt.step()
        cpu.step()
    simt.check(simt.expected(before))
    assert_same_bits(simt.bits(), cpu.bits())


@each_case
def test_a_learning_rate_that_is_slightly_wrong_is_noticed(core: ModuleType, case: Case) -> None:
    run = Run(core, case, "simt", sizes=[1000])
    for _ in range(6):  # AdaBelief's rectified steps begin with the sixth
        run.step()
    before = run.exact()
    run.step(lr=case.lr * (1.0 + 1e-5))
    with pytest.raises(AssertionError, match="elements are wrong"):
        run.check(run.expected(before))


@each_case
def test_schedules_and_launch_shapes_do_not_matter(core: ModuleType, case: Case) -> None:
    norms = core.rules()[case.rule]["norms"]
    dtypes = Dtypes("bfloat16", "float32", "float32")
    reference: dict[object, list[np.ndarray]] = {}
    for seed, (threads, chunk) in enumerate([(256, 512), (256, 512), (32, 8), (64, 264), (128, 4096), (32, 8)]):
        core.set_seed(seed)
        run = Run(core, case, "simt", dtypes, threads=threads, chunk=chunk)
        for _ in range(3):
            run.step(seed=7, stochastic_rounding=True)
        # The order in which norms are summed follows the shape, never the schedule.
        bits = reference.setdefault((threads, chunk) if norms else "any", run.bits())
        assert_same_bits(run.bits(), bits)


# In elements: 8 bytes from the alignment that vectors need, in one kind of tensor alone; and all odd.
@pytest.mark.parametrize("misalignment", [(2, 0, 0), (4, 0, 0), (0, 2, 0), (0, 4, 0), (0, 0, 2), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtypes", [Dtypes(), Dtypes("bfloat16", "bfloat16"), Dtypes("float16", "float32")], ids=str)
@each_case
def test_misaligned_tensors(core: ModuleType, case: Case, dtypes: Dtypes, misalignment: tuple[int, int, int]) -> None:
    for device in ("simt", "cpu"):
        run = Run(core, case, device, dtypes, misalignment=misalignment)
        for _ in range(2):
            before = run.exact()
            run.step()
            run.check(run.expected(before))


@each_case
def test_gradients_are_unscaled_and_negated(core: ModuleType, case: Case) -> None:
    for device in ("simt", "cpu"):
        run = Run(core, case, device)
        for scale, maximize in [(3.0, False), (None, True), (0.7, True)]:
            before = run.exact()
            run.step(grad_scale=scale, maximize=maximize)
            run.check(run.expected(before, (-1.0 if maximize else 1.0) / (scale or 1.0)))


@each_case
def test_the_learning_rate_may_stand_in_device_memory(core: ModuleType, case: Case) -> None:
    for device in ("simt", "cpu"):
        by_value, by_address = Run(core, case, device), Run(core, case, device)
        for _ in range(2):
            by_value.step(lr=float(np.float32(case.lr)))
            by_address.step(lr=case.lr, lr_on_device=True)
        assert_same_bits(by_value.bits(), by_address.bits())


@each_case
def test_a_step_with_found_inf_changes_nothing(core: ModuleType, case: Case) -> None:
    for device in ("simt", "cpu"):
        skipping, plain = Run(core, case, device), Run(core, case, device)
        skipping.step(found_inf=0.0)
        plain.step()
        before = skipping.bits()
        skipping.step(found_inf=1.0)
        plain.stepper.set_grads(skipping.stepper.grads())
        assert_same_bits(skipping.bits(), before)
        assert skipping.stepper.steps() == [1.0] * len(skipping.sizes)
        # And the next step is the second.
        for run in (skipping, plain):
            run.stepper.step(tuple(case.hyper.values()), lr=case.lr)
        assert_same_bits(skipping.bits(), plain.bits())


@pytest.mark.parametrize("case", [case for case in CASES if case.label == ""], ids=lambda case: case.id)
def test_many_small_tensors_need_one_launch(core: ModuleType, case: Case) -> None:
    sizes = [i % 13 for i in range(300)]
    simt, cpu = Run(core, case, "simt", sizes=sizes, threads=32), Run(core, case, "cpu", sizes=sizes)
    before = core.launches()
    for _ in range(2):
        simt.step()
        cpu.step()
    assert core.launches() - before == (4 if core.rules()[case.rule]["norms"] else 2)
    assert_same_bits(simt.bits(), cpu.bits())


class TestStochasticRounding:
    """bfloat16 parameters; SGD-SaI at its first step adds lr * scale * g, so the exact result is known."""

    hyper = (0.9, 0.0)  # momentum, weight decay
    n = 65537

    def rounded_down(
        self, core: ModuleType, device: str, *, seed: int, steps: int = 1, tensors: int = 1
    ) -> list[np.ndarray]:
        """Which elements of 1 - 2^-10, a quarter of the way from 1 to its neighbour below, went down."""
        stepper = core.Stepper(
            "sgdsai",
            device,
            params=[encode(np.ones(self.n), "bfloat16")] * tensors,
            grads=[np.ones(self.n, np.float32)] * tensors,
            states=[[np.zeros(self.n, np.float32)]] * tensors,
            scales=[1.0] * tensors,
            ids=list(range(tensors)),
            threads=64,
            chunk=8192,
            workers=1,
            misalignment=(0, 0, 0),
        )
        for _ in range(steps - 1):
            stepper.step(self.hyper, lr=0.0, seed=seed, stochastic_rounding=True)
        stepper.step(self.hyper, lr=2.0**-10, seed=seed, stochastic_rounding=True)
        values = [decode(p) for p in stepper.params()]
        assert all(np.isin(v, [1.0, 1.0 - 2.0**-8]).all() for v in values)
        return [v < 1.0 for v in values]

    def test_it_is_unbiased(self, core: ModuleType) -> None:
        deviation = np.sqrt(0.25 * 0.75 / self.n)
        for seed in range(3):
            (down,) = self.rounded_down(core, "simt", seed=seed)
            assert abs(down.mean() - 0.25) < 5.0 * deviation

    def test_it_depends_on_seed_tensor_and_step_and_on_nothing_else(self, core: ModuleType) -> None:
        core.set_seed(0)
        first, second = self.rounded_down(core, "simt", seed=1, tensors=2)
        draws = [
            first,
            second,
            *self.rounded_down(core, "simt", seed=2),
            *self.rounded_down(core, "simt", seed=1, steps=2),
        ]
        # Independent draws agree on 0.25^2 + 0.75^2 of the elements.
        for i, a in enumerate(draws):
            for b in draws[:i]:
                assert abs((a == b).mean() - 0.625) < 5.0 * np.sqrt(0.625 * 0.375 / self.n)
        core.set_seed(5)
        assert (self.rounded_down(core, "simt", seed=1)[0] == first).all()
        assert (self.rounded_down(core, "cpu", seed=1)[0] == first).all()

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
    def test_results_are_neighbours_of_the_truth_on_both_engines(self, core: ModuleType, case: Case) -> None:
        dtypes = Dtypes("bfloat16", "bfloat16", "float32")
        simt, cpu = Run(core, case, "simt", dtypes), Run(core, case, "cpu", dtypes)
        for _ in range(STEPS):
            before = simt.exact()
            for run in (simt, cpu):
                run.step(seed=3, stochastic_rounding=True)
            assert_same_bits(simt.bits(), cpu.bits())
            expected = simt.expected(before)
            # A whole ulp in place of the half that rounding to the nearest keeps.
            p = expected.param
            half_ulp = p.stored("bfloat16").error - p.error
            simt.check(State(Bounded(p.value, p.error + half_ulp / 2.0), expected.states))


def test_wrong_arguments_are_refused(core: ModuleType) -> None:
    good = {
        "params": [np.zeros(3, np.float32)],
        "grads": [np.zeros(3, np.float32)],
        "states": [[np.zeros(3, np.float32)]],
        "scales": [],
        "ids": [0],
        "threads": 32,
        "chunk": 8,
        "workers": 1,
        "misalignment": (0, 0, 0),
    }
    core.Stepper("lion", "simt", **good).step((0.9, 0.99, 0.0), lr=0.1)
    for wrong in (
        {"grads": [np.zeros(4, np.float32)]},
        {"grads": []},
        {"states": [[]]},
        {"states": [[np.zeros(2, np.float32)]]},
        {"params": [np.zeros(3, np.float64)]},
        {"scales": [1.0]},
        {"workers": 0},
    ):
        with pytest.raises((ValueError, TypeError)):
            core.Stepper("lion", "simt", **(good | wrong))
    with pytest.raises(ValueError, match="expected a rule"):
        core.Stepper("nadam", "simt", **good)
    with pytest.raises(ValueError, match="expected device"):
        core.Stepper("lion", "cuda", **good)
    with pytest.raises(ValueError, match="expected 3 hyperparameters; got 2"):
        core.Stepper("lion", "simt", **good).step((0.9, 0.99), lr=0.1)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        core.Stepper("lion", "simt", **(good | {"threads": 2048})).step((0.9, 0.99, 0.0), lr=0.1)
