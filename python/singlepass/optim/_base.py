# SPDX-License-Identifier: Apache-2.0
"""What all optimizers share: gathering tensors, creating states, clipping, loss scaling, saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._dispatch import choose, implementation, requested
from .._errors import message, require
from .._ops.optim import RULES, Rule
from ._checks import check_keys, check_parameter, check_values
from ._loading import adopt_tensors, merge_group, scalar_like

_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Bucket:
    """Parameters of one group that one call of the op can take."""

    backend: str
    device: torch.device
    params: list[Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # positions in the group
    ids: list[int] = field(default_factory=list)  # positions in the optimizer
    role: str = ""  # of parameters that a subclass steps in another way
    grads: list[Tensor] = field(default_factory=list)  # of the present step


class FusedOptimizer(Optimizer):
    """Base of the optimizers: a subclass names its rule and turns a group into the rule's hyperparameters."""

    rule_name: ClassVar[str]
    counts_steps: ClassVar[bool] = True
    steps_where_uncounted: ClassVar[float] = 0.0  # the count of a saved state that has none

    # GradScaler then leaves unscaling and skipping to step(), through `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        maximize: bool,
        capturable: bool,
        state_dtype: torch.dtype | str | None,
        stochastic_rounding: bool,
        backend: str | None,
    ) -> None:
        defaults = defaults | {
            "maximize": maximize,
            "capturable": capturable,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "backend": backend,
            "seed": torch.initial_seed() & (2**63 - 1),
        }
        self._buckets: dict[int, tuple[set[torch.dtype], list[Bucket]]] = {}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyperparameters outside their range."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's hyperparameters, as the op names them."""
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that this group needs."""
        return self._rule.states

    def _state_dtype_of(self, name: str, p: Tensor, group: dict[str, Any]) -> torch.dtype:
        """The dtype of a new state."""
        if p.dtype == torch.float64:
            return torch.float64
        dtype = group["state_dtype"]
        return torch.float32 if dtype is None else p.dtype if dtype == "param" else dtype

    def _clipping(self) -> tuple[float, float]:
        """(max_norm, eps) of clipping by the global norm; max_norm 0 for none."""
        return 0.0, 0.0

    def _before_step(
        self, bucket: Bucket, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> bool:
        """Called once the states exist. False leaves the bucket's parameters alone in this step."""
        return True

    def _role_of(self, p: Tensor) -> str:
        """Not empty for parameters that a subclass steps in another way; one bucket has one role."""
        return ""

    def _op_name(self, role: str) -> str:
        """The op that steps parameters of this role."""
        return self._rule.op_name

    @property
    def _rule(self) -> Rule:
        return RULES[self.rule_name]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require(self, condition: bool, contract: str, got: object, remedy: str) -> None:
        require(condition, self._name, contract, got, remedy)

    def _check_values(self, group: dict[str, Any], **contracts: str) -> None:
        """Checks hyperparameters against contracts of ``_checks``."""
        check_values(self._name, group, contracts, sum(name.startswith("beta") for name in self._rule.hyper_names))

    def _check_max_grad_norm(self, group: dict[str, Any]) -> None:
        most = group["max_grad_norm"]
        fits = isinstance(most, Real) and float(most) >= 0.0
        self._require(fits, "max_grad_norm >= 0", repr(most), "Pass 0 to clip nothing.")
        same = all(other["max_grad_norm"] == most for other in self.param_groups)
        remedy = "Give it to the optimizer instead: it clips the norm of all gradients together."
        self._require(same, "one max_grad_norm for all groups", most, remedy)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, after checking its tensors and hyperparameters; nothing is added if one is refused."""
        group = self.defaults | {key: value for key, value in param_group.items() if key != "params"}
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError(message(self._name, "parameters in an order", "a set", "Use a list."))
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [t for t in (entry[1] if isinstance(entry, tuple) else entry for entry in params) if _is_tensor(t)]
        for p in tensors:
            check_parameter(self._name, p)
        present = [id(p) for g in self.param_groups for p in g["params"]] + [id(p) for p in tensors]
        self._require(len(set(present)) == len(present), "each parameter once", "one twice", "Give it to one group.")
        check_keys(self._name, group, self.defaults)
        self._check_common(group, tensors)
        self._check_group(group)
        if group["capturable"] and tensors and not isinstance(group["lr"], Tensor):
            # A captured step then reads the learning rate that a scheduler writes.
            param_group = param_group | {"lr": torch.tensor(group["lr"], dtype=torch.float32, device=tensors[0].device)}
        super().add_param_group(param_group | {"params": params})
        self._buckets.clear()

    def _check_common(self, group: dict[str, Any], params: list[Tensor]) -> None:
        dtype = group["state_dtype"]
        self._require(
            dtype is None or dtype == "param" or dtype in _STATE_DTYPES,
            'state_dtype None (float32), "param", torch.float32, torch.bfloat16 or torch.float16',
            dtype,
            "Leave it at None.",
        )
        lr = group["lr"]
        if isinstance(lr, Tensor):
            self._require(
                lr.numel() == 1, "lr as a number or a tensor of one element", lr.numel(), "Use a 0-dim tensor."
            )
            fits = lr.dtype == torch.float32 or (lr.dtype == torch.float64 and lr.device.type == "cpu")
            self._require(fits, "an lr of float32, or of float64 on the CPU", lr.dtype, "Convert it.")
        flags = dict.fromkeys(("maximize", "capturable", "stochastic_rounding"), "True or False")
        self._check_values(group, lr="in [0, inf)", **flags)
        for p in params if group["capturable"] and isinstance(lr, Tensor) else ():
            self._require(lr.device == p.device, f"a capturable lr on {p.device}", lr.device, "Move it there.")
        backend = requested(group["backend"])
        if backend is not None:
            for p in params:
                choose(self._rule.op_name, p.device.type, (p.dtype,), backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a sparse gradient, and nothing is changed; one of another shape or device than its parameter,
                as only a new ``p.data`` can bring about, and its group is not changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups()
        return loss

    def _step_groups(self) -> None:
        buckets = [(group, self._gather(index, group)) for index, group in enumerate(self.param_groups)]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        max_norm, eps = self._clipping()
        if max_norm > 0.0 or (grad_scale is not None and found_inf is None):
            grad_scale, found_inf = self._measure(buckets, max_norm, eps, grad_scale, found_inf)

        for group, members in buckets:
            hyper, names = self._hyper(group), self._state_names(group)
            for bucket in members:
                self._step_bucket(bucket, group, names, hyper, grad_scale, found_inf)

    def _step_bucket(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        names: tuple[str, ...],
        hyper: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        states = [self._state_of(p, group, names) for p in bucket.params]
        grad_scale, found_inf = _to(grad_scale, bucket.device), _to(found_inf, bucket.device)
        if not self._before_step(bucket, group, grad_scale, found_inf):
            return
        scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
        self._run(bucket, group, names, states, hyper | {"maximize": group["maximize"]} | scaling)
        if not torch.compiler.is_compiling():
            # Kernels write behind autograd's back: a graph that still needs the old values must notice.
            torch.autograd.graph.increment_version(bucket.params)

    def _run(
        self,
        bucket: Bucket,
        group: dict[str, Any],
        names: tuple[str, ...],
        states: list[dict[str, Any]],
        options: dict[str, Any],
    ) -> None:
        """Calls the op of the bucket's role."""
        lists = [[s[name] for s in states] if name in names else [] for name in self._rule.states]
        if self._rule.scale is not None:
            lists.append([s[self._rule.scale] for s in states])
        stochastic = group["stochastic_rounding"]
        implementation(self._rule.op_name, bucket.backend)(
            bucket.params,
            bucket.grads,
            *lists,
            [s["step"] for s in states] if self.counts_steps or stochastic else [],
            self._lr(group, bucket.device),
            seed=group["seed"] if stochastic else None,
            ids=bucket.ids if stochastic else [],
            **options,
        )

    def _gather(self, index: int, group: dict[str, Any]) -> list[Bucket]:
        """The group's parameters with gradients, by device and by what their dtypes and layouts allow."""
        grads = [p.grad for p in group["params"]]
        present = [g for g in grads if g is not None]
        dtypes = {g.dtype for g in present}
        self._check_grads({g.layout for g in present}, dtypes)
        complete = len(present) == len(grads)
        known, buckets = self._buckets.get(index, (None, []))
        if not complete or known != dtypes:
            buckets = self._make_buckets(index, group, grads)
            if complete:
                self._buckets[index] = dtypes, buckets
        for bucket in buckets:
            bucket.grads = [grads[offset] for offset in bucket.offsets]
        return buckets

    def _check_grads(self, layouts: set[torch.layout], dtypes: set[torch.dtype]) -> None:
        """Refuses gradients that no backend can take, before anything is changed."""
        for layout in layouts - {torch.strided}:
            raise RuntimeError(
                message(self._name, "dense gradients", f"a {layout} one", "Create the embedding with sparse=False.")
            )
        for dtype in dtypes:
            if not dtype.is_floating_point:
                raise RuntimeError(message(self._name, "floating-point gradients", dtype, "Convert them."))

    def _make_buckets(self, index: int, group: dict[str, Any], grads: list[Tensor | None]) -> list[Bucket]:
        backend = requested(group["backend"])
        first_id = sum(len(g["params"]) for g in self.param_groups[:index])
        buckets: dict[tuple[torch.device, str, str], Bucket] = {}
        for offset, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
            if g is None:
                continue
            wanted = backend
            if not _is_dense(p):
                self._require(
                    backend in (None, "eager"),
                    "dense parameters for kernels",
                    f"shape {tuple(p.shape)} with strides {p.stride()}",
                    'Use backend="eager" or None.',
                )
                wanted = "eager"
            role = self._role_of(p)
            chosen = choose(self._op_name(role), p.device.type, (p.dtype, g.dtype), wanted)
            bucket = buckets.setdefault((p.device, chosen, role), Bucket(chosen, p.device, role=role))
            bucket.params.append(p)
            bucket.offsets.append(offset)
            bucket.ids.append(first_id + offset)
        return list(buckets.values())

    def _state_of(self, p: Tensor, group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        state = self.state[p]
        if len(state) == 0:
            if self.counts_steps or group["stochastic_rounding"]:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in names:
                dtype = self._state_dtype_of(name, p, group)
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return state

    @staticmethod
    def _lr(group: dict[str, Any], device: torch.device) -> Tensor:
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return torch.tensor(lr, dtype=torch.float64, device="cpu")
        return lr if lr.device.type == "cpu" else lr.to(device)

    def _measure(
        self,
        buckets: list[tuple[dict[str, Any], list[Bucket]]],
        max_norm: float,
        eps: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One read of all gradients: (divisor that unscales and clips, found_inf)."""
        grads: dict[torch.device, list[Tensor]] = {}
        for _, members in buckets:
            for bucket in members:
                grads.setdefault(bucket.device, []).extend(bucket.grads)
        wanted = requested(self.param_groups[0]["backend"])
        stats = []
        for device, present in grads.items():
            backend = choose("grad_norm", device.type, {g.dtype for g in present}, wanted)
            measure = implementation("grad_norm", backend)
            stats.append(measure(present, max_norm=max_norm, eps=eps, grad_scale=_to(grad_scale, device)))
        if not stats:
            return grad_scale, found_inf
        _, divisor, nonfinite = stats[0] if len(stats) == 1 else _join(stats, max_norm, eps, grad_scale)
        return divisor, nonfinite if grad_scale is not None and found_inf is None else found_inf

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` of this class, or of the official implementation, returned.

        States keep the dtypes that they were saved with. What the saved groups don't have keeps its present value, and
        so do ``backend`` and ``capturable``; a learning rate in a tensor stays in that tensor.

        Raises:
            ValueError: another number of groups or of parameters, or another optimizer's states; nothing is changed.
        """
        saved_groups = state_dict["param_groups"]
        groups = [merge_group(current, saved) for current, saved in zip(self.param_groups, saved_groups, strict=False)]
        groups += saved_groups[len(groups) :]  # torch reports the mismatch
        states: dict[Tensor, dict[str, Any]] = {}
        for current, group, saved in zip(self.param_groups, groups, saved_groups, strict=False):
            for p, key in zip(current["params"], saved["params"], strict=False):
                if key in state_dict["state"]:
                    states[p] = self._adopt(state_dict["state"][key], p, group, saved)
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        # torch casts states to their parameter's dtype: they come back as they were saved.
        for p, state in states.items():
            self.state[p] = state
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate.fill_(float(group["lr"])) if isinstance(rate, Tensor) else float(group["lr"])
        self._buckets.clear()

    def _adopt(self, state: dict[str, Any], p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        names, scale = self._state_names(group), self._rule.scale
        others = {name for rule in RULES.values() for name in rule.lists if name not in self._rule.lists}
        foreign = ", ".join(sorted(others & state.keys()))
        remedy = "Load it into the optimizer that wrote it."
        self._require(not foreign, f"states {', '.join(self._rule.lists)}", foreign, remedy)
        adopted = adopt_tensors(self._name, state, p, names, () if scale is None else (scale,))
        if self.counts_steps or group["stochastic_rounding"]:
            count = state.get("step", saved.get("step", self.steps_where_uncounted))
            adopted["step"] = scalar_like(count, p)
        return adopted


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _to(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)


def _join(stats: list[Tensor], max_norm: float, eps: float, grad_scale: Tensor | None) -> Tensor:
    """What grad_norm would say of the gradients of several devices together, on the first of them."""
    device = stats[0].device
    norm = torch.linalg.vector_norm(torch.stack([s[0].to(device) for s in stats]).double())
    scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(device).double().reshape(())
    clip = max_norm / (norm + eps) if max_norm > 0.0 else torch.ones_like(norm)
    divisor = torch.where(clip >= 1.0, scale, scale / clip)
    return torch.stack((norm, divisor, (~norm.isfinite()).double())).float()


def _is_dense(t: Tensor) -> bool:
    """Whether the strides order the elements without gaps: then, and only then, new tensors like it keep them."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()
