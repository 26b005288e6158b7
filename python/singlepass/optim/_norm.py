# SPDX-License-Identifier: Apache-2.0
"""Norms of tensors, and of all gradients, by which they are unscaled and clipped; whether any is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import require
from .._ops import Op
from .._ops.optim import grad_norm, grad_squares
from ..reference.optim import finish_grad_norm
from ._buckets import Bucket, has_values, is_wrapper
from ._exchange import Exchange

if TYPE_CHECKING:
    from ._base import FusedOptimizer

# The buckets of a step, each with its group, the names of its states, and the rule's hyperparameters.
Steps = list[tuple[Bucket, dict[str, Any], tuple[str, ...], dict[str, Any]]]

# Gradients that one call takes, with the backend that is asked for and the kind of their parameters.
Parts = list[tuple[list[Tensor], str | None, int]]


def measure(
    where: str,
    buckets: list[Bucket],
    max_norm: float,
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    exchange: Exchange,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One read of all gradients, and one round of the ranks.

    Returns (divisor that unscales and clips, found_inf, the sum of squares that ranks have added up).
    """
    looks = grad_scale is not None and found_inf is None
    if max_norm == 0.0 and not looks:
        return grad_scale, exchange.add_up(exchange.table(), found_inf), None
    parts = _parts(buckets, exchange)
    if not parts and exchange.is_alone:
        return grad_scale, found_inf, None
    if len(parts) == 1 and exchange.is_alone:
        (grads, backend, _) = parts[0]
        scale = to_device(grad_scale, grads[0].device)
        run = _chosen(grad_norm, grads, backend)
        _, divisor, nonfinite = run(grads, max_norm=max_norm, eps=eps, grad_scale=scale)
        return divisor, nonfinite if looks else found_inf, None
    plain = not any(is_wrapper(g) for grads, _, _ in parts for g in grads)
    remedy = "Give them to optimizers of their own, or pass max_grad_norm=0."
    require(plain, where, "one type of parameters for the norm of all gradients", "several", remedy)
    table = squares_of(parts, exchange)
    nonfinite = (~table.sum().isfinite()).float()
    found_inf = nonfinite if looks else found_inf
    if not exchange.is_alone:
        found_inf = exchange.add_up(table, found_inf)
    scale, squares = to_device(grad_scale, table.device), table.sum()
    _, divisor, _ = finish_grad_norm(squares, max_norm=max_norm, eps=eps, grad_scale=scale)
    return divisor, found_inf, squares


def squares_of(parts: Parts, exchange: Exchange) -> Tensor:
    """Sums of squares in float64: of each part or, where ranks add them up, as the table of their next round."""
    table = None if exchange.is_alone else exchange.table()
    device = parts[0][0][0].device if table is None else table.device
    squares = [moved(_chosen(grad_squares, grads, backend)(grads), device) for grads, backend, _ in parts]
    if table is None:
        return torch.cat(squares)
    for (_, _, kind), some in zip(parts, squares, strict=True):
        table[kind] += some
    return table


def add_up_norms(
    optimizer: FusedOptimizer, steps: Steps, grad_scale: Tensor | None, found_inf: Tensor | None, exchange: Exchange
) -> Tensor | None:
    """Makes the first pass of each step; what is left of ``steps`` are the second ones. Returns found_inf."""
    table = exchange.table()
    for i, (bucket, group, names, hyper) in enumerate(steps):
        norms = torch.zeros((len(bucket.ids), 2), dtype=torch.float64, device=bucket.device)
        first, second = ({"norms": norms, "phase": phase} for phase in (1, 2))
        optimizer._step_bucket(bucket, group, names, hyper | first, grad_scale, found_inf)
        table[_rows(table, bucket.ids)] = moved(norms, table.device)
        steps[i] = bucket, group, names, hyper | second
    found_inf = exchange.add_up(table, found_inf)
    for bucket, _, _, hyper in steps:
        hyper["norms"].copy_(table[_rows(table, bucket.ids)], non_blocking=True)
    return found_inf


def _rows(table: Tensor, ids: list[int]) -> slice | Tensor:
    """Positions, which are in order, as an index."""
    if ids[-1] - ids[0] == len(ids) - 1:
        return slice(ids[0], ids[-1] + 1)
    return torch.tensor(ids).to(table.device, non_blocking=True)  # without waiting for the device


def is_any_nonzero(work: Any, has_states: bool, exchange: Exchange) -> bool:
    """Whether an element of a gradient is not 0, or may be, or there are states, on any rank. Tensors without values
    count as zeros."""
    grads = [g for _, buckets in work for bucket in buckets for g in bucket.grads]
    found = has_states or any(bool(g.any()) for g in grads if has_values(g) or is_wrapper(g))
    if exchange.is_alone:
        return found
    if exchange.is_spread:
        # The norm, which comes next, says it. But a rank without any element still has no states when others have some:
        # then torch.distributed.checkpoint asks it alone, and gives it gradients, which training does not.
        return has_states or exchange.is_first or not grads or any(g.numel() > 0 for g in grads)
    if not exchange.is_first:
        return True  # the rounds are those of a step, in which all take part
    if not bool(exchange.add_up(exchange.table(), torch.tensor(float(found)))):
        exchange.rounds.clear()  # a step that only asks for states needs no more
        return False
    return True


def moved(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host waits only for what comes from a GPU to the CPU, which it would read too early."""
    return value.to(device, non_blocking=device.type != "cpu")


def to_device(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else moved(value, device)


def _parts(buckets: list[Bucket], exchange: Exchange) -> Parts:
    parts: dict[tuple[torch.device, str | None, bool, int], list[Tensor]] = {}
    for bucket in buckets:
        kinds = exchange.kinds(bucket.ids)
        if bucket.backend != "eager" and len(set(kinds)) == 1:  # eager alone takes wrappers
            parts.setdefault((bucket.device, bucket.asked, False, kinds[0]), []).extend(bucket.grads)
            continue
        for g, kind in zip(bucket.grads, kinds, strict=True):
            wrapped = is_wrapper(g)
            wanted = "eager" if wrapped else bucket.asked
            parts.setdefault((bucket.device, wanted, wrapped, kind), []).append(g)
    return [(grads, wanted, kind) for (_, wanted, _, kind), grads in parts.items()]


def _chosen(op: Op, grads: list[Tensor], backend: str | None) -> Callable[..., Any]:
    return op.on(op.choose(grads[0].device.type, {g.dtype for g in grads}, backend))
