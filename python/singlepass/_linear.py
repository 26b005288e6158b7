# SPDX-License-Identifier: Apache-2.0
"""What families that replace linear layers ask about them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules import module as _torch

from ._errors import message

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_call(module: nn.Module) -> str | None:
    """What is done to calls of this very module: hooks, or a forward method put in the place of its class's."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "hooks"
    # As accelerate does to move weights that are kept elsewhere.
    changed = getattr(module.forward, "__func__", None) is not type(module).forward
    return "a forward method of its own" if changed else None


def is_just_linear(module: nn.Module) -> bool:
    """Whether calling it only multiplies by its weight and adds its bias: there is no adapter, hook or patch."""
    return type(module) is nn.Linear and own_call(module) is None and not _torch._has_any_global_hook()


def require_own_calls(where: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError for a module, by name, that is to be replaced and whose calls somebody has changed."""
    for name, module in modules:
        what = own_call(module)
        if what is not None:
            contract, got = "layers without hooks to replace, as hooks would be lost", f"{what} at {name}"
            raise ValueError(message(where, contract, got, "Convert first, then register hooks, wrap or offload."))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, told without importing that: a linear layer with a transposed weight."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module | None) -> bool:
    return type(module) is nn.Linear or (module is not None and is_conv1d(module))


@torch.no_grad()
def as_linear(module: nn.Module) -> nn.Linear:
    """A torch.nn.Linear itself, or one with the transposed weight, copied, and the very bias of a Conv1D."""
    if not is_conv1d(module):
        assert isinstance(module, nn.Linear)
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.mT.contiguous(), requires_grad=weight.requires_grad)
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(module.training)
