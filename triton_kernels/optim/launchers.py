# SPDX-License-Identifier: Apache-2.0
"""Launches the kernel of optimizer steps. ``singlepass._ops.optim`` defines the ops' arguments.

A step over any number of tensors of the same dtypes is one launch, or two for rules with norms. The host never waits
for the device, so a CUDA graph can replay a step. Take one step before capturing a graph, so that the kernels are
compiled and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._errors import require
from ..._ops import optim as ops
from .._common import LAUNCH_OPTIONS, STORAGE
from .._launch import (
    Cache,
    address_of_lr,
    device_guard,
    identities,
    layouts,
    log_of,
    require_device,
    require_dtypes,
    require_lengths,
    require_scalar,
)
from .._table import BLOCK, Record, Table, is_dense, laid_out_like, make_table, same_layout
from .rules import RULES, Pass
from .step import HYPER_SLOTS, step_kernel


@dataclass(frozen=True)
class Bucket:
    """The tensors of one combination of dtypes, which share a launch in each pass."""

    table: Table
    storages: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is kept of a list of tensors: its buckets, and memory for the norms of all tensors, float64 [tensors, 2]."""

    buckets: list[Bucket]
    norms: Tensor


_plans: Cache[Plan] = Cache()


def _make_plan(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    ids: Sequence[int],
    offsets: Sequence[int],
) -> Plan:
    """Checks what memory safety needs and builds the tables. Gradients already have the layouts of their parameters."""
    device = require_device(op, [params, grads, *states, scales, steps])
    records: dict[tuple[str, ...], list[Record]] = {}
    for i, p in enumerate(params):
        tensors = [p, grads[i], *(values[i] for values in states)]
        require_dtypes(op, tensors)
        layout = f"shape {tuple(p.shape)} and strides {p.stride()}"
        require(is_dense(p), op, "dense parameters", layout, "Choose backend='eager'.")
        for s in tensors[2:]:
            got = f"shape {tuple(s.shape)} and strides {s.stride()} for a parameter of {layout}"
            require(same_layout(s, p), op, "states laid out like their parameters", got, "Use torch.empty_like.")
        for values in filter(None, (steps, scales)):
            require_scalar(op, "each step count and scale", values[i], device)
        record = Record(
            addresses=tuple(t.data_ptr() for t in tensors),
            numel=p.numel(),
            step=steps[i].data_ptr() if steps else 0,
            scale=scales[i].data_ptr() if scales else 0,
            id=ids[i] if ids else 0,
            offset=offsets[i] if offsets else 0,
            index=i,
        )
        records.setdefault(tuple(STORAGE[t.dtype] for t in tensors), []).append(record)
    buckets = [Bucket(make_table(rows, device), storages) for storages, rows in records.items()]
    return Plan(buckets, torch.empty(len(params), 2, dtype=torch.float64, device=device))


def _touched(memory_pass: Pass, states: int) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Two flags for each tensor of a record: the pass reads it, the pass writes it."""
    kinds = "pg" + "s" * states
    return tuple(k in memory_pass.reads for k in kinds), tuple(k in memory_pass.writes for k in kinds)


def _make_step(name: str) -> Callable[..., None]:
    """Makes the launcher of one rule's op."""
    op, rule = ops.RULES[name], RULES[name]
    floats = [name for name, kind in op.hyper.items() if kind == "float"]
    flags = [name for name, kind in op.hyper.items() if kind == "bool"]
    betas = [hyper for hyper in floats if hyper.startswith("beta")]
    # Those of a whole step, then those of phases 1 and 2.
    norm = [] if rule.norm is None else [rule.norm]
    passes = ([*norm, rule.update], norm, [rule.update])

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
        if not params:
            return
        *lists, steps, lr = args
        # Only the state for AMSGrad's maximum is optional.
        states = [s for s, key in zip(lists, op.states, strict=False) if s or not key.startswith("max_")]
        scales = lists[len(op.states)] if op.scale else []
        counters = [steps, ids] if seed is not None else [values for values in (steps, ids) if values]
        require_lengths(op.name, params, (grads, *states, *([scales] if op.scale else []), *counters))
        if seed is None:
            offsets = ()  # which only random numbers need
        op.check_shards(params, seed, offsets, norms, phase)
        device = params[0].device
        a_lr = address_of_lr(op.name, lr, device)
        a_grad_scale = require_scalar(op.name, "grad_scale", grad_scale, device)
        a_found_inf = require_scalar(op.name, "found_inf", found_inf, device)

        with device_guard(device):
            layout = layouts(params)
            if layouts(grads) != layout:
                grads = [laid_out_like(op.name, g, p) for g, p in zip(grads, params, strict=True)]
            lists = [params, grads, *states, scales, steps]
            # Tables are kept while addresses, dtypes and layouts stay the same.
            plan = _plans.get(
                (name, *map(Tensor.data_ptr, grads)),
                (*map(identities, lists), layout, *map(layouts, states), tuple(ids), tuple(offsets)),
                device,
                lambda: _make_plan(op.name, params, grads, states, scales, steps, ids, offsets),
            )
            # The float hyperparameters, then the logarithms of the betas, padded to the slots of the kernel.
            h = [hyper[key] for key in floats]
            h += [log_of(hyper[key]) for key in betas]
            h += [0.0] * (HYPER_SLOTS - len(h))
            for bucket in plan.buckets:
                for memory_pass in passes[phase]:
                    table = bucket.table
                    step_kernel[(table.chunk_count,)](
                        table.records,
                        table.chunks,
                        table.tickets,
                        plan.norms if norms is None else norms,
                        table.partials,
                        *h,
                        0.0 if a_lr else lr.item(),
                        -1.0 if maximize else 1.0,
                        a_lr,
                        a_grad_scale,
                        a_found_inf,
                        0 if seed is None else seed,
                        rule.coefficients,
                        rule.apply_norms,
                        memory_pass.function,
                        memory_pass is rule.norm,
                        tuple(bool(hyper[key]) for key in flags),
                        len(floats) + len(betas),
                        bucket.storages,
                        *_touched(memory_pass, len(states)),
                        bool(steps),
                        seed is not None and bucket.storages[0] == "bf16",
                        table.chunk,
                        BLOCK,
                        **LAUNCH_OPTIONS,
                    )

    step_.__name__ = step_.__qualname__ = op.name
    step_.__doc__ = f"{op.name} in Triton. Arguments as in ``singlepass._ops.optim``."
    return step_


for _name in RULES:
    ops.RULES[_name].triton(_make_step(_name))
