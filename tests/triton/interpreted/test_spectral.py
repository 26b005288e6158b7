# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training's kernels, by the tests of ``tests/spectral``, and what the launchers do around them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from singlepass._ops import OPS
from singlepass.reference import spectral as reference
from singlepass.triton_kernels import _table
from singlepass.triton_kernels._launch import Cache
from singlepass.triton_kernels.spectral import launchers

from ...spectral import test_ops as ops
from ...spectral import test_stochastic_rounding as rounding
from ...tolerances import assert_close, assert_same_bits

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few elements then make several programs of several tiles."""
    monkeypatch.setattr(launchers, "ALIGNED_TILES", {1024: 4, 2048: 8})
    monkeypatch.setattr(launchers, "MISALIGNED_TILES", {1024: 4})
    monkeypatch.setattr(launchers, "_buckets", Cache())
    monkeypatch.setattr(launchers, "DRAW_TILE", 2048)
    monkeypatch.setattr(launchers, "SWAP_GROUPS", 2)
    monkeypatch.setattr(launchers, "SWAP_PROGRAMS", 3)
    monkeypatch.setattr(launchers, "SCALE_PARTS", 4)
    monkeypatch.setattr(launchers, "SUM_BLOCK", (4, 32))
    monkeypatch.setattr(launchers, "LORENTZ_TILE", 1024)
    monkeypatch.setattr(launchers, "LORENTZ_WIDTHS", (32, 256))
    monkeypatch.setattr(launchers, "LORENTZ_PROGRAMS", 3)
    monkeypatch.setattr(launchers, "NUMBERS_BLOCK", 2)


@pytest.mark.parametrize(("tokens", "values"), ops.SHAPES)
def test_scale(tokens: int, values: int) -> None:
    """Dtypes take turns, so that each has small shapes and large ones."""
    turn = ops.SHAPES.index((tokens, values))
    ops.test_scale(tokens, values, DTYPES[turn % 3], "triton")


def test_scale_of_parts_of_tensors() -> None:
    ops.test_scale_takes_rows_of_larger_tensors("triton")
    ops.test_sums_do_not_depend_on_other_columns("triton")


def test_sums_do_not_depend_on_alignment() -> None:
    q, t, s = ops.random(300, 40), ops.random(300, 40, seed=1), ops.random(40, seed=2)
    shifted = torch.empty(300 * 40 + 1)[1:].view(300, 40).copy_(q)
    run = OPS["spectral_scale_"].on("triton")
    assert_same_bits(run(shifted, t, s), run(q, t, s))


@pytest.mark.parametrize(
    ("mix", "project"),
    [
        ((FLOAT32, FLOAT32, FLOAT32), False),
        ((FLOAT32, FLOAT32, FLOAT32), True),
        ((BFLOAT16, BFLOAT16, FLOAT32), True),
        ((BFLOAT16, FLOAT32, BFLOAT16), False),
        ((FLOAT16, FLOAT16, FLOAT16), True),
    ],
    ids=str,
)
def test_step(mix: ops.Mix, project: bool) -> None:
    ops.test_step(mix, project, "triton")


@each_dtype
def test_constraints(dtype: torch.dtype) -> None:
    ops.test_vectors_have_unit_length_and_values_are_not_negative(dtype, "triton")


def test_steps_skipped_and_rows_without_a_norm() -> None:
    ops.test_skipped_steps_change_nothing("triton")
    ops.test_rows_of_zeros_stay_and_nan_spreads("triton")


def test_stochastic_rounding() -> None:
    rounding.test_unbiased_and_next_to_the_truth("triton")
    rounding.test_every_element_draws_the_numbers_that_it_draws_in_eager(True, "triton")
    rounding.test_it_depends_on_seed_and_id("triton")
    rounding.test_only_bfloat16_is_rounded_so("triton")
    rounding.test_ids_that_do_not_fit_change_nothing("triton")


def make_lists(shapes: list[tuple[int, ...]], like: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """Parameters, gradients and moments, and step counts."""
    lists = [[like(ops.random(*shape, seed=10 * i + k)) for i, shape in enumerate(shapes)] for k in range(4)]
    for p, v in zip(lists[0], lists[3], strict=True):
        v.abs_()
        p.copy_(torch.nn.functional.normalize(p) if p.dim() == 2 else p.abs())
    return [*lists, [torch.full((), 2.0) for _ in shapes]]


def step(lists: list[list[Tensor]], backend: str = "triton", **options: Any) -> None:
    lr = options.pop("lr", torch.tensor(0.05, dtype=torch.float64))
    OPS["spectral_step_"].on(backend)(*lists, lr, **HYPER, **options)


def assert_steps_agree(ours: list[list[Tensor]], before: list[list[Tensor]], **options: Any) -> None:
    """One step of ``before`` in eager and in float64, against a step of ours that was made."""
    eager = [[t.clone() for t in values] for values in before]
    truth = [[t.double() for t in values] for values in before]
    step(eager, "eager", **options)
    step(truth, "eager", **options)
    for k in (0, 2, 3):
        for i, old in enumerate(before[k]):
            assert_close("spectral_step_", ours[k][i], eager[k][i], truth[k][i], before=old, label=f"{k}, {i}")
    assert ours[4] == eager[4]


@pytest.mark.parametrize("project", [False, True])
def test_misaligned_tensors_and_their_neighbours(project: bool) -> None:
    """Short rows and long ones, whose last tile is a part."""
    sentinel = 12345.0
    buffers: list[Tensor] = []

    def shifted(t: Tensor) -> Tensor:
        buffers.append(torch.full((t.numel() + 6,), sentinel))
        return buffers[-1][3:-3].view(t.shape).copy_(t)

    lists = make_lists([(2, 40), (2, 2056), (1, 1027), (1025,)], shifted)
    before = [[t.clone() for t in values] for values in lists]
    step(lists, project=project)
    assert_steps_agree(lists, before, project=project)
    for buffer in buffers:
        assert buffer[:3].eq(sentinel).all()
        assert buffer[-3:].eq(sentinel).all()


def test_aligned_and_misaligned_rows_are_the_same() -> None:
    lists = make_lists([(3, 520), (1, 4104), (1024,)], lambda t: t)
    shifted = [[torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in values] for values in lists[:4]]
    shifted.append([t.clone() for t in lists[4]])
    step(lists)
    step(shifted)
    for k in (2, 3):
        for a, b in zip(lists[k], shifted[k], strict=True):
            assert_same_bits(a, b)


def test_tables_are_kept_and_gradients_of_other_layouts_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(launchers, "make_table", lambda *args: made.append(_table.make_table(*args)) or made[-1])
    lists = make_lists([(3, 16), (5, 16), (7,), (0,), (0, 8), (8, 0)], lambda t: t)
    device_lr, dense = torch.tensor(0.03), lists[1][1]  # which stays alive: no copy is made in its place
    for tables in (3, 3, 6):
        if tables == 6:
            lists[1][1] = dense.mT.contiguous().mT
        before = [[t.clone() for t in values] for values in lists]
        step(lists, lr=device_lr)
        assert_steps_agree(lists, before, lr=device_lr)
        assert len(made) == tables
        assert not any(table.tickets.any() for table in made)
    assert [float(t) for t in lists[4]] == [5.0] * 6


def test_draws() -> None:
    ops.test_draws_are_the_reference_s("triton")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_draws_of_everything_and_of_strided_values(count: int) -> None:
    s = ops.random(count, 3).abs()[:, 1]
    for rank in {1, count}:
        options = {"ranks": [rank], "ids": [2**33 - 3], "seed": -5, "draw": 2**30, "uniform": 0.5}
        (got,) = OPS["spectral_sample"].on("triton")([s], **options)
        assert_same_bits(got, reference.sample([s], **options)[0])
    assert OPS["spectral_sample"].on("triton")([], ranks=[], ids=[], seed=0, draw=0, uniform=0.0) == []


@pytest.mark.parametrize("frozen_dtype", ops.FROZEN, ids=str)
@each_dtype
def test_swap(dtype: torch.dtype, frozen_dtype: torch.dtype) -> None:
    ops.test_swap(dtype, frozen_dtype, "triton")


def test_swap_of_many_pairs() -> None:
    ops.test_swap_of_many_pairs("triton")


@each_dtype
@pytest.mark.parametrize("shape", [(0, 3), (1, 2), (3, 5, 17), (70, 129), (5, 700)], ids=str)
def test_lorentz(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ops.test_lorentz(shape, dtype, "triton")


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda t: t[:, 3:43],
        lambda t: t[:, 8:48],
        lambda t: t.mT[:40].mT,
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(5, 64),
    ],
    ids=["offset", "aligned part", "transposed", "gaps", "expanded"],
)
def test_lorentz_of_any_strides(lay_out: Callable[[Tensor], Tensor]) -> None:
    z, grad = lay_out(ops.random(5, 64)), lay_out(ops.random(5, 64, seed=1))
    log_scale, options = torch.full((1, 1), 0.5), {"k": 1.0, "offset": 1.1}
    dense = z.clone(memory_format=torch.contiguous_format), grad.clone(memory_format=torch.contiguous_format)
    out = OPS["lorentz"].on("triton")(z, log_scale, **options)
    assert out.is_contiguous()
    torch.testing.assert_close(out, reference.lorentz(dense[0], log_scale, **options), rtol=2e-6, atol=1e-6)
    got = OPS["lorentz_backward"].on("triton")(grad, z, log_scale, **options)
    want = reference.lorentz_backward(dense[1], dense[0], log_scale, **options)
    assert got[1].shape == (1, 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_lorentz_gradients_of_no_rows() -> None:
    none = torch.empty(0, 5)
    grads = OPS["lorentz_backward"].on("triton")(none, none, torch.ones(()), k=1.0, offset=1.1)
    assert_same_bits(grads[0], none)
    assert_same_bits(grads[1], torch.zeros(()))


def break_layout(lists: list[list[Tensor]]) -> None:
    lists[0][1] = torch.zeros(8, 6).mT


def break_dimensions(lists: list[list[Tensor]]) -> None:
    for values in lists[:4]:
        values[1] = values[1].view(2, 3, 8)


def break_state(lists: list[list[Tensor]]) -> None:
    lists[2][1] = torch.zeros(48)


def break_gradient(lists: list[list[Tensor]]) -> None:
    lists[1][1] = torch.zeros(8, 6)


def break_dtype(lists: list[list[Tensor]]) -> None:
    lists[3][1] = lists[3][1].double()


def break_step(lists: list[list[Tensor]]) -> None:
    lists[4][1] = torch.zeros((), dtype=torch.int64)


def break_length(lists: list[list[Tensor]]) -> None:
    lists[2].pop()


@pytest.mark.parametrize(
    ("breakage", "contract"),
    [
        (break_layout, "contiguous matrices of vectors, or vectors of values"),
        (break_dimensions, "contiguous matrices of vectors, or vectors of values"),
        (break_state, "contiguous states of their parameters' shapes"),
        (break_gradient, "gradients of their parameters' shapes"),
        (break_dtype, "float32, bfloat16 or float16 tensors"),
        (break_step, "each step count as one float32"),
        (break_length, "2 in each list"),
    ],
)
def test_refused_steps_change_nothing(breakage: Callable[[list[list[Tensor]]], None], contract: str) -> None:
    lists = make_lists([(3, 5), (6, 8)], lambda t: t)
    breakage(lists)
    before = [[t.clone() for t in values] for values in lists]
    with pytest.raises(ValueError, match=rf"^spectral_step_: expected .*{contract}.*; got .*\. \w.*\.$"):
        step(lists)
    for new, old in zip(chain(*lists), chain(*before), strict=True):
        assert_same_bits(new, old)


ONE, ROWS = torch.ones(()), torch.ones(3, 4)
CHANGE, LORENTZ = torch.tensor([0, -1, 1]), {"k": 1.0, "offset": 1.1}
CODES = torch.zeros(3, 4, dtype=torch.int8)
DRAW = {"seed": 0, "draw": 0, "uniform": 0.5}
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("spectral_scale_", (ROWS, torch.ones(3, 5), torch.ones(4)), {}, "t of q's shape"),
    ("spectral_scale_", (ROWS, ROWS.half(), torch.ones(4)), {}, "t of q's shape and dtype"),
    ("spectral_scale_", (ROWS, ROWS, torch.ones(3)), {}, "s of shape"),
    ("spectral_scale_", (ROWS.mT, ROWS.mT, torch.ones(3)), {}, "rows of contiguous elements"),
    ("spectral_scale_", (torch.ones(4), torch.ones(4), torch.ones(4)), {}, "q of two dimensions"),
    ("spectral_sample", ([ONE],), {"ranks": [1], "ids": [0], **DRAW}, "s of one dimension"),
    ("spectral_sample", ([torch.ones(3)],), {"ranks": [4], "ids": [0], **DRAW}, "rank from 1 to its size"),
    ("spectral_sample", ([torch.ones(3)],), {"ranks": [0], "ids": [0], **DRAW}, "rank from 1 to its size"),
    ("spectral_sample", ([torch.ones(3)],), {"ranks": [1], "ids": [], **DRAW}, "a rank and an id"),
    ("spectral_sample", ([torch.ones(3)],), {"ranks": [1], "ids": [0], **DRAW, "uniform": 1.5}, "uniform in"),
    ("spectral_swap_", ([ROWS], [torch.ones(3, 5)], [ONE], [CHANGE]), {}, "rows of equal length"),
    ("spectral_swap_", ([ROWS], [ROWS.mT], [ONE], [CHANGE]), {}, "rows of equal length"),
    ("spectral_swap_", ([ROWS], [ROWS], [ONE], [CHANGE.int()]), {}, "exchange as 3 of int64"),
    ("spectral_swap_", ([ROWS], [ROWS], [ONE], [CHANGE[:2]]), {}, "exchange as 3 of int64"),
    ("spectral_swap_", ([ROWS], [CODES], [torch.ones(3, 2)], [CHANGE]), {}, "float32 scales of shape"),
    ("spectral_swap_", ([CODES], [CODES], [torch.ones(3, 1)], [CHANGE]), {}, "float32, bfloat16 or float16"),
    ("spectral_swap_", ([ROWS], [ROWS], [], [CHANGE]), {}, "lists of 1"),
    ("lorentz", (torch.ones(3, 1), ONE), LORENTZ, "two elements"),
    ("lorentz", (ROWS, torch.ones(2)), LORENTZ, "log_scale as one element"),
    ("lorentz_backward", (ROWS.half(), ROWS, ONE), LORENTZ, "grad of z's shape"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "contract"), REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_refusals(name: str, arguments: tuple[Any, ...], options: dict[str, Any], contract: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*{contract}.*; got .*\. \w.*\.$"):
        OPS[name].on("triton")(*arguments, **options)
