# SPDX-License-Identifier: Apache-2.0
"""The ops by themselves against float64, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from singlepass._ops import OPS
from singlepass.reference import spectral as reference
from singlepass.spectral._frozen import freeze, thaw

from ..placed import implementation
from ..tolerances import assert_close, assert_same_bits, assert_within, ulp
from .backends import DTYPES, UNIT, each_backend, each_dtype, each_kernel

HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(0, 5), (1, 1), (3, 7), (33, 129), (100, 512), (257, 513), (2100, 40)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(result: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to a dtype may move."""
    return ulp(result, dtype) / 2


@each_backend
@each_dtype
@pytest.mark.parametrize(("tokens", "values"), SHAPES)
def test_scale(tokens: int, values: int, dtype: torch.dtype, backend: str) -> None:
    q, t = random(tokens, values, dtype=dtype), random(tokens, values, seed=1, dtype=dtype)
    s = random(values, seed=2).abs()
    expected = q.float() * s
    terms = q.double() * t.double()
    sums = implementation("spectral_scale_", backend)(q, t, s)
    assert_same_bits(q, expected.to(dtype), "q")
    assert sums.dtype == torch.float32
    # A product and up to tokens additions, in whatever order.
    assert_within(sums, terms.sum(0), (tokens + 2) * UNIT * terms.abs().sum(0), "sums")


@each_backend
def test_scale_takes_rows_of_larger_tensors(backend: str) -> None:
    whole_q, whole_t, s = random(70, 50), random(70, 50, seed=1), random(20, seed=2, dtype=torch.bfloat16)
    q, t = whole_q[:, 11:31], whole_t[:, 7:27]
    expected, around = q.clone() * s.float(), whole_q.clone()
    terms = q.double() * t.double()
    sums = implementation("spectral_scale_", backend)(q, t, s)
    assert_same_bits(q, expected)
    around[:, 11:31] = expected
    assert_same_bits(whole_q, around, "the columns beside it")
    assert_within(sums, terms.sum(0), 72 * UNIT * terms.abs().sum(0), "sums")


@each_kernel
def test_sums_do_not_depend_on_other_columns(backend: str) -> None:
    q, t, s = random(300, 600), random(300, 600, seed=1), random(600, seed=2)
    run = implementation("spectral_scale_", backend)
    whole = run(q.clone(), t, s)
    assert_same_bits(run(q[:, :37].clone(), t[:, :37].clone(), s[:37]), whole[:37])


def test_scale_in_float64() -> None:
    q, t, s = (random(*shape).double() for shape in ((9, 4), (9, 4), (4,)))
    assert_same_bits(reference.scale_(q.clone(), t, s), (q * t).sum(0))


Mix = tuple[torch.dtype, torch.dtype, torch.dtype]
MIXES: list[Mix] = [(p, g, s) for p in DTYPES for g in (p, torch.float32) for s in (torch.float32, p)]
MIXES = list(dict.fromkeys(MIXES))


