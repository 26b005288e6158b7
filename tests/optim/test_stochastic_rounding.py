# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of bfloat16 parameters: unbiased, reproducible, resumable, the same on every backend."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from singlepass import optim
from singlepass.reference.philox import philox4x32, stochastic_bfloat16

from ..simt.truth import CASES, Case
from ..tolerances import TOLERANCES, assert_same_bits, same_bits
from .steps import (
    Mix,
    Place,
    Tensors,
    call,
    each_case,
    each_kernel,
    each_place,
    make_tensors,
    normal,
    rule_of,
    set_grads,
)
from .trajectory import give_grads, make_optimizer, make_params, train

BFLOAT16 = Mix(torch.bfloat16, torch.bfloat16)
SIZES = [(1,), (7,), (8,), (9, 13), (1025,), (32777,)]
SAME_BITS = [case for case in CASES if TOLERANCES[rule_of(case).name].n == 0]


def one_step(p: Tensor, lr: float, place: Place, seed: int = 0, first_id: int = 0, offset: int | None = None) -> Tensor:
    """What p becomes when every element goes down by lr, rounded stochastically."""
    p = p.clone()
    case = next(case for case in CASES if case.rule == "lion")
    states, steps = [torch.zeros_like(p, dtype=torch.float32)], [torch.zeros((), device=p.device)]
    hyper = case.hyper | {"weight_decay": 0.0}
    lr_tensor = torch.tensor(lr, dtype=torch.float64)
    place.function("lion_step_")(
        [p],
        [torch.ones_like(p)],
        states,
        steps,
        lr_tensor,
        **hyper,
        seed=seed,
        ids=[first_id],
        offsets=[] if offset is None else [offset],
    )
    return p


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0x00000000] * 4, [0x00000000] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits-of-pi"],
)
def test_philox_gives_its_authors_numbers(counter: list[int], key: list[int], expected: list[int]) -> None:
    def signed(low: int, high: int) -> int:
        return int.from_bytes((low | high << 32).to_bytes(8, "little"), "little", signed=True)

    low, high = (torch.tensor([signed(*counter[k : k + 2])]) for k in (0, 2))
    words = philox4x32(key[0] | key[1] << 32, low, high)
    assert [int(word) for word in words] == expected


@each_place
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_rounds_up_as_often_as_the_fraction_says(fraction: float, place: Place) -> None:
    n = 1 << 16
    spacing = 2.0**-8  # of bfloat16 below one
    p = one_step(torch.ones(n, dtype=torch.bfloat16, device=place.device), fraction * spacing, place).float()
    assert set(p.unique().tolist()) == {1.0, 1.0 - spacing}
    down = (p < 1.0).float().mean().item()
    assert abs(down - fraction) < 5.0 * math.sqrt(fraction * (1.0 - fraction) / n)


@each_place
def test_unbiased_over_seeds_for_every_element(place: Place) -> None:
    seeds, n = 400, 64
    start = torch.linspace(-2.0, 2.0, n, device=place.device).to(torch.bfloat16)
    lr = 1e-3
    outcomes = torch.stack([one_step(start, lr, place, seed).double() for seed in range(seeds)])
    exact = start.double() - lr
    spacing = outcomes.max(0).values - outcomes.min(0).values
    assert ((outcomes - exact).abs() <= spacing).all()
    assert ((outcomes.mean(0) - exact).abs() <= 5.0 * spacing * 0.5 / math.sqrt(seeds)).all()


@each_place
def test_steps_too_small_for_bfloat16_add_up(place: Place) -> None:
    params = [Parameter(torch.ones(4096, dtype=torch.bfloat16, device=place.device)) for _ in range(2)]
    for p, stochastic in zip(params, (True, False), strict=True):
        optimizer = optim.Lion([p], lr=1e-4, stochastic_rounding=stochastic, backend=place.backend)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert abs(params[0].double().mean().item() - 0.99) < 5e-4
    assert (params[1] == 1.0).all()


@each_kernel
@pytest.mark.parametrize("case", SAME_BITS, ids=lambda case: case.id)
def test_the_same_bits_as_eager(case: Case, place: Place) -> None:
    eager = make_tensors(case, SIZES, BFLOAT16, device=place.device)
    actual = eager.clone()
    op_name = rule_of(case).name
    for t in range(1, 4):
        for tensors, where in ((eager, Place("eager")), (actual, place)):
            set_grads(tensors, t)
            ids = list(range(5, 5 + len(SIZES)))
            call(where.function(op_name), case, tensors, seed=2**62 + 12345, ids=ids)
    for a, b in zip(actual.written(), eager.written(), strict=True):
        assert_same_bits(a, b)


