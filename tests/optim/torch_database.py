# SPDX-License-Identifier: Apache-2.0
"""Enters our optimizers in the database behind torch's own tests, and runs what that holds. Prints JSON: for each
"class, check" the inputs that were tried, each with its error or null. A process of its own: importing torch's test
utilities changes settings of torch for good."""

from __future__ import annotations

import copy
import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal import common_optimizers as database

from singlepass import optim

CPU, DTYPE = torch.device("cpu"), torch.float32
ENTRIES = {entry.optim_cls.__name__: entry for entry in database.optim_db}
STEPS = 20
# Where torch warns, and we refuse.
STRICTER = {"a param group cannot have duplicate parameters": ValueError}
# What torch refuses because of how its foreach loops are written; we have none, and read tensors of one element.
LIFTED = (
    "lr as Tensor doesn't work with foreach",
    "betas must be either both floats or both Tensors",
    "as a Tensor is not supported for capturable=False",
)


def accepted(cls: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    return kwargs.keys() <= inspect.signature(cls).parameters.keys()


def inputs_of(cls: type) -> Callable[..., list[Any]]:
    """torch's inputs for Adam and SGD, as far as the class takes their arguments; AdamW takes all of AdamW's."""

    def inputs(device: torch.device, dtype: torch.dtype | None = None) -> list[Any]:
        entries = [ENTRIES["AdamW"]] if cls is optim.AdamW else [ENTRIES["AdamW"], ENTRIES["SGD"]]
        found = {i.desc: i for entry in entries for i in entry.optim_inputs_func(device, dtype)}
        return [i for i in found.values() if accepted(cls, i.kwargs)]

    return inputs


def errors_of(cls: type) -> Callable[..., list[Any]]:
    """What torch asks all optimizers to refuse, and Adam or SGD, as far as the class takes the arguments."""

    def inputs(device: torch.device, dtype: torch.dtype) -> list[Any]:
        found = ENTRIES["AdamW"].optim_error_inputs_func(device, dtype)
        found += ENTRIES["SGD"].optim_error_inputs_func(device, dtype)
        found = {e.optimizer_error_input.desc: e for e in found}.values()
        return [e for e in found if accepted(cls, e.optimizer_error_input.kwargs)]

    return inputs


def entry_of(name: str) -> Any:
    cls = getattr(optim, name)
    return database.OptimizerInfo(
        cls,
        optim_inputs_func=inputs_of(cls),
        scheduler_inputs=ENTRIES["SGD"].scheduler_inputs,  # the most of all entries
        supported_impls=(),
        supports_complex=False,
        optim_error_inputs_func=errors_of(cls),
    )


class Problem:
    """torch's own: |W x + b|^2, to be made small, or large."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = Parameter(torch.randn((10, 5), generator=generator))
        self.bias = Parameter(torch.randn(10, generator=generator))
        self.input = torch.randn(5, generator=generator)

    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def closure(self, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss


def goes_right(entry: Any, kwargs: dict[str, Any], schedulers: list[Callable[..., Any]]) -> None:
    problem = Problem()
    kwargs = copy.deepcopy(kwargs)  # schedulers write to tensors
    if entry.optim_cls is optim.SGDSaI:  # whose rates have a gain, under which this steep problem would oscillate
        kwargs["lr"] = 0.1 * kwargs.get("lr", 1e-2)
    optimizer = entry.optim_cls(problem.params(), **kwargs)
    made = [make(optimizer) for make in schedulers]
    first = problem.closure(optimizer).item()
    for _ in range(STEPS):
        loss = optimizer.step(lambda: problem.closure(optimizer))
        for scheduler in made:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss.detach()) if plateau else scheduler.step()
    last = problem.closure(optimizer).item()
    assert last > first if kwargs.get("maximize") else last < first, (first, last)


def each_input(entry: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for i in entry.optim_inputs_func(CPU, DTYPE):
        yield i.desc, i.kwargs


def direction(entry: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    for desc, kwargs in each_input(entry):
        yield desc, lambda kwargs=kwargs: goes_right(entry, kwargs, [])


def schedulers(entry: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    for desc, kwargs in each_input(entry):
        for number, makers in enumerate(entry.scheduler_inputs):
            yield f"{desc}, schedulers {number}", lambda kwargs=kwargs, makers=makers: goes_right(entry, kwargs, makers)


def resuming(entry: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """States that are saved, copied and loaded go on as if they had not been."""

    def check(kwargs: dict[str, Any]) -> None:
        problem = Problem()
        optimizer = entry.optim_cls(problem.params(), **copy.deepcopy(kwargs))
        for _ in range(3):
            optimizer.step(lambda: problem.closure(optimizer))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twins = [copy.deepcopy(problem) for _ in range(2)]
        loaded = [entry.optim_cls(twin.params(), **copy.deepcopy(kwargs)) for twin in twins]
        loaded[0].load_state_dict(optimizer.state_dict())
        loaded[1].load_state_dict(torch.load(file, weights_only=True))
        for p, o in zip([problem, *twins], [optimizer, *loaded], strict=True):
            for _ in range(3):
                o.step(lambda p=p, o=o: p.closure(o))
        for twin in twins:
            assert all(map(torch.equal, twin.params(), problem.params()))

    for desc, kwargs in each_input(entry):
        yield desc, lambda kwargs=kwargs: check(kwargs)


def as_torch(entry: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The same parameters as from torch's class of the same name, where there is one."""
    official = getattr(torch.optim, entry.optim_cls.__name__, None)

    def check(kwargs: dict[str, Any]) -> None:
        problems = Problem(), Problem()
        for problem, cls in zip(problems, (entry.optim_cls, official), strict=True):
            optimizer = cls(problem.params(), **copy.deepcopy(kwargs))
            for _ in range(STEPS):
                optimizer.step(lambda p=problem, o=optimizer: p.closure(o))
        for p, q in zip(problems[0].params(), problems[1].params(), strict=True):
            torch.testing.assert_close(p, q)

    for desc, kwargs in each_input(entry) if official is not None else ():
        yield desc, lambda kwargs=kwargs: check(kwargs)


def errors(entry: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """Refused, by an error of the same type: the words are ours."""

    def check(case: Any) -> None:
        given = case.optimizer_error_input
        params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
        if any(text in given.desc for text in LIFTED) and entry.optim_cls is not optim.Adan:  # which has three betas
            goes_right(entry, given.kwargs, [])
            return
        expected = STRICTER.get(given.desc, case.error_type)
        before = [p.detach().clone() for p in params if isinstance(p, Tensor)]
        try:
            entry.optim_cls(params, **given.kwargs)
        except expected:
            after = [p for p in params if isinstance(p, Tensor)]
            assert all(map(torch.equal, after, before))
            return
        raise AssertionError(f"accepted, in place of {expected.__name__}")

    for case in entry.optim_error_inputs_func(CPU, DTYPE):
        if case.error_on is database.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            yield case.optimizer_error_input.desc, lambda case=case: check(case)


CHECKS = (direction, schedulers, resuming, as_torch, errors)


def outcome(run: Callable[[], None]) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before.*optimizer.step")  # as in torch's own test
            run()
    except Exception as error:  # the report names every input, also after one that fails
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    entries = {name: entry_of(name) for name in optim._OPTIMIZERS}
    results = {
        f"{name} {check.__name__}": [[desc, outcome(run)] for desc, run in check(entry)]
        for name, entry in entries.items()
        for check in CHECKS
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
