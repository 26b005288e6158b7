# SPDX-License-Identifier: Apache-2.0
"""What the engine does around a rule: options, layouts, alignment, dtypes side by side, tables, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import singlepass.optim
from singlepass.triton_kernels import _table
from singlepass.triton_kernels.optim import launchers as optim

from ...optim import test_phases, test_stochastic_rounding
from ...optim.steps import Mix, Place, call, make_tensors, rule_of, set_grads, step_and_check
from ...simt.truth import CASES, Case
from ...tolerances import assert_same_bits

PLACE = Place("triton", "cpu")
BY_ID = {case.id: case for case in CASES}
ADAMW, LAMB, LION = BY_ID["adamw"], BY_ID["lamb"], BY_ID["lion"]


def run(backend: str, case: Case, tensors: Any, **options: Any) -> None:
    call(rule_of(case).on(backend), case, tensors, **options)


def assert_all_same(a: Any, b: Any) -> None:
    for x, y in zip(a.written(), b.written(), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("case", [ADAMW, LAMB], ids=lambda case: case.id)
def test_a_skipped_step_changes_nothing(case: Case) -> None:
    tensors = make_tensors(case, [(7,), (2, 777)], Mix())
    before = tensors.clone()
    run("triton", case, tensors, found_inf=torch.tensor([1.0]))
    assert_all_same(tensors, before)
    run("triton", case, tensors, found_inf=torch.tensor([0.0]))
    run("native", case, before)
    assert_all_same(tensors, before)


@pytest.mark.parametrize("case", [ADAMW, LAMB], ids=lambda case: case.id)
def test_options_as_in_cpp(case: Case) -> None:
    ours = make_tensors(case, [(7,), (2, 777)], Mix())
    cpp = ours.clone()
    options = {"maximize": True, "grad_scale": torch.tensor([3.0]), "lr": torch.tensor(0.007)}
    for _ in range(2):
        run("triton", case, ours, **options)
        run("native", case, cpp, **options)
        assert_all_same(ours, cpp)


def test_lr_is_exact_by_value_and_float32_on_the_device() -> None:
    exact, rounded, cpp = (make_tensors(LION, [(9,)], Mix()) for _ in range(3))
    run("triton", LION, exact, lr=torch.tensor(0.1, dtype=torch.float64))
    run("native", LION, cpp, lr=torch.tensor(0.1, dtype=torch.float64))
    assert_all_same(exact, cpp)
    run("triton", LION, rounded, lr=torch.tensor(0.1, dtype=torch.float32))
    run("native", LION, cpp := make_tensors(LION, [(9,)], Mix()), lr=torch.tensor(0.1, dtype=torch.float32))
    assert_all_same(rounded, cpp)


def test_without_steps() -> None:
    ours = make_tensors(LION, [(9,)], Mix())
    ours.steps = []
    cpp = ours.clone()
    run("triton", LION, ours)
    run("native", LION, cpp)
    assert_all_same(ours, cpp)


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("mix", [Mix(), Mix(torch.bfloat16, torch.bfloat16)], ids=str)
def test_misaligned_tensors_and_their_neighbours(mix: Mix, offset: int) -> None:
    sentinel = 12345.0
    buffers: list[Tensor] = []

    def shifted(t: Tensor) -> Tensor:
        buffer = torch.full((t.numel() + 2 * offset,), sentinel, dtype=t.dtype)
        buffers.append(buffer)
        return buffer[offset : offset + t.numel()].view(t.shape).copy_(t)

    ours = make_tensors(ADAMW, [(5,), (1554,)], mix, like=shifted)
    cpp = make_tensors(ADAMW, [(5,), (1554,)], mix)
    for _ in range(2):
        run("triton", ADAMW, ours)
        run("native", ADAMW, cpp)
    assert_all_same(ours, cpp)
    for buffer in buffers:
        margin = torch.cat((buffer[:offset], buffer[-offset:]))
        assert torch.equal(margin, torch.full_like(margin, sentinel))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    tensors = make_tensors(ADAMW, [(2, 3, 4, 5), (4, 3, 1, 1)], Mix(), like=LAYOUTS[layout])
    strides = [p.stride() for p in tensors.params]
    for t in range(1, 3):
        set_grads(tensors, t)
        step_and_check(PLACE, ADAMW, tensors, t)
    assert [p.stride() for p in tensors.params] == strides


@pytest.mark.parametrize("case", [ADAMW, LAMB], ids=lambda case: case.id)
def test_gradients_of_other_layouts(case: Case) -> None:
    tensors = make_tensors(case, [(6, 8), (2, 3, 4, 5)], Mix())
    for t in range(1, 3):
        set_grads(tensors, t)
        strided = torch.zeros(6, 16)[:, ::2].copy_(tensors.grads[0])
        tensors.grads = [strided, tensors.grads[1].to(memory_format=torch.channels_last)]
        step_and_check(PLACE, case, tensors, t)


def test_dtypes_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [make_tensors(LAMB, [(7,), (9,)], mix) for mix in (Mix(), Mix(torch.bfloat16), Mix(torch.float16))]
    alone = [part.clone() for part in parts]
    order = [0, 2, 4, 1, 3, 5]

    def together(lists: list[list[Tensor]]) -> list[Tensor]:
        flat = [t for tensors in lists for t in tensors]
        return [flat[i] for i in order]

    all_at_once = parts[0].clone()
    all_at_once.params = together([part.params for part in parts])
    all_at_once.grads = together([part.grads for part in parts])
    all_at_once.states = [together([part.states[k] for part in parts]) for k in range(2)]
    all_at_once.steps = together([part.steps for part in parts])
    run("triton", LAMB, all_at_once)
    for part, expected in zip(parts, alone, strict=True):
        run("triton", LAMB, expected)
        assert_all_same(part, expected)


@pytest.mark.parametrize("case", [LAMB, BY_ID["lars"]], ids=lambda case: case.id)
def test_phases_apart(case: Case) -> None:
    shapes = [(2, 777), (0,), (7,)]
    options = {"scale": 3.0, "maximize": True, "seed": 7}
    test_phases.test_two_phases_have_the_bits_of_a_whole_step(case, options, PLACE, shapes)
    test_phases.test_norms_in_float64(case, PLACE, shapes)
    test_phases.test_a_skipped_step_has_zeros_for_norms_and_changes_nothing(case, PLACE, shapes)
    test_phases.test_norms_that_do_not_fit_are_refused(case, PLACE)
    test_phases.test_no_parameters_have_no_norms(case, PLACE)


@pytest.mark.parametrize("offset", range(18))
def test_shards_draw_what_their_parts_of_the_whole_draw(offset: int) -> None:
    test_stochastic_rounding.test_a_shard_draws_what_its_part_of_the_whole_draws(offset, PLACE)


@pytest.mark.parametrize("offset", [2**35 - 3, 2**62 + 1])
def test_offsets_of_huge_tensors(offset: int) -> None:
    test_stochastic_rounding.test_offsets_of_huge_tensors_as_in_eager(offset, PLACE)


def test_offsets_that_do_not_fit_are_refused() -> None:
    test_stochastic_rounding.test_offsets_that_do_not_fit_are_refused(PLACE)


def test_tables_are_kept_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(optim, "make_table", lambda *args: made.append(_table.make_table(*args)) or made[-1])
    ours = make_tensors(ADAMW, [(7,), (1554,)], Mix())
    cpp = ours.clone()

    def step(tables: int) -> None:
        run("triton", ADAMW, ours)
        run("native", ADAMW, cpp)
        assert_all_same(ours, cpp)
        assert len(made) == tables
        assert not made[-1].tickets.any()

    step(tables=1)
    step(tables=1)
    ours.grads[1] = ours.grads[1].clone()
    step(tables=2)
    # The same addresses with other contents: a float32 turns into a float16 of the same place.
    ours.grads[0] = ours.grads[0].view(torch.float16)[:7].fill_(0.5)
    cpp.grads[0] = ours.grads[0].clone()
    step(tables=4)


def test_an_upload_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63)]
    monkeypatch.setattr(_table, "is_capturing", lambda device: True)
    assert _table.upload(words, torch.device("cpu")).tolist() == words


def break_shape(tensors: Any) -> None:
    tensors.grads[1] = torch.zeros(3)


def break_state_layout(tensors: Any) -> None:
    tensors.states[0][1] = torch.zeros(8, 6).mT


def break_param_layout(tensors: Any) -> None:
    tensors.params[1] = torch.zeros(6, 16)[:, ::2]


def break_dtype(tensors: Any) -> None:
    tensors.states[0][1] = torch.zeros(6, 8, dtype=torch.float64)


def break_length(tensors: Any) -> None:
    tensors.steps.pop()


def break_missing_state(tensors: Any) -> None:
    tensors.states[1] = []


def break_step(tensors: Any) -> None:
    tensors.steps[1] = torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize(
    ("breakage", "contract"),
    [
        (break_shape, "gradients of their parameters' shapes"),
        (break_state_layout, "states laid out like their parameters"),
        (break_param_layout, "dense parameters"),
        (break_dtype, "float32, bfloat16 or float16 tensors"),
        (break_length, "2 in each list"),
        (break_missing_state, "2 in each list"),
        (break_step, "each step count and scale as one float32"),
    ],
)
def test_refusals_change_nothing(breakage: Callable[[Any], None], contract: str) -> None:
    tensors = make_tensors(ADAMW, [(5,), (6, 8)], Mix())
    breakage(tensors)
    before = tensors.clone()
    with pytest.raises(ValueError, match=rf"^adamw_step_: expected .*{contract}.*; got .*\. \w.*\.$"):
        run("triton", ADAMW, tensors)
    assert_all_same(tensors, before)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_scalars_of_another_dtype(name: str) -> None:
    tensors = make_tensors(ADAMW, [(5,)], Mix())
    with pytest.raises(ValueError, match=rf"^adamw_step_: expected {name} as one float32 on cpu; got torch\.float64"):
        run("triton", ADAMW, tensors, **{name: torch.ones((), dtype=torch.float64)})


@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", singlepass.optim._OPTIMIZERS)
def test_optimizers_end_to_end(name: str, rounding: bool) -> None:
    results = []
    for backend in ("native", "triton"):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if rounding else torch.float32
        params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((33, 17), (5,), (1,))]
        optimizer = getattr(singlepass.optim, name)(params, backend=backend, stochastic_rounding=rounding)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(params)
    for ours, cpp in zip(*results, strict=True):
        assert_same_bits(ours, cpp)
