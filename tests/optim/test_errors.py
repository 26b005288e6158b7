# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one clear error, in the house's shape, before anything is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from singlepass import optim

from ..simt.truth import CASES, Case
from ..tolerances import assert_same_bits
from .steps import GPU_PLACES, NATIVE, Mix, Place, Tensors, call, each_case, make_tensors, rule_of, set_grads
from .trajectory import contents, give_grads, make_optimizer, make_params, train

SHAPES = [(5, 7), (64,)]
HOUSE_SHAPE = re.compile(r"\w+: expected \S.*; got \S.*\. [A-Z]\S.*\.", re.DOTALL)

ADAM_LIKE = ["AdamW", "AdaBelief", "Adan", "DiffGrad", "LAMB"]
each_optimizer = pytest.mark.parametrize("name", optim._OPTIMIZERS)


@contextmanager
def refused(
    kind: type[Exception] | tuple[type[Exception], ...] = ValueError, match: str | None = None
) -> Iterator[None]:
    with pytest.raises(kind, match=match) as caught:
        yield
    first_line = str(caught.value).split("\nException raised from")[0].strip()
    assert HOUSE_SHAPE.fullmatch(first_line), first_line


def bad_hyperparameters() -> Iterator[Any]:
    def case(name: str, **arguments: Any) -> Any:
        label = "-".join(f"{key}={value}" for key, value in arguments.items())
        return pytest.param(name, arguments, id=f"{name}-{label}")

    for name in optim._OPTIMIZERS:
        for lr in (-1e-3, math.nan, math.inf, torch.tensor(-1.0), "x", None, 1j, [1e-3]):
            yield case(name, lr=lr)
        yield case(name, lr=torch.ones(2))
        yield case(name, lr=torch.ones((), dtype=torch.int64))
        for weight_decay in (-0.1, math.inf, "x", None, torch.ones(2)):
            yield case(name, weight_decay=weight_decay)
        for flag in ("maximize", "capturable", "stochastic_rounding"):
            yield case(name, **{flag: "no"})
        for state_dtype in ("fp8", torch.int32, torch.float64):
            yield case(name, state_dtype=state_dtype)
        yield case(name, backend="fpga")
    for name in (*ADAM_LIKE, "Lion"):
        count = 3 if name == "Adan" else 2
        for k in range(count):
            for beta in (-0.1, 1.0, math.nan):
                yield case(name, betas=tuple(beta if i == k else 0.9 for i in range(count)))
        for betas in ((0.9,) * (count - 1), ("x",) * count, 0.9, None):
            yield case(name, betas=betas)
    for name in (*ADAM_LIKE, "LARS", "SGDSaI"):
        yield case(name, eps=-1e-8)
    for name in ("LARS", "SGDSaI"):
        yield case(name, momentum=1.0)
        yield case(name, momentum=-0.1)
    for name in ("Adan", "LAMB"):
        for max_grad_norm in (-1.0, math.nan, None):
            yield case(name, max_grad_norm=max_grad_norm)
    for name, flag in (("AdamW", "amsgrad"), ("AdaBelief", "rectify"), ("Adan", "no_prox"), ("LAMB", "always_adapt")):
        yield case(name, **{flag: None})
    yield case("LARS", trust_coefficient=-1e-3)


@pytest.mark.parametrize(("name", "arguments"), bad_hyperparameters())
def test_hyperparameters_outside_their_range(name: str, arguments: dict[str, Any]) -> None:
    with refused():
        getattr(optim, name)(make_params(SHAPES), **arguments)

    optimizer = getattr(optim, name)(make_params(SHAPES))
    group = {key: value for key, value in arguments.items() if key != "backend"} or arguments
    with refused():
        optimizer.add_param_group({"params": make_params(SHAPES), **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"lr": "x"}, "AdamW: expected lr in [0, inf); got 'x'. Pass a finite number that is not negative."),
        ({"betas": 0.9}, "AdamW: expected betas as a tuple of 2; got 0.9. Pass numbers from 0 to less than 1."),
        ({"betas": (0.9, 1.0)}, "AdamW: expected betas in [0, 1); got 1.0. Pass a number from 0 to less than 1."),
        ({"maximize": 1}, "AdamW: expected maximize True or False; got 1. Pass one of them."),
    ],
)
def test_errors_say_what_is_allowed(arguments: dict[str, Any], text: str) -> None:
    with refused(match=re.escape(text)):
        optim.AdamW(make_params(SHAPES), **arguments)


@pytest.mark.parametrize("choice", [{"fused": True}, {"foreach": False}, {"fused": False, "foreach": True}], ids=str)
def test_adamw_takes_torchs_choices_of_a_step(choice: dict[str, bool]) -> None:
    """They change nothing, and are not kept; what can't be had is refused."""
    results = []
    for arguments in ({}, choice | {"differentiable": False}):
        params = make_params(SHAPES)
        optimizer = optim.AdamW(params, lr=0.1, **arguments)
        train(optimizer, 3)
        results.append((params, optimizer.state_dict()["param_groups"]))
    (plain, groups), (chosen, other) = results
    assert groups == other
    for a, b in zip(plain, chosen, strict=True):
        assert_same_bits(a, b)
    with refused(match="differentiable=False"):
        optim.AdamW(make_params(SHAPES), differentiable=True)


