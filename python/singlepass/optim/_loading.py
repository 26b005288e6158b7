# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's ``load_state_dict`` does around torch's own."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import require
from .._ops.optim import RULES
from ._checks import STATE_DTYPES
from ._shards import copy_like, whole

if TYPE_CHECKING:
    from ._base import FusedOptimizer

_NOT_LOADED = ("step", "buffer", "backend", "capturable")
_ALL_STATES = {name for rule in RULES.values() for name in rule.lists}


class Loading:
    """One call of ``load_state_dict``: what comes before torch loads all that is not the rule's own, and after it.

    torch would cast states to their parameters' dtypes, and replace tensors of learning rates. So what is the rule's is
    taken out of the state dict before, checked and copied, and put in its place afterwards. Keys that others keep in
    states and groups are torch's to load.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self.groups: list[dict[str, Any]] = []  # as they were
        self.states: dict[Tensor, dict[str, Any]] = {}  # the rule's, to be

    def load(self, state_dict: dict[str, Any], load_rest: Callable[[dict[str, Any]], None]) -> None:
        """Loads all; ``load_rest`` is torch's method. Hooks have their places before our part and after it."""
        optimizer, state_dict = self.optimizer, state_dict.copy()
        hooks_before = optimizer._optimizer_load_state_dict_pre_hooks
        hooks_after = optimizer._optimizer_load_state_dict_post_hooks
        for before in list(hooks_before.values()):
            result = before(optimizer, state_dict)
            state_dict = state_dict if result is None else result
        left = self.before(state_dict)
        optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
        optimizer._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            load_rest(left)
        finally:
            optimizer._optimizer_load_state_dict_pre_hooks = hooks_before
            optimizer._optimizer_load_state_dict_post_hooks = hooks_after
        self.after()
        for after in list(hooks_after.values()):
            after(optimizer)

    def before(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks everything, and returns what is left for torch. Nothing is changed yet."""
        self.groups, saved_groups = self.optimizer.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in self.groups] != [len(saved["params"]) for saved in saved_groups]:
            return state_dict  # torch reports the mismatch
        loaded = [_loaded_part(saved) for saved in saved_groups]
        merged = [group | part for group, part in zip(self.groups, loaded, strict=True)]
        states = dict(state_dict["state"])
        for group, new, saved in zip(self.groups, merged, saved_groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in states:
                    self.states[p], states[key] = self._divide(states[key], p, new, saved)
        self.optimizer._check_groups(merged)
        return {**state_dict, "state": states, "param_groups": loaded}

    def _divide(
        self, state: Mapping[str, Any], p: Tensor, group: dict[str, Any], saved: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A saved state as the rule's own part, with copies of its tensors, and the keys that others put there."""
        where, rule = self.optimizer._name, self.optimizer.rule
        foreign = ", ".join(sorted(_ALL_STATES.difference(rule.lists) & state.keys()))
        remedy = "Load it into the optimizer that wrote it."
        require(not foreign, where, f"states {', '.join(rule.lists)}", foreign, remedy)
        own = {*rule.lists, "step"}
        others = {name: value for name, value in state.items() if name not in own}
        if others and len(others) == len(state):
            return {}, others
        adopted = _adopt_tensors(where, state, p, self.optimizer._state_names(group))
        if rule.scale is not None and rule.scale in state:
            adopted[rule.scale] = _scalar_like(where, rule.scale, state[rule.scale], p)
        if self.optimizer._has_step(group) or "step" in state:
            count = state.get("step", saved.get("step", self.optimizer.steps_where_uncounted))
            adopted["step"] = _scalar_like(where, "step", count, p)
        return adopted, others

    def after(self) -> None:
        """Puts the rule's states, and what groups keep of what they had, where they belong."""
        optimizer = self.optimizer
        for p, state in self.states.items():
            optimizer.state[p].update(state)
        old_rates = [group["lr"] for group in self.groups]
        rates = [float(new.get("lr", old)) for new, old in zip(optimizer.param_groups, old_rates, strict=True)]
        for i, (new, old) in enumerate(zip(optimizer.param_groups, self.groups, strict=True)):
            for key in old.keys() - new.keys():
                new[key] = old[key]
            new["lr"] = rates[i]
            if isinstance(old["lr"], Tensor):
                first = next(j for j, rate in enumerate(old_rates) if rate is old["lr"])  # that shares this tensor
                tensor = old["lr"] if rates[first] == rates[i] else old["lr"].clone()
                new["lr"] = tensor.fill_(rates[i])


def _loaded_part(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group without the counters of official implementations, and without what says where and how to run."""
    part = {key: value for key, value in saved.items() if key not in _NOT_LOADED}
    rate = part.get("lr")
    return part | {"lr": rate.item()} if isinstance(rate, Tensor) and rate.numel() == 1 else part


def _adopt_tensors(where: str, state: Mapping[str, Any], p: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Copies of the named states, with the parameter's device and strides.

    Raises:
        ValueError: a state that is missing, or of another shape than its parameter.
    """
    missing = [name for name in names if state.get(name) is None]
    require(not missing, where, f"states {', '.join(names)}", f"no {', '.join(missing)}", "Load a whole state.")
    adopted: dict[str, Any] = {}
    for name in names:
        value = state[name]
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
        fits = value.is_floating_point() and value.layout == torch.strided
        require(fits, where, f"{name} as a dense floating-point tensor", value.dtype, "Load this rule's state.")
        got = tuple(value.shape)
        require(value.shape == p.shape, where, f"{name} of shape {tuple(p.shape)}", got, "Load this model's state.")
        dtype = state_dtype_for(p, value.dtype)
        adopted[name] = copy_like(p, value, dtype)
    return adopted


def state_dtype_for(p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state that was made or saved in this one: kernels take no float64, and none takes float8."""
    kept = (*STATE_DTYPES, torch.float64) if p.dtype == torch.float64 else STATE_DTYPES
    return dtype if dtype in kept else torch.float32


def _scalar_like(where: str, name: str, value: Any, p: Tensor) -> Tensor:
    """A float32 tensor of no dimensions on the parameter's device."""
    value = whole(value) if isinstance(value, Tensor) else value
    fits = isinstance(value, (Real, Tensor)) and (not isinstance(value, Tensor) or value.numel() == 1)
    require(fits, where, f"{name} as one number", repr(value), "Load a whole state.")
    scalar = torch.as_tensor(value, dtype=torch.float32, device=p.device).reshape(()).clone()
    fits = scalar.device.type == "meta" or name != "step" or 0.0 <= scalar.item() < math.inf
    require(fits, where, f"{name} of 0 or more", value, "Load a whole state.")
    return scalar
