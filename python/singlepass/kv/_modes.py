# SPDX-License-Identifier: Apache-2.0
"""What torch's modes mean for a cache: it outlives inference mode, and has no gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._autograd import TANGENT, has_tangent, in_forward_mode
from .._errors import message

P = ParamSpec("P")
R = TypeVar("R")


def lasting(method: Callable[P, R]) -> Callable[P, R]:
    """A method whose tensors can be written to later, though it be called in inference mode."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class Lasting:
    """Something whose copies can be written to later, though they be made in inference mode."""

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = object.__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other


class _Cut(torch.autograd.Function):
    """A result without its gradient. To drop it silently would train a model wrongly."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        contract, got = "no gradient through compressed tokens", "a backward pass"
        raise ValueError(message("singlepass.kv", contract, got, "Train without the cache."))


def cut(out: Tensor, *sources: Tensor) -> Tensor:
    """``out``, of which asking for a gradient raises if it came of tensors that need one.

    Raises:
        ValueError: some of these have tangents of forward mode.
    """
    if in_forward_mode() and any(map(has_tangent, sources)):
        contract = "no derivative through compressed tokens"
        raise ValueError(message("singlepass.kv", contract, TANGENT, "Train without the cache."))
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in sources)
    return _Cut.apply(out, *sources) if needed else out