def step_lists(mix: Mix, start: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Vectors and values after some steps; then their gradients."""
    param, grad, state = mix
    params = [normalize(random(3, n, seed=n)) for n in (1, 2, 17, 130, 5000)]
    params += [random(n, seed=n).abs() for n in (1, 9, 40000)]
    m, v = ([0.1 * random(*p.shape, seed=i) for i, p in enumerate(params)] for _ in range(2))
    lists = [
        [p.to(param) for p in params],
        [t.to(state) for t in m],
        [t.abs().to(state) for t in v],
        [torch.full((), float(start)) for _ in params],
    ]
    return lists, [random(*p.shape, seed=100 + i, dtype=grad) for i, p in enumerate(params)]


@each_backend
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(d).removeprefix("torch.") for d in mix))
def test_step(mix: Mix, project: bool, backend: str) -> None:
    lists, grads = step_lists(mix, 3)
    before = [t.clone() for t in lists[0]]
    results = []
    for name, dtype in ((backend, None), ("eager", None), ("eager", torch.float64)):
        moved = [[t.clone() if dtype is None else t.to(dtype) for t in values] for values in lists[:3]]
        counts = [t.clone() for t in lists[3]]
        g = [t if dtype is None else t.to(dtype) for t in grads]
        lr, scale, found = torch.tensor(0.05, dtype=torch.float64), torch.tensor([8.0]), torch.zeros(1)
        options = {"project": project, "maximize": True, "grad_scale": scale, "found_inf": found}
        implementation("spectral_step_", name)(moved[0], g, moved[1], moved[2], counts, lr, **HYPER, **options)
        assert [int(c) for c in counts] == [4] * len(counts)
        results.append(moved)
    ours, eager, truth = results
    for i, old in enumerate(before):
        for k, name in enumerate(("param", "exp_avg", "exp_avg_sq")):
            label = f"{name} of {tuple(old.shape)}"
            moved_from = old if k == 0 else lists[k][i]
            assert_close("spectral_step_", ours[k][i], eager[k][i], truth[k][i], before=moved_from, label=label)


@each_backend
@each_dtype
def test_vectors_have_unit_length_and_values_are_not_negative(dtype: torch.dtype, backend: str) -> None:
    lists, grads = step_lists((dtype, torch.float32, torch.float32), 0)
    options = {"project": False, "maximize": False, "grad_scale": None, "found_inf": None}
    implementation("spectral_step_", backend)(lists[0], grads, *lists[1:], torch.tensor(0.5), **HYPER, **options)
    for p in lists[0]:
        if p.dim() == 1:
            assert p.min() >= 0.0
            assert p.numel() < 10 or (p == 0.0).any(), "nothing was clamped: the test is too weak"
            continue
        # Rounding every element moves a row's norm by at most as much relatively.
        bound = torch.finfo(dtype).eps / 2 + 8 * UNIT
        assert_within(p.double().norm(dim=1), torch.ones(3, dtype=torch.float64), torch.full((3,), bound), "norms")


@each_backend
def test_skipped_steps_change_nothing(backend: str) -> None:
    lists, grads = step_lists((torch.float32,) * 3, 2)
    before = [[t.clone() for t in values] for values in lists]
    options = {"project": True, "maximize": False, "grad_scale": None, "found_inf": torch.ones(1)}
    implementation("spectral_step_", backend)(lists[0], grads, *lists[1:], torch.tensor(0.1), **HYPER, **options)
    for new, old in zip(itertools.chain(*lists), itertools.chain(*before), strict=True):
        assert_same_bits(new, old)


@each_backend
def test_rows_of_zeros_stay_and_nan_spreads(backend: str) -> None:
    zero, broken, value = torch.zeros(2, 5), normalize(torch.ones(2, 5)), torch.ones(3)
    params = [zero, broken, value]
    grads = [torch.zeros(2, 5), torch.ones(2, 5), torch.ones(3)]
    grads[1][0, 3] = grads[2][1] = float("nan")
    states = [[torch.zeros_like(p) for p in params] for _ in "mv"]
    options = {"project": False, "maximize": False, "grad_scale": None, "found_inf": None}
    counts = [torch.zeros(()) for _ in params]
    implementation("spectral_step_", backend)(params, grads, *states, counts, torch.tensor(0.1), **HYPER, **options)
    assert_same_bits(zero, torch.zeros(2, 5))
    assert broken[0].isnan().all()
    assert broken[1].isfinite().all()
    assert value.isnan().tolist() == [False, True, False]


def inclusion(p: list[float], rank: int) -> list[float]:
    """Probability of each place to be among the first `rank` drawn one after another without replacement."""
    found = [0.0] * len(p)
    for order in itertools.permutations(range(len(p)), rank):
        left, chance = 1.0, 1.0
        for i in order:
            chance *= p[i] / left
            left -= p[i]
        for i in order:
            found[i] += chance
    return found


def drawn(exchange: Tensor, rank: int) -> set[int]:
    """Places that were drawn, from what comes to each active place."""
    return {rank + int(e) if e >= 0 else place for place, e in enumerate(exchange.tolist())}


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_draws_follow_the_distribution(uniform: float, backend: str) -> None:
    s, rank, draws = torch.tensor([4.0, 0.5, 2.0, 1.0, 0.25, 3.0]), 3, 4000 if backend == "native" else 600
    p = (uniform / 6 + (1 - uniform) * s.double() / s.double().sum()).tolist()
    counts = [0] * 6
    run = implementation("spectral_sample", backend)
    for draw in range(draws // 20):
        many = run([s] * 20, ranks=[rank] * 20, ids=list(range(20)), seed=11, draw=draw, uniform=uniform)
        for exchange in many:
            for place in drawn(exchange, rank):
                counts[place] += 1
    for count, chance in zip(counts, inclusion(p, rank), strict=True):
        deviation = math.sqrt(draws * chance * (1.0 - chance))
        assert abs(count - draws * chance) <= 4.5 * deviation, (counts, inclusion(p, rank))


def test_torch_multinomial_has_the_same_distribution() -> None:
    """The truth of the test above, for the sampler that the paper names."""
    p, rank, draws = torch.tensor([4.0, 0.5, 2.0, 1.0]), 2, 20000
    taken = torch.multinomial(p.expand(draws, 4), rank, generator=torch.Generator().manual_seed(0))
    counts = taken.flatten().bincount(minlength=4).tolist()
    for count, chance in zip(counts, inclusion((p / p.sum()).tolist(), rank), strict=True):
        assert abs(count - draws * chance) <= 4.5 * math.sqrt(draws * chance * (1.0 - chance))


@each_kernel
def test_draws_are_the_reference_s(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    s = [random(n, seed=n).abs() for n in (1, 5, 64, 1000, 3072)]
    s += [torch.zeros(10), torch.tensor([1.0, nan, -1.0, 2.0, inf]), torch.tensor([1.0, 1.0, 0.0, 0.0])]
    s += [s[3].to(torch.bfloat16), s[3].to(torch.float16)]
    options = {"ranks": [1, 2, 8, 100, 192, 3, 2, 3, 60, 60], "ids": [*range(9), 1 << 30], "seed": 2**62 + 5}
    for draw, uniform in ((0, 0.0), (7, 0.5), ((1 << 31) - 1, 1.0)):
        got = implementation("spectral_sample", backend)(s, draw=draw, uniform=uniform, **options)
        want = reference.sample(s, draw=draw, uniform=uniform, **options)
        for a, b, rank, values in zip(got, want, options["ranks"], s, strict=True):
            assert_same_bits(a, b)
            assert len(drawn(a, rank)) == rank
            assert max(drawn(a, rank)) < values.numel()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_all_places_can_be_drawn(backend: str) -> None:
    (exchange,) = implementation("spectral_sample", backend)(
        [torch.ones(5)], ranks=[5], ids=[0], seed=0, draw=0, uniform=0.5
    )
    assert exchange.tolist() == [-1] * 5


def test_draws_differ_by_layer_draw_and_seed() -> None:
    s, run = torch.ones(1000), implementation("spectral_sample", "native")

    def draw(seed: int, draw: int, layer: int) -> list[int]:
        return run([s], ranks=[100], ids=[layer], seed=seed, draw=draw, uniform=0.5)[0].tolist()

    assert draw(0, 0, 0) == draw(0, 0, 0)
    assert len({tuple(draw(*key)) for key in itertools.product((0, 1), repeat=3)}) == 8


FROZEN = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@each_backend
@pytest.mark.parametrize("frozen_dtype", FROZEN, ids=str)
@each_dtype
def test_swap(dtype: torch.dtype, frozen_dtype: torch.dtype, backend: str) -> None:
    exchange = torch.tensor([-1, 4, -1, 0, 6])
    slots, rows = torch.tensor([1, 3, 4]), torch.tensor([4, 0, 6])
    for columns in (1, 7, 128, 129, 300):
        active, (frozen, scales) = random(5, columns, dtype=dtype), freeze(random(7, columns, seed=1), frozen_dtype)
        if dtype == torch.float16 and frozen_dtype == torch.int8:
            frozen[0] = 0
            scales[0] = 0.0
        old_active, old_frozen = active.clone(), thaw(frozen.clone(), scales.clone())
        expected_frozen, expected_scales = frozen.clone(), scales.clone()
        stored, factors = freeze(active[slots], frozen_dtype)
        expected_frozen[rows] = stored
        if frozen_dtype == torch.int8:
            expected_scales[rows] = factors
        implementation("spectral_swap_", backend)([active], [frozen], [scales], [exchange])
        old_active[slots] = old_frozen[rows].to(dtype)
        assert_same_bits(active, old_active, "active")
        assert_same_bits(frozen, expected_frozen, "frozen")
        assert_same_bits(scales, expected_scales, "scales")


@each_backend
def test_swap_of_many_pairs(backend: str) -> None:
    """More pairs than one launch takes in its arguments, values among them, and layers without frozen vectors."""
    pairs = []
    for i in range(150):
        shape = (4, 3 + i % 5) if i % 3 else (4,)
        rows = 0 if i % 7 == 0 else 6
        exchange = torch.full((4,), -1) if rows == 0 else torch.tensor([5, -1, i % 5, -1])
        pairs.append((random(*shape, seed=i), random(rows, *shape[1:], seed=i + 500), torch.empty(0), exchange))
    kept = [tuple(t.clone() for t in pair) for pair in pairs]
    implementation("spectral_swap_", backend)(*(list(column) for column in zip(*pairs, strict=True)))
    for (active, frozen, _, exchange), (old_active, old_frozen, _, _) in zip(pairs, kept, strict=True):
        for slot, row in enumerate(exchange.tolist()):
            if row >= 0:
                old_active[slot], old_frozen[row] = old_frozen[row].clone(), old_active[slot].clone()
        assert_same_bits(active, old_active)
        assert_same_bits(frozen, old_frozen)


@each_backend
def test_rows_that_are_not_there_stay(backend: str) -> None:
    around, active = torch.zeros(10, 4), random(3, 4)
    want = active.clone()
    exchange = torch.tensor([7, -5, 1])
    want[2] = 0.0
    implementation("spectral_swap_", backend)([active], [around[:3]], [torch.empty(0)], [exchange])
    assert_same_bits(around[1], random(3, 4)[2])
    around[1] = 0.0
    assert not around.any()
    assert_same_bits(active, want)


@each_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_is_nan_once_stored_in_int8(backend: str, poison: float) -> None:
    active, (codes, scales) = random(1, 300), freeze(random(2, 300, seed=1), torch.int8)
    active[0, 140] = poison
    implementation("spectral_swap_", backend)([active], [codes], [scales], [torch.tensor([1])])
    assert active.isfinite().all()
    back = thaw(codes, scales)
    assert back[0].isfinite().all()
    assert not codes[1, 128:256].any()
    assert back[1, 128:256].isnan().all()
    assert back[1, :128].isfinite().all()


def test_int8_codes_are_within_half_a_step() -> None:
    rows = random(20, 300)
    rows[3] = 0.0
    codes, scales = reference.encode(rows)
    step = scales.repeat_interleave(128, dim=1)[:, :300].double()
    assert_within(reference.decode(codes, scales), rows.double(), (0.5 + 1e-5) * step, "rows")
    largest = torch.nn.functional.pad(rows, (0, 84)).view(20, 3, 128).abs().amax(-1)
    assert_same_bits(scales, largest / 127.0)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(0, 3), (1, 2), (3, 5, 17), (70, 129), (5, 2000)])
def test_lorentz(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    z, grad = 2 * random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    if z.numel() > 20:
        z.view(-1, shape[-1])[0, 1:] = 0.0  # no direction to rescale
    log_scale = torch.tensor(0.7)
    for k, offset in ((1.0, 1.1), (2.0, 1.5)):
        options = {"k": k, "offset": offset}
        x = implementation("lorentz", backend)(z, log_scale, **options)
        truth = reference.lorentz(z.double(), log_scale.double(), **options)
        # time^2 - k loses up to a factor of six of the relative accuracy of a few roundings.
        assert_within(x, truth, 40 * UNIT * truth.abs() + exact(truth, dtype), "x")
        got = implementation("lorentz_backward", backend)(grad, z, log_scale, **options)
        want = reference.lorentz_backward(grad.double(), z.double(), log_scale.double(), **options)
        bounds = magnitudes(grad.double(), z.double(), log_scale.double(), **options)
        assert_within(got[0], want[0], 100 * UNIT * bounds[0] + exact(want[0], dtype), "grad z")
        assert_within(got[1], want[1], 100 * UNIT * bounds[1] + exact(want[1], torch.float32), "grad log_scale")


def magnitudes(g: Tensor, z: Tensor, log_scale: Tensor, *, k: float, offset: float) -> tuple[Tensor, Tensor]:
    """What the gradients would be if nothing in them cancelled."""
    space, scale, gate = z[..., 1:], log_scale.exp(), z[..., :1].sigmoid()
    time, square = gate * scale + offset, space.square().sum(-1, keepdim=True)
    held = square.clamp(min=1e-8)
    root = ((time * time - k) / held).sqrt()
    along = (g[..., 1:] * space).abs().sum(-1, keepdim=True)
    grad_time = g[..., :1].abs() + along * time / (held * root)
    first = grad_time * scale * gate
    return torch.cat((first, g[..., 1:].abs() * root + along * root / held * space.abs()), -1), first.sum()


@each_backend
def test_lorentz_at_its_least_time(backend: str) -> None:
    """Where time^2 - k rounds to nothing, or below, points stand still at the origin instead of becoming NaN."""
    for k, offset in ((1.0, 1.0), (2.0, 2.0**0.5), (0.5, 0.5**0.5), (7.0, 7.0**0.5)):
        z, options = torch.tensor([[-40.0, 1.0, 1.0]]), {"k": k, "offset": offset}
        x = implementation("lorentz", backend)(z, torch.zeros(()), **options)
        assert float(x[0, 0]) == pytest.approx(offset)
        assert x[0, 1:].abs().max() < 1e-2
        grads = implementation("lorentz_backward", backend)(torch.ones(1, 3), z, torch.zeros(()), **options)
        assert all(g.isfinite().all() for g in grads)


def test_lorentz_gradients_in_float64() -> None:
    z, log_scale = random(3, 4, 6).double().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = reference.lorentz(z, log_scale, k=1.0, offset=1.1)
    grad = random(3, 4, 6, seed=1).double()
    want = torch.autograd.grad(y, (z, log_scale), grad)
    got = reference.lorentz_backward(grad, z, log_scale, k=1.0, offset=1.1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


BAD = [
    ("spectral_scale_", lambda: ((torch.ones(3, 4), torch.ones(3, 5), torch.ones(4)), {}), "t of shape"),
    ("spectral_scale_", lambda: ((torch.ones(3, 4), torch.ones(3, 4), torch.ones(3)), {}), "s of shape"),
    (
        "spectral_swap_",
        lambda: (([torch.ones(2, 3)], [torch.ones(2, 4)], [torch.ones(0)], [torch.zeros(2).long()]), {}),
        "",
    ),
    ("spectral_sample", lambda: (([torch.ones(3)],), {"ranks": [4], "ids": [0]}), "rank"),
    ("lorentz", lambda: ((torch.ones(3, 1), torch.ones(())), {"k": 1.0, "offset": 1.1}), "two elements"),
]


@pytest.mark.parametrize(("name", "arguments", "text"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_native_ops_refuse_what_they_cannot_read(name: str, arguments, text: str) -> None:
    positional, options = arguments()
    if name == "spectral_sample":
        options |= {"seed": 0, "draw": 0, "uniform": 0.5}
    with pytest.raises(RuntimeError, match=rf"{name}: expected .*{text}"):
        OPS[name].on("native")(*positional, **options)
