# SPDX-License-Identifier: Apache-2.0
"""What hyperparameters, keys of groups and parameters may be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .._errors import message, require
from .._ops import check_backend, requested
from .._ops.optim import StepOp
from ._shards import check_placements, is_sharded

if TYPE_CHECKING:
    from ._base import FusedOptimizer

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARAM_DTYPES = (*STATE_DTYPES, torch.float64)

# How like a hyperparameter a group's key is if misspelt; a scheduler's max_momentum is 0.8 like momentum.
_MISSPELT = 0.85


def is_number(value: object) -> TypeGuard[Real | Tensor]:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _below(limit: float) -> Callable[[Any], bool]:
    def keeps(value: Any) -> bool:
        return is_number(value) and 0.0 <= float(value) < limit

    return keeps


# Contract of a hyperparameter: whether a value keeps it, and the remedy.
_CONTRACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "in [0, inf)": (_below(math.inf), "Pass a finite number that is not negative."),
    "in [0, 1)": (_below(1.0), "Pass a number from 0 to less than 1."),
    ">= 0": (lambda value: isinstance(value, Real) and float(value) >= 0.0, "Pass 0 to clip nothing."),
    "True or False": (lambda value: isinstance(value, bool), "Pass one of them."),
}

# By the name of a hyperparameter; what has another name is a flag.
_RANGES = {
    "lr": "in [0, inf)",
    "betas": "in [0, 1)",
    "eps": "in [0, inf)",
    "weight_decay": "in [0, inf)",
    "momentum": "in [0, 1)",
    "trust_coefficient": "in [0, inf)",
    "max_grad_norm": ">= 0",
}


def check_values(where: str, group: dict[str, Any], names: Iterable[str], betas: int) -> None:
    """Checks hyperparameters of these names; ``betas``, if among them, is as many numbers.

    Raises:
        ValueError: one outside its range.
    """
    for key in names:
        contract, values = _RANGES.get(key, "True or False"), (group[key],)
        if key == "betas":
            values = group[key]
            fits = isinstance(values, (tuple, list)) and len(values) == betas
            require(fits, where, f"betas as a tuple of {betas}", values, "Pass numbers from 0 to less than 1.")
        keeps, remedy = _CONTRACTS[contract]
        for value in values:
            require(keeps(value), where, f"{key} {contract}", repr(value), remedy)


class Edits:
    """Checks the hyperparameters of groups in each step, but those that were the same in the last one."""

    def __init__(self) -> None:
        self._known: dict[int, list[Any]] = {}  # by position of the group

    def check(self, optimizer: FusedOptimizer, index: int, group: dict[str, Any]) -> None:
        """A learning rate that is a tensor is not read, for which the host would wait.

        Raises:
            ValueError: what the constructor would refuse.
        """
        where = optimizer._name
        try:
            # Of all rules lr comes first; the last one is torch's own.
            lr, *values = [group[name] for name in optimizer.defaults if name != "differentiable"]
        except KeyError as error:
            contract, got = f"groups with {', '.join(optimizer.defaults)}", f"no {error.args[0]}"
            remedy = "Let add_param_group make the group, which adds what is missing."
            raise ValueError(message(where, contract, got, remedy)) from None
        is_known = self._known.get(index) == values
        if isinstance(lr, Tensor) or not is_known:
            check_dtypes(where, group["state_dtype"], lr)
        if not isinstance(lr, Tensor):
            check_values(where, group, ["lr"], 0)
        if not is_known:
            optimizer._check_group(group)
            # A list, which may be edited in place, is none that is known.
            self._known[index] = [tuple(value) if isinstance(value, list) else value for value in values]


def check_dtypes(where: str, state_dtype: object, lr: object) -> None:
    """Raises ValueError for a dtype of states, or of an lr that is a tensor, that kernels do not take."""
    contract = 'state_dtype None (float32), "param", torch.float32, torch.bfloat16 or torch.float16'
    require(state_dtype in (None, "param", *STATE_DTYPES), where, contract, state_dtype, "Leave it at None.")
    if isinstance(lr, Tensor):
        contract = "lr as a number or a tensor of one element"
        require(lr.numel() == 1, where, contract, lr.numel(), "Use a 0-dim tensor.")
        fits = lr.dtype == torch.float32 or (lr.dtype == torch.float64 and lr.device.type == "cpu")
        require(fits, where, "an lr of float32, or of float64 on the CPU", lr.dtype, "Convert it.")


def check_places(where: str, rule: StepOp, group: dict[str, Any], params: Iterable[Tensor]) -> None:
    """Checks what depends on where a group's parameters are.

    Raises:
        ValueError: an lr of a capturable optimizer on another device; an unknown backend.
        RuntimeError: a backend that was asked for and cannot run there.
    """
    check_backend(where, group["backend"])
    lr, backend = group["lr"], requested(group["backend"])
    for p in params:
        if group["capturable"] and isinstance(lr, Tensor):
            require(lr.device == p.device, where, f"a capturable lr on {p.device}", lr.device, "Move it there.")
        if backend is not None:
            rule.choose(p.device.type, (p.dtype,), backend)


def one_max_grad_norm(where: str, groups: Sequence[dict[str, Any]]) -> float:
    """The max_grad_norm of all groups. Raises ValueError if they have several."""
    norms: list[float] = [group["max_grad_norm"] for group in groups] or [0.0]
    if any(norm != norms[0] for norm in norms):  # put into words only then: torch.compile may not know the numbers
        remedy = "Give it to the optimizer instead: it clips the norm of all gradients together."
        raise ValueError(message(where, "one max_grad_norm for all groups", ", ".join(map(repr, norms)), remedy))
    return norms[0]


def check_keys(where: str, group: dict[str, Any], known: Collection[str]) -> None:
    """Refuses misspelt hyperparameters. Others may keep what they like in a group, and schedulers do.

    Raises:
        ValueError: a key that is almost a hyperparameter's.
    """
    for key in sorted(group.keys() - set(known)):
        meant = difflib.get_close_matches(key, known, 1, _MISSPELT)
        contract = f"hyperparameters of a group among {', '.join(known)}"
        require(not meant, where, contract, repr(key), f"Write {', '.join(meant)}.")


def check_once(where: str, params: Sequence[Tensor]) -> None:
    """Raises ValueError for a parameter that is there twice: it would be stepped twice."""
    once = len({id(p) for p in params}) == len(params)
    require(once, where, "each parameter once", "one twice", "Give it to one group.")


def check_norm_group(where: str, norm_group: object) -> None:
    """Raises ValueError for what is neither None nor a group with this rank in it."""
    fits = torch.distributed.is_available() and isinstance(norm_group, torch.distributed.ProcessGroup)
    contract = "norm_group None or a torch.distributed.ProcessGroup that this rank belongs to"
    remedy = "Pass what torch.distributed.new_group() returns on the ranks of the group."
    require(norm_group is None or fits, where, contract, repr(norm_group), remedy)


def check_spread(where: str, norm_group: object, params: Iterable[Tensor]) -> None:
    """Raises ValueError for DTensors with a norm_group: they are divided over the ranks of their own meshes."""
    fits = norm_group is None or not any(map(is_sharded, params))
    remedy = "Leave norm_group out: the norm of DTensors is over all ranks without it."
    require(fits, where, "plain parameters with norm_group", "DTensors", remedy)


def check_parameter(where: str, p: Tensor) -> None:
    """Checks what every backend asks of a parameter.

    Raises:
        ValueError: a dtype that is not computed with, elements that share memory, or a DTensor that is a sum still to
            be made.
    """
    contract = "floating-point parameters of float32, bfloat16, float16 or float64"
    remedy = "Pass torch.view_as_real of it." if p.is_complex() else "Convert it, or leave it out."
    require(p.dtype in _PARAM_DTYPES, where, contract, p.dtype, remedy)
    overlap = any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True))
    require(not overlap, where, "parameters without overlapping elements", f"strides {p.stride()}", "Clone them.")
    check_placements(where, p)