@each_kernel
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (9, 1, 11, 3)], ids=str)
def test_the_same_bits_as_eager_in_another_layout(shape: tuple[int, ...], place: Place) -> None:
    x = normal(shape, 1, torch.bfloat16, place.device).to(memory_format=torch.channels_last)
    assert_same_bits(one_step(x, 1e-3, place), one_step(x, 1e-3, Place("eager", place.device)))


@each_place
@pytest.mark.parametrize("offset", range(18))
def test_a_shard_draws_what_its_part_of_the_whole_draws(offset: int, place: Place) -> None:
    whole = normal((2100,), 1, torch.bfloat16, place.device)
    expected = one_step(whole, 1e-3, place)
    for size in (0, 1, 5, 8, 13, 2100 - offset):
        part = slice(offset, offset + size)
        assert_same_bits(one_step(whole[part], 1e-3, place, offset=offset), expected[part])


@each_place
def test_a_shard_draws_other_bits_than_the_first_one(place: Place) -> None:
    p = normal((1000,), 1, torch.bfloat16, place.device)
    first = one_step(p, 1e-3, place, offset=0)
    assert_same_bits(one_step(p, 1e-3, place), first)
    for offset in (1, 8, 1000, 2**35, 2**40 + 3):
        assert not same_bits(one_step(p, 1e-3, place, offset=offset), first)


@each_kernel
@pytest.mark.parametrize("offset", [2**35 - 8, 2**35 - 3, 2**62 + 1])
def test_offsets_of_huge_tensors_as_in_eager(offset: int, place: Place) -> None:
    p = normal((100,), 1, torch.bfloat16, place.device)
    expected = one_step(p, 1e-3, Place("eager", place.device), offset=offset)
    assert_same_bits(one_step(p, 1e-3, place, offset=offset), expected)


@each_place
@pytest.mark.parametrize("case", [case for case in CASES if not rule_of(case).has_norms], ids=lambda case: case.id)
def test_elementwise_rules_give_shards_the_bits_of_the_whole(case: Case, place: Place) -> None:
    whole = make_tensors(case, [(37, 27)], BFLOAT16, device=place.device)
    rows = [(0, 5), (5, 5), (5, 16), (16, 37)]  # of shards, one of them empty

    def cut(t: Tensor) -> list[Tensor]:
        return [t[begin:end].clone() for begin, end in rows]

    def copies(tensors: list[Tensor]) -> list[Tensor]:
        return [t.clone() for t in tensors for _ in rows]

    states = [cut(s) for (s,) in whole.states]
    parts = Tensors(cut(whole.params[0]), [], states, copies(whole.scales), copies(whole.steps))
    function = place.function(rule_of(case).name)
    for t in range(1, 4):
        set_grads(whole, t)
        parts.grads = cut(whole.grads[0])
        call(function, case, whole, seed=5, ids=[3])
        call(function, case, parts, seed=5, ids=[3] * 4, offsets=[27 * begin for begin, _ in rows])
        assert_same_bits(torch.cat(parts.params), whole.params[0])
        for (s,), shards in zip(whole.states, parts.states, strict=True):
            assert_same_bits(torch.cat(shards), s)


@each_place
def test_offsets_that_do_not_fit_are_refused(place: Place) -> None:
    case = next(case for case in CASES if case.rule == "lion")
    tensors = make_tensors(case, [(5,), (6,)], BFLOAT16, device=place.device)
    before = tensors.clone()
    for offsets, got in (([8], "1"), ([8, -1], "-1")):
        with pytest.raises((RuntimeError, ValueError), match=rf"^lion_step_: expected .*offsets.*; got {got}\. "):
            call(place.function("lion_step_"), case, tensors, seed=1, ids=[0, 1], offsets=offsets)
    for t, old in zip(tensors.written(), before.written(), strict=True):
        assert_same_bits(t, old)
    # Who draws nothing needs none, as with ids.
    call(place.function("lion_step_"), case, tensors, offsets=[-1])
    call(place.function("lion_step_"), case, before)
    for t, other in zip(tensors.written(), before.written(), strict=True):
        assert_same_bits(t, other)


@each_place
@each_case
def test_every_rule_rounds_to_a_neighbour(case: Case, place: Place) -> None:
    exact = make_tensors(case, [(1000,)], Mix(torch.float32, torch.bfloat16), device=place.device)
    exact.params = [p.bfloat16().float() for p in exact.params]
    rounded = exact.clone()
    rounded.params = [p.bfloat16() for p in rounded.params]
    set_grads(exact, 1)
    set_grads(rounded, 1)
    function = place.function(rule_of(case).name)
    call(function, case, exact)
    call(function, case, rounded, seed=1, ids=[0])
    down, up = (stochastic_bfloat16(exact.params[0], torch.full((1000,), r, dtype=torch.int32)) for r in (0, 0xFFFF))
    got = rounded.params[0]
    assert ((got == down) | (got == up)).all()
    assert (got != down).any()
    assert (got != up).any()


