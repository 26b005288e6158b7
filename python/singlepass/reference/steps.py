# SPDX-License-Identifier: Apache-2.0
"""A step over lists of tensors in eager PyTorch: what all rules share, whose mathematics stands in ``optim.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._errors import require
from .._ops import optim as ops
from .philox import random_halves, stochastic_bfloat16


class Coefficients:
    """Named numbers: Python's, or float64 tensors of no dimensions."""

    def __init__(self, **values: Any) -> None:
        self.names = tuple(values)
        for name, value in values.items():
            setattr(self, name, value)


def cast(c: Coefficients, dtype: torch.dtype, device: torch.device) -> Coefficients:
    """Tensors to the arithmetic's dtype; Python numbers take it by themselves."""

    def converted(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)

    return Coefficients(**{name: converted(getattr(c, name)) for name in c.names})


def store(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    target.copy_(value if skip is None else torch.where(skip, target.to(value.dtype), value))


def unscaled(g: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The gradient of what is minimised."""
    if grad_scale is not None:
        g = g * (1.0 / grad_scale.reshape(()).to(g.dtype))
    return -g if maximize else g


def square_sum(x: Tensor) -> Tensor:
    """In float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def _memory_order(t: Tensor) -> Tensor:
    """A flat view of dense memory, in the order in which the kernels number its elements."""
    return t.as_strided((t.numel(),), (1,))


def stochastically_rounded(p: Tensor, value: Tensor, seed: int, step: Tensor, tensor_id: int, first: int = 0) -> Tensor:
    """A new value of a bfloat16 parameter that has finished ``step`` steps, rounded up or down at random. ``first``:
    the place of its first element in the whole tensor, if it is a shard."""
    random = random_halves(seed, (step.long() << 32) | tensor_id, p.numel(), p.device, first)
    rounded, exact = torch.empty_like(p), torch.empty_like(p, dtype=value.dtype).copy_(value)
    _memory_order(rounded).copy_(stochastic_bfloat16(_memory_order(exact), random))
    return rounded


def check_states(op: str, params: Sequence[Tensor], states: Sequence[Sequence[Tensor]]) -> None:
    """Refuses states that PyTorch would broadcast, before anything is changed."""
    for values in states:
        for p, s in zip(params, values, strict=True):
            contract, got = f"a state of shape {tuple(p.shape)}", tuple(s.shape)
            require(s.shape == p.shape, op, contract, got, "Load the state of this parameter.")


def check_grads(op: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Refuses gradients that PyTorch would broadcast, densify or convert, before anything is changed."""
    require(len(grads) == len(params), op, f"{len(params)} gradients", len(grads), "Pass one for each parameter.")
    for p, g in zip(params, grads, strict=True):
        require(g.layout is torch.strided, op, "strided gradients", f"a {g.layout} one", "Use torch.Tensor.to_dense.")
        require(g.is_floating_point(), op, "floating-point gradients", g.dtype, "Convert them.")
        contract, got = f"a gradient of shape {tuple(p.shape)}", tuple(g.shape)
        require(g.shape == p.shape, op, contract, got, "Reshape it.")


def check_ids(op: str, params: Sequence[Tensor], seed: int | None, ids: Sequence[int]) -> None:
    """Refuses ids that are not one for each parameter, where random numbers are drawn by them."""
    fits = seed is None or len(ids) == len(params)
    require(fits, op, f"{len(params)} ids", len(ids), "Pass one for each parameter.")


def reference_of(op: ops.StepOp) -> Callable[[type], type]:
    """Makes a rule the reference of its op."""

    def register(rule: type) -> type:
        op.eager(_make_step(op, rule))
        return rule

    return register


def _make_step(op: ops.StepOp, rule: Any) -> Callable[..., None]:
    state_count, has_scale = len(op.states), op.scale is not None

    def step_(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        *args: Any,
        maximize: bool = False,
        seed: int | None = None,
        ids: Sequence[int] = (),
        offsets: Sequence[int] = (),
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        norms: Tensor | None = None,
        phase: int = 0,
        **hyper: Any,
    ) -> None:
        *lists, steps, lr = args
        check_grads(op.name, params, grads)
        lr = lr.reshape(())
        states = [values for values in lists[:state_count] if values]
        check_states(op.name, params, states)
        check_ids(op.name, params, seed, ids)
        op.check_shards(params, seed, offsets, norms, phase)
        for i, p in enumerate(params):
            dtype = torch.promote_types(p.dtype, torch.float32)
            skip = None if found_inf is None else found_inf.reshape(()) != 0
            g = unscaled(grads[i].to(dtype), grad_scale, maximize)
            step = steps[i].double() + 1.0 if steps else torch.ones((), dtype=torch.float64, device=p.device)
            scale = lists[state_count][i].double() if has_scale else None
            c = cast(rule.coefficients(lr.double(), step, scale, **hyper), dtype, p.device)
            old = [values[i] for values in states]
            if op.has_norms:
                if phase != 2:
                    terms, new = rule.norm_terms(c, p.to(dtype), g, [s.to(dtype) for s in old])
                    for target, s in zip(old[: len(new)], new, strict=True):
                        store(target, s, skip)
                    squares = [square_sum(term) for term in terms]
                if norms is not None and phase == 1:
                    norms[i] = torch.stack(squares) if skip is None else torch.stack(squares).masked_fill(skip, 0.0)
                    continue
                rule.apply_norms(c, squares if norms is None else norms[i])
            value, new = rule.update(c, p.to(dtype), g, [s.to(dtype) for s in old])
            for target, s in zip(old[: len(new)], new, strict=True):
                store(target, s, skip)
            if seed is not None and p.dtype == torch.bfloat16:
                first = offsets[i] if offsets else 0
                value = stochastically_rounded(p, value, seed, steps[i], ids[i], first)
            store(p, value, skip)
            if steps:
                store(steps[i], steps[i] + 1.0, skip)

    step_.__name__ = step_.__qualname__ = op.name
    step_.__doc__ = f"{rule.__doc__} Arguments as in ``singlepass._ops.optim``."
    return step_