@each_optimizer
def test_misspelt_keys_of_groups(name: str) -> None:
    cls = getattr(optim, name)
    p, q = make_params(SHAPES)
    for wrong, right in (("weigth_decay", "weight_decay"), ("state_dytpe", "state_dtype")):
        with refused(match=rf"got '{wrong}'\. Write {right}\."):
            cls([{"params": [p], wrong: 0.1}, {"params": [q]}])


@each_optimizer
def test_what_others_keep_in_groups_is_not_misspelt(name: str) -> None:
    """A scheduler's extremes, timm's lr_scale, options of torch's own optimizers, names."""
    cls = getattr(optim, name)
    optimizer = cls([{"params": make_params(SHAPES), "name": "all", "lr_scale": 0.5, "foreach": None, "fused": True}])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    cls(optimizer.param_groups)


@each_optimizer
def test_parameters_that_cannot_be_optimized(name: str) -> None:
    cls = getattr(optim, name)
    p, q = make_params(SHAPES)
    with refused(match=r"complex64\. Pass torch\.view_as_real"):
        cls([Parameter(torch.zeros(3, dtype=torch.complex64))])
    for dtype in (torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn):
        with refused(match=rf"floating-point .*; got {dtype}\. Convert it, or leave it out\."):
            cls([Parameter(torch.zeros(3).to(dtype), requires_grad=False)])
    with refused(match="overlap"):
        cls([Parameter(torch.zeros(1).expand(3))])
    with refused(match="once"):
        cls([p, q, p])
    with refused(match="group"):
        cls([{"params": [p]}, {"params": [p, q]}])
    with pytest.raises(TypeError):
        cls([{"params": {p, q}}])
    with pytest.raises(TypeError):
        cls([p, "q"])
    with pytest.raises(ValueError, match="empty"):
        cls([])


@each_optimizer
def test_a_refused_group_is_not_added(name: str) -> None:
    p, q = make_params(SHAPES)
    optimizer = getattr(optim, name)([p])
    for group in ({"params": [p]}, {"params": [q, q]}, {"params": [torch.zeros(2, dtype=torch.complex64)]}):
        with refused():
            optimizer.add_param_group(group)
    assert [group["params"] for group in optimizer.param_groups] == [[p]]


@pytest.mark.parametrize("name", ["Adan", "LAMB"])
def test_groups_that_disagree_on_the_global_norm(name: str) -> None:
    p, q = make_params(SHAPES)
    with refused(match="max_grad_norm"):
        getattr(optim, name)([{"params": [p], "max_grad_norm": 1.0}, {"params": [q], "max_grad_norm": 2.0}])


def sparse(p: Parameter) -> None:
    p.grad = torch.zeros(p.shape).to_sparse()


def complex_(p: Parameter) -> None:
    p.grad_dtype = None
    p.grad = torch.zeros(p.shape, dtype=torch.complex64)


def integer(p: Parameter) -> None:
    p.grad_dtype = None
    p.grad = torch.zeros(p.shape, dtype=torch.int32)


