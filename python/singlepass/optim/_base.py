# SPDX-License-Identifier: Apache-2.0
"""What all optimizers share: gathering tensors, creating states, clipping, loss scaling, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._errors import message, require
from .._ops import Op
from .._ops.optim import StepOp
from ._buckets import Bucket, Sorter
from ._checks import (
    Edits,
    check_dtypes,
    check_keys,
    check_norm_group,
    check_once,
    check_parameter,
    check_places,
    check_spread,
    check_values,
    is_number,
    one_max_grad_norm,
)
from ._exchange import Exchange, Exchanges
from ._loading import Loading, state_dtype_for
from ._norm import Steps, add_up_norms, is_any_nonzero, measure, to_device
from ._shards import copy_like, is_laid_out_as, local, zeros_like

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Defaults that are checked elsewhere, or, the last one, torch's own.
_NO_RANGE = ("lr", "state_dtype", "backend", "seed", "differentiable")

# The groups of a step, each with its buckets.
Work = list[tuple[dict[str, Any], list[Bucket]]]


class FusedOptimizer(Optimizer):
    """Base of the optimizers: a subclass names its rule and turns a group into the rule's hyperparameters."""

    rule: ClassVar[StepOp]
    steps_where_uncounted: ClassVar[float] = 0.0  # the count of a saved state that has none
    # Whether the pass before an update changes states: whether all ranks can go on must be known before.
    _norms_follow_states: ClassVar[bool] = False
    _loading: ClassVar[type[Loading]] = Loading

    # Where it is True, GradScaler leaves unscaling and skipping to step(), through `grad_scale` and `found_inf`.
    _step_supports_amp_scaling: bool

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        maximize: bool,
        capturable: bool,
        state_dtype: torch.dtype | str | None,
        stochastic_rounding: bool,
        unscale_in_step: bool,
        backend: str | None,
        norm_group: ProcessGroup | None = None,
    ) -> None:
        contract, remedy = "unscale_in_step True or False", "Pass one of them."
        self._require(isinstance(unscale_in_step, bool), contract, repr(unscale_in_step), remedy)
        check_norm_group(self._name, norm_group)
        self._step_supports_amp_scaling = unscale_in_step
        self._norm_group = norm_group  # over whose ranks plain tensors are spread
        defaults = defaults | {
            "maximize": maximize,
            "capturable": capturable,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "backend": backend,
            "seed": torch.initial_seed() & (2**63 - 1),
        }
        self._forget_steps()
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyperparameters outside their range; the learning rate is checked apart."""
        self._check_values(group, [name for name in self.defaults if name not in _NO_RANGE])

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's hyperparameters, as the op names them: beta1 is the first of ``betas``."""
        betas = {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}
        return {name: betas[name] if name in betas else group[name] for name in self.rule.hyper}

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that this group needs: all but the maximum of AMSGrad."""
        return tuple(name for name in self.rule.states if not name.startswith("max_") or group["amsgrad"])

    def _state_dtype_of(self, name: str, p: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The dtype of a new state."""
        if p.dtype == torch.float64:
            return torch.float64
        dtype = group["state_dtype"]
        return torch.float32 if dtype is None else p.dtype if dtype == "param" else dtype

    def _clipping(self) -> tuple[float, float]:
        """(max_norm, eps) of clipping by the global norm; max_norm 0 for none."""
        clips = "max_grad_norm" in self.defaults
        return one_max_grad_norm(self._name, self.param_groups) if clips else 0.0, 0.0

    def _prepare(
        self, work: Work, grad_scale: Tensor | None, found_inf: Tensor | None, exchange: Exchange
    ) -> Tensor | None:
        """Called before the first bucket is stepped; returns found_inf."""
        return found_inf

    def _role_of(self, p: Tensor) -> str:
        """Not empty for parameters that a subclass steps in another way; one bucket has one role."""
        return ""

    def _op(self, role: str) -> Op:
        """The op that steps parameters of this role."""
        return self.rule

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require(self, condition: bool, contract: str, got: object, remedy: str) -> None:
        require(condition, self._name, contract, got, remedy)

    def _check_values(self, group: dict[str, Any], names: Iterable[str]) -> None:
        check_values(self._name, group, names, sum(name.startswith("beta") for name in self.rule.hyper))

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Checks the hyperparameters of groups that are to be the optimizer's."""
        for group in groups:
            check_dtypes(self._name, group["state_dtype"], group["lr"])
            self._check_values(group, ["lr"])
            self._check_group(group)
        if "max_grad_norm" in self.defaults:
            one_max_grad_norm(self._name, groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, after checking its tensors and hyperparameters; nothing is added if one is refused."""
        group = self.defaults | {key: value for key, value in param_group.items() if key != "params"}
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError(message(self._name, "parameters in an order", "a set", "Use a list."))
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [t for t in (entry[1] if isinstance(entry, tuple) else entry for entry in params) if _is_tensor(t)]
        for p in tensors:
            if not torch.nn.parameter.is_lazy(p):  # which is checked once it has a shape, in the first step
                check_parameter(self._name, p)
        check_once(self._name, [p for g in self.param_groups for p in g["params"]] + tensors)
        check_spread(self._name, self._norm_group, tensors)
        contract, remedy = "one norm_group for all groups", "Give it to the optimizer instead."
        self._require(group.get("norm_group", self._norm_group) is self._norm_group, contract, "another", remedy)
        check_keys(self._name, group, self.defaults)
        self._check_groups([*self.param_groups, group])
        check_places(self._name, self.rule, group, tensors)
        if group["capturable"] and tensors and not isinstance(group["lr"], Tensor):
            # A captured step then reads the learning rate that a scheduler writes.
            param_group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=tensors[0].device)
        param_group["params"] = params
        super().add_param_group(param_group)  # which keeps this very dict

    def __repr__(self) -> str:
        """torch's, without the seed of an optimizer that draws no random numbers."""
        lines = super().__repr__().splitlines()
        drawn = any(group["stochastic_rounding"] for group in self.param_groups)
        return "\n".join(line for line in lines if drawn or not line.startswith("    seed: "))

    def __getstate__(self) -> dict[str, Any]:
        names = ("_step_supports_amp_scaling", "_norm_group")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Drops what is derived from earlier steps, and would be derived again."""
        self._edits = Edits()
        self._sorter = Sorter()
        self._exchanges = Exchanges()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient that is sparse or of another shape than its parameter; nothing is changed. One on
                another device, as only a new ``p.data`` can bring about: parameters of its dtype and group are not
                changed.
            ValueError: groups that were edited into what the constructor refuses (of an ``lr`` that is a tensor the
                value is not read), or a parameter that no longer has the shape of its state; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not isinstance(group["params"], (list, tuple)):
                group["params"] = list(group["params"])
        with self._exchanges.begin(self) as exchange:
            work = self._gather()
            if self._may_ask_for_states(exchange.is_first) and not is_any_nonzero(work, bool(self.state), exchange):
                self._make_states(work)
            else:
                self._step_groups(work, exchange)
        return loss

    def _rounds(self, is_first: bool) -> list[tuple[int, bool]]:
        """What ranks with parts of tensors add up in a step, as :class:`Exchange` takes it.

        The same on all ranks: states, which a rank without a gradient has not, do not decide it.
        """
        if self._norm_group is not None:  # whose ranks may differ in all else, and have no tensors in common
            return [(1, True)] * self._measures()
        rounds = [(1, True)] if is_first and self._may_ask_for_states(is_first) else []
        if self._measures() or self._norms_follow_states:
            rounds.append((1, True))
        return rounds + [(2, False)] * self.rule.has_norms

    def _measures(self) -> bool:
        """Whether a step looks at all gradients first."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return self._clipping()[0] > 0.0 or (grad_scale is not None and found_inf is None)

    def _gather(self) -> Work:
        """The parameters that have gradients, sorted. Raises before anything is changed."""
        work: Work = []
        first_id = 0
        for index, group in enumerate(self.param_groups):
            if not torch.compiler.is_compiling():
                self._edits.check(self, index, group)
            work.append((group, self._sorter.sort(self, index, first_id)))
            first_id += len(group["params"])
        if self._sorter.has_sorted:
            params = [p for group in self.param_groups for p in group["params"]]
            check_once(self._name, params)
            check_spread(self._name, self._norm_group, params)
        return work

    def _may_ask_for_states(self, is_first: bool) -> bool:
        """Whether this may be the step with which ``torch.distributed.checkpoint`` makes an optimizer create states.

        There are none yet on any rank, every learning rate is 0, and so is every element of every gradient.
        """
        if (self.state and not is_first) or torch.compiler.is_compiling() or is_capturing():
            return False
        rates = [group.get("lr") for group in self.param_groups]
        return all(is_number(rate) and float(rate) == 0.0 for rate in rates)

    def _make_states(self, work: Work) -> None:
        for group, buckets in work:
            names = self._state_names(group)
            for bucket in buckets:
                for p in bucket.owners:
                    self._state_of(p, group, names)

    def _step_groups(self, work: Work, exchange: Exchange) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        hypers = [(self._hyper(group), self._state_names(group)) for group, _ in work]
        if self._measures() or (self._norms_follow_states and not exchange.is_alone):
            buckets = [bucket for _, some in work for bucket in some]
            options = (*self._clipping(), grad_scale, found_inf, exchange)
            grad_scale, found_inf, squares = measure(self._name, buckets, *options)
            asks = exchange.is_spread and not self.state and self._may_ask_for_states(exchange.is_first)
            if asks and squares is not None and not squares:
                self._make_states(work)
                return
        found_inf = self._prepare(work, grad_scale, found_inf, exchange)
        steps: Steps = [
            (bucket, group, names, hyper)
            for (group, buckets), (hyper, names) in zip(work, hypers, strict=True)
            for bucket in buckets
        ]
        if self.rule.has_norms and exchange.rounds:
            found_inf = add_up_norms(self, steps, grad_scale, found_inf, exchange)
        for step in steps:
            self._step_bucket(*step, grad_scale, found_inf)

    def _step_bucket(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        names: tuple[str, ...],
        hyper: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        states = self._states_of(bucket, group, names)
        grad_scale, found_inf = to_device(grad_scale, bucket.device), to_device(found_inf, bucket.device)
        scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
        self._run(bucket, group, states, hyper | {"maximize": group["maximize"]} | scaling)
        if not torch.compiler.is_compiling():
            # Kernels write behind autograd's back: a graph that still needs the old values must notice.
            torch.autograd.graph.increment_version(bucket.owners)

    def _run(
        self, bucket: Bucket, group: dict[str, Any], states: dict[str, list[Tensor]], options: dict[str, Any]
    ) -> None:
        """Calls the op of the bucket's role."""
        lists = [states.get(name, []) for name in self.rule.states]
        if bucket.has_parts:
            lists = [list(map(local, values)) for values in lists]
        if self.rule.scale is not None:
            lists.append(states[self.rule.scale])
        lists = [bucket.params, bucket.grads, *lists, states.get("step", [])]
        stochastic = group["stochastic_rounding"]
        options["seed"] = group["seed"] if stochastic else None
        options["ids"] = bucket.ids if stochastic else []
        options["offsets"] = bucket.offsets if stochastic else []
        lr = self._lr(group, bucket.device)
        if bucket.caller is None:
            self.rule.on(bucket.backend)(*lists, lr, **options)
        else:
            bucket.caller.step(self.rule, lists, lr, **options)

    def _has_step(self, group: dict[str, Any]) -> bool:
        """Whether the op counts steps, for its rule or for what it draws."""
        return self.rule.counts or group["stochastic_rounding"]

    def _states_of(self, bucket: Bucket, group: dict[str, Any], names: tuple[str, ...]) -> dict[str, list[Tensor]]:
        """The states of a bucket's parameters by name, with what is missing made."""
        keys = names if self.rule.scale is None else (*names, self.rule.scale)
        if self._has_step(group):
            keys = (*keys, "step")
        if not torch.compiler.is_compiling():
            if len(self.state) == len(bucket.owners) and all(map(is_, self.state, bucket.owners)):
                states = list(self.state.values())  # without the hash of each tensor
            else:
                states = [self.state[p] for p in bucket.owners]
            try:
                return {key: [state[key] for state in states] for key in keys}
            except KeyError:
                pass
        states = [self._state_of(p, group, names) for p in bucket.owners]
        return {key: [state[key] for state in states] for key in keys}

    def _state_of(self, p: Tensor, group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        """The parameter's state, with what is missing made."""
        state: dict[str, Any] = self.state[p]
        if self._has_step(group) and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in names:
            if name not in state:
                dtype = self._state_dtype_of(name, p, group)
                state[name] = zeros_like(p, dtype)
        if self.rule.scale is not None and self.rule.scale not in state:
            state[self.rule.scale] = self._new_scale(p, group)
        return state

    def _new_scale(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The scalar of a new state, of rules that have one."""
        raise NotImplementedError

    def _follow(self, p: Tensor) -> None:
        """Brings the parameter's states into its present layout, and into a dtype that its kernels take: what
        ``model.to(...)`` may have changed."""
        state = self.state.get(p, {})
        for name in self.rule.states:
            old = state.get(name)
            if old is None:
                continue
            contract, got = f"{name} of shape {tuple(p.shape)}, as its parameter", tuple(old.shape)
            self._require(old.shape == p.shape, contract, got, "Delete the state of a parameter of another shape.")
            dtype = state_dtype_for(p, old.dtype)
            if dtype != old.dtype or not is_laid_out_as(p, old):
                state[name] = copy_like(p, old, dtype)

    @staticmethod
    def _lr(group: dict[str, Any], device: torch.device) -> Tensor:
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return torch.tensor(lr, dtype=torch.float64, device="cpu")
        return lr if lr.device.type == "cpu" else lr.to(device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of the official implementation.

        States keep their saved dtypes. Options missing from the saved groups keep their present values, and so do
        ``backend`` and ``capturable``. If ``lr`` is a tensor, the loaded value is written into it.

        Raises:
            ValueError: another number of groups or of parameters, states of other names or shapes, or hyperparameters
                outside their range; nothing is changed.
        """
        self._loading(self).load(state_dict, super().load_state_dict)


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