@each_place
def test_infinities_and_nans_stay_and_no_finite_value_becomes_infinite(place: Place) -> None:
    largest = torch.finfo(torch.bfloat16).max
    special = [math.inf, -math.inf, math.nan, largest, -largest, 0.0, -0.0]
    p = torch.tensor(special * 200, dtype=torch.bfloat16, device=place.device)
    for lr in (0.0, 1e36):  # 1e36 is a third of the spacing there: rounded up, -largest would leave the finite numbers
        after = one_step(p, lr, place).float().view(200, -1).cpu()
        assert (after[:, 0] == math.inf).all()
        assert (after[:, 1] == -math.inf).all()
        assert after[:, 2].isnan().all()
        assert after[:, 3:].isfinite().all()
    assert (after[:, 4] == -largest).all()
    assert 0 < (after[:, 3] < largest).sum() < 200


@each_place
def test_draws_depend_on_seed_step_and_parameter(place: Place) -> None:
    p = torch.ones(256, dtype=torch.bfloat16, device=place.device)
    first = one_step(p, 1e-3, place, seed=3)
    assert_same_bits(one_step(p, 1e-3, place, seed=3), first)
    assert not same_bits(one_step(p, 1e-3, place, seed=4), first)
    assert not same_bits(one_step(p, 1e-3, place, seed=3, first_id=1), first)

    params = [Parameter(p.clone()) for _ in range(2)]
    optimizer = optim.Lion(params, lr=1e-3, stochastic_rounding=True, backend=place.backend)
    moves = []
    for _ in range(2):
        for q in params:
            q.grad = torch.ones_like(q)
            q.data.fill_(1.0)
        optimizer.step()
        moves.append([q.detach().clone() for q in params])
    assert not same_bits(moves[0][0], moves[0][1])
    assert not same_bits(moves[0][0], moves[1][0])


@each_place
def test_the_seed_is_torchs(place: Place) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        params = make_params(SIZES, (torch.bfloat16,), place.device)
        train(optim.Lion(params, lr=1e-3, stochastic_rounding=True, backend=place.backend), 2)
        results.append(params[-1].detach())
    assert_same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])


@each_place
@each_case
def test_a_loaded_state_continues_with_the_same_draws(case: Case, place: Place) -> None:
    def fresh(seed: int):
        torch.manual_seed(seed)
        params = make_params(SIZES[:4], (torch.bfloat16,), place.device)
        return params, make_optimizer(case, params, stochastic_rounding=True, backend=place.backend)

    params, optimizer = fresh(1)
    train(optimizer, 3)
    resumed_params, resumed = fresh(2)
    with torch.no_grad():
        for p, q in zip(params, resumed_params, strict=True):
            q.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, resumed):
        train(o, range(4, 7))
    for p, q in zip(params, resumed_params, strict=True):
        assert_same_bits(p, q)


@pytest.mark.serial
@pytest.mark.parametrize("count", [1, 2, 3])
@each_case
def test_threads_do_not_matter(case: Case, count: int) -> None:
    results = []
    for n in (1, count):
        torch.set_num_threads(n)
        params = make_params([(70000,), (5,), (40000,)], (torch.bfloat16,))
        train(make_optimizer(case, params, stochastic_rounding=True, backend="native"), 2)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_same_bits(p, q)


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_round_to_nearest(dtype: torch.dtype, place: Place) -> None:
    both = [make_params([(1000,)], (dtype,), place.device) for _ in range(2)]
    for params, stochastic in zip(both, (True, False), strict=True):
        train(optim.AdamW(params, stochastic_rounding=stochastic, backend=place.backend), 3)
    assert_same_bits(both[0][0], both[1][0])


@each_place
def test_late_parameters_keep_the_draws_of_the_others(place: Place) -> None:
    """A parameter's draws depend on its place in the optimizer, not on which others have gradients."""
    results = []
    for skip in (None, 0):
        params = make_params([(64,), (64,)], (torch.bfloat16,), place.device)
        optimizer = optim.Lion(params, lr=1e-3, stochastic_rounding=True, backend=place.backend)
        give_grads(params, 1)
        if skip is not None:
            params[skip].grad = None
        optimizer.step()
        results.append(params[1].detach())
    assert_same_bits(*results)