@pytest.mark.parametrize("backend", [None, "native", "eager"])
@pytest.mark.parametrize("spoil", [sparse, complex_, integer], ids=["sparse", "complex", "integer"])
@each_case
def test_gradients_that_cannot_be_taken(case: Case, spoil: Callable[[Parameter], None], backend: str | None) -> None:
    params = make_params([*SHAPES, (3, 3)])
    optimizer = make_optimizer(case, [{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    for step in range(2):
        give_grads(params, step + 1)
        good = params[-1].grad
        params[-1].grad = None
        spoil(params[-1])
        before = contents(optimizer)
        with refused((RuntimeError, ValueError)):
            optimizer.step()
        after = contents(optimizer)
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert_same_bits(after[name], value, name)
        params[-1].grad = None
        params[-1].grad_dtype = torch.float32
        params[-1].grad = good
        optimizer.step()


@each_optimizer
def test_native_cannot_be_had_for_float64(name: str) -> None:
    with refused(RuntimeError, match="float64"):
        getattr(optim, name)(make_params(SHAPES, (torch.float64,)), backend="native")


@each_optimizer
def test_native_cannot_be_had_for_parameters_with_gaps(name: str) -> None:
    p = Parameter(torch.zeros(4, 6)[:, ::2])
    optimizer = getattr(optim, name)([p], backend="native")
    p.grad = torch.ones(4, 3)
    with refused((RuntimeError, ValueError), match="dense"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(4, 3))
    assert len(optimizer.state) == 0


def replaced(tensors: list[Tensor], i: int, value: Tensor) -> list[Tensor]:
    return [*tensors[:i], value, *tensors[i + 1 :]]


def spoil_arguments(kind: str, tensors: Tensors) -> dict[str, Any]:
    """Makes one argument of a step op wrong, in place or by the returned options."""
    device = tensors.params[0].device
    match kind:
        case "too few gradients":
            tensors.grads = tensors.grads[:-1]
        case "too few states":
            tensors.states[0] = tensors.states[0][:-1]
        case "too few steps":
            tensors.steps = tensors.steps[:-1]
        case "gradient of another shape":
            tensors.grads = replaced(tensors.grads, 1, torch.zeros(65, device=device))
        case "gradient of the transposed shape":
            tensors.grads = replaced(tensors.grads, 0, torch.zeros(7, 5, device=device))
        case "gradient on another device":
            tensors.grads = replaced(tensors.grads, 1, torch.zeros(64, device="cpu"))
        case "parameter on another device":
            tensors.params = replaced(tensors.params, 1, torch.zeros(64, device="cpu"))
        case "float64 parameter":
            tensors.params = replaced(tensors.params, 1, torch.zeros(64, dtype=torch.float64, device=device))
        case "integer gradient":
            tensors.grads = replaced(tensors.grads, 1, torch.zeros(64, dtype=torch.int32, device=device))
        case "complex gradient":
            tensors.grads = replaced(tensors.grads, 1, torch.zeros(64, dtype=torch.complex64, device=device))
        case "sparse gradient":
            tensors.grads = replaced(tensors.grads, 1, torch.zeros(64, device=device).to_sparse())
        case "parameter with gaps":
            tensors.params = replaced(tensors.params, 1, torch.zeros(128, device=device)[::2])
        case "overlapping parameter":
            tensors.params = replaced(tensors.params, 1, torch.zeros(1, device=device).expand(64))
        case "state of another shape":
            tensors.states[0] = replaced(tensors.states[0], 1, torch.zeros(63, device=device))
        case "state laid out otherwise":
            tensors.states[0] = replaced(tensors.states[0], 0, torch.zeros(7, 5, device=device).t())
        case "integer state":
            tensors.states[0] = replaced(tensors.states[0], 1, torch.zeros(64, dtype=torch.int32, device=device))
        case "float64 step":
            tensors.steps = replaced(tensors.steps, 1, torch.zeros((), dtype=torch.float64, device=device))
        case "step of two elements":
            tensors.steps = replaced(tensors.steps, 1, torch.zeros(2, device=device))
        case "learning rate of two elements":
            return {"lr": torch.ones(2)}
        case "integer learning rate":
            return {"lr": torch.tensor(1)}
        case "grad_scale of two elements":
            return {"grad_scale": torch.ones(2, device=device)}
        case "float64 found_inf":
            return {"found_inf": torch.zeros((), dtype=torch.float64, device=device)}
        case "seed without ids":
            return {"seed": 1, "ids": [0]}
        case _:
            raise AssertionError(kind)
    return {}


KINDS = [
    "too few gradients",
    "too few states",
    "too few steps",
    "gradient of another shape",
    "gradient of the transposed shape",
    pytest.param("gradient on another device", marks=pytest.mark.gpu),
    pytest.param("parameter on another device", marks=pytest.mark.gpu),
    "float64 parameter",
    "integer gradient",
    "complex gradient",
    "sparse gradient",
    "parameter with gaps",
    "overlapping parameter",
    "state of another shape",
    "state laid out otherwise",
    "integer state",
    "float64 step",
    "step of two elements",
    "learning rate of two elements",
    "integer learning rate",
    "grad_scale of two elements",
    "float64 found_inf",
    "seed without ids",
]


@pytest.mark.parametrize("place", [NATIVE, *GPU_PLACES[:2]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [c for c in CASES if not c.label], ids=lambda case: case.id)
def test_ops_refuse_what_they_cannot_take(case: Case, kind: str, place: Place) -> None:
    if "device" in kind and place.device == "cpu":
        pytest.skip("a CPU is the only device that has no other beside it")
    tensors = make_tensors(case, SHAPES, Mix(), device=place.device)
    set_grads(tensors, 1)
    options = spoil_arguments(kind, tensors)
    written = [t for t in tensors.written() if t.device.type == place.device and t.layout == torch.strided]
    before = [t.clone() for t in written]
    with refused((RuntimeError, ValueError), match=f"{rule_of(case).name}: "):
        call(place.function(rule_of(case).name), case, tensors, **options)
    for t, old in zip(written, before, strict=True):
        assert torch.equal(t, old)


def test_an_optimizer_works_after_a_refused_step() -> None:
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, undisturbed = optim.AdamW(params), optim.AdamW(others)
    sparse(params[1])
    with refused(RuntimeError, match="sparse"):
        optimizer.step()
    for o in (optimizer, undisturbed):
        train(o, 2)
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
