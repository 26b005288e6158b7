# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other in a step: sums over what each has of the gradients, and whether one cannot go on."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import message, require
from ._shards import has_shards, is_sharded, ranks_of, specs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._base import FusedOptimizer


_ALIKE = "Make the optimizer with the same arguments on each, after the same torch.manual_seed."


class Layout:
    """Over which ranks each of an optimizer's parameters is divided.

    The same on all ranks, whichever gradients there are: what ranks add up has a row for each parameter. Where plain
    tensors are spread over the ranks of a ``norm_group``, each has its own, or none: they add up one row for all.
    """

    def __init__(self, params: Sequence[Tensor], norm_group: ProcessGroup | None = None) -> None:
        self.facts, self.is_spread = _facts(params), norm_group is not None
        ranks = [ranks_of(p) if norm_group is None else ((norm_group,), ()) for p in params]
        self.divided = [divided for divided, _ in ranks]
        self.kinds = list(dict.fromkeys(self.divided))  # of parameters that are divided over the same ranks
        if norm_group is not None:
            self.kinds = [(norm_group,)]
        self.kind_of = list(map(self.kinds.index, self.divided))
        self.groups = list(dict.fromkeys(group for groups in self.kinds for group in groups))
        copies = dict.fromkeys(group for _, groups in ranks for group in groups)
        self.replicas = [group for group in copies if group not in self.groups]  # who have nothing to add up
        if norm_group is None:
            places = zip(params, self.divided, strict=True)
            self.device = next(p.device for p, groups in places if groups or not self.groups)
        else:
            self.device = _device_of(norm_group, params)
        self._rows: dict[tuple[ProcessGroup, bool], Tensor | None] = {}

    def describes(self, params: Sequence[Tensor]) -> bool:
        return _facts(params) == self.facts

    def rows(self, group: ProcessGroup, of_kinds: bool) -> Tensor | None:
        """The rows that a group's ranks add up, of a table with one for each kind or for each parameter; None: all."""
        if (group, of_kinds) not in self._rows:
            all_groups = self.kinds if of_kinds else self.divided
            some = [i for i, groups in enumerate(all_groups) if group in groups]
            index = torch.tensor(some, device=self.device)
            self._rows[group, of_kinds] = None if len(some) == len(all_groups) else index
        return self._rows[group, of_kinds]


def _facts(params: Sequence[Tensor]) -> tuple[list[int], list[object]]:
    return [id(p) for p in params], specs(params)


def _device_of(group: ProcessGroup, params: Sequence[Tensor]) -> torch.device:
    """Where the ranks of a group add up numbers: alike on all, on one without parameters or with offloaded ones too.

    The accelerator, if it has a backend of its own, as NCCL is; else the CPU.
    """
    backends = dict(pair.split(":") for pair in torch.distributed.get_backend_config(group).split(","))
    kind = next((kind for kind, backend in backends.items() if backend != backends.get("cpu")), "cpu")
    return next((p.device for p in params if p.device.type == kind), torch.device(kind))


class Verdict:
    """Whether a rank could not go on in a step on a GPU, which the host learns in the next one, without waiting."""

    def __init__(self, failures: Tensor) -> None:
        self._failures = failures.to("cpu", non_blocking=True)
        self._is_there = torch.cuda.Event()
        self._is_there.record(torch.cuda.current_stream(failures.device))

    def has_failed(self) -> bool:
        self._is_there.synchronize()
        return bool(self._failures)


class Exchange:
    """The sums of one step, or of one clipping, as a context that tells the other ranks of an exception.

    ``rounds`` says what is to be added up, in order: the columns of a table, and whether it has a row for each kind of
    parameters instead of each parameter. All ranks have the same rounds. With the first one that comes after it, each
    learns that another raised an exception, or that its gradients are not finite. One that raises takes part in it.
    """

    def __init__(
        self, where: str, layout: Layout | None, rounds: list[tuple[int, bool]], is_first: bool = True
    ) -> None:
        self.where, self.layout, self.is_first = where, layout, is_first
        self.rounds = [] if layout is None or not layout.groups else rounds
        self.is_alone = not self.rounds
        self.is_spread = layout is not None and layout.is_spread
        self.verdict: Verdict | None = None

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        goes_on = isinstance(error, Exception)
        while goes_on and self.rounds:
            table = self.table()
            self._add_up(table, None, failures=1.0)
            goes_on = table.device.type != "cpu"  # where the others cannot know, and take part in all rounds

    def kinds(self, ids: Sequence[int]) -> list[int]:
        """The kinds of parameters, by their positions in the optimizer."""
        return [0] * len(ids) if self.layout is None else [self.layout.kind_of[i] for i in ids]

    def table(self) -> Tensor:
        """Zeros for the next round."""
        assert self.layout is not None
        columns, of_kinds = self.rounds[0]
        rows = len(self.layout.kinds if of_kinds else self.layout.divided)
        return torch.zeros((rows, columns), dtype=torch.float64, device=self.layout.device)

    def add_up(self, table: Tensor, flag: Tensor | None) -> Tensor | None:
        """Adds up a table in place, and returns whether the flag is set on a rank; None if there is none to return.

        Raises:
            RuntimeError: another rank raised an exception. On a GPU that is said by the next step, and this one is
                skipped, by the flag that is returned.
        """
        flags = self._add_up(table, flag, failures=0.0)
        if flags.device.type == "cpu" and not torch.compiler.is_compiling():
            if flags[1] > 0.0:
                self.rounds = []
                raise _failure(self.where)
            return None if flag is None else flags[0].bool().float()
        if not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
            self.verdict = Verdict(flags[1])
        return flags.sum().bool().float()

    def _add_up(self, table: Tensor, flag: Tensor | None, failures: float) -> Tensor:
        """Returns how many have set the flag, and how many have raised an exception."""
        layout = self.layout
        assert layout is not None
        columns, of_kinds = self.rounds.pop(0)
        flags = torch.full((2,), failures, dtype=torch.float64, device=table.device)
        flags[0] = 0.0 if flag is None else flag.reshape(()).to(table.device).bool()
        for group in layout.groups:
            rows = layout.rows(group, of_kinds)
            packed = torch.cat(((table if rows is None else table[rows]).flatten(), flags))
            torch.distributed.all_reduce(packed, group=group)
            summed, flags = packed[:-2].view(-1, columns), packed[-2:]
            if rows is None:
                table.copy_(summed)
            else:
                table[rows] = summed
        for group in layout.replicas:
            torch.distributed.all_reduce(flags, group=group)
        return flags


class Exchanges:
    """Begins the exchange of each step, and remembers how parameters were divided in the last one."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._last: Exchange | None = None
        self._has_begun = False

    def begin(self, optimizer: FusedOptimizer) -> Exchange:
        """What a step of an optimizer needs of other ranks.

        Raises:
            RuntimeError: another rank raised an exception in the last step on a GPU.
        """
        last, self._last = self._last, None
        if last is not None and last.verdict is not None and last.verdict.has_failed():
            raise _failure(optimizer._name)
        is_first = not self._has_begun and not torch.compiler.is_compiling()
        if is_first:
            self._has_begun = True
        checks, rounds = _is_debugging(), optimizer._rounds(is_first)
        params = [p for group in optimizer.param_groups for p in group["params"]] if rounds or checks else []
        norm_group = optimizer._norm_group if rounds or checks else None
        if norm_group is None and not has_dtensors(params):
            return Exchange(optimizer._name, None, [], is_first)
        if checks:
            _check_agreement(optimizer, params)
        if self._layout is None or not self._layout.describes(params):
            self._layout = Layout(params, norm_group)
        self._last = Exchange(optimizer._name, self._layout, rounds, is_first)
        return self._last


def _is_debugging() -> bool:
    """Whether torch's own checks of what ranks do are on: TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return False
    return torch.distributed.get_debug_level() == torch.distributed.DebugLevel.DETAIL


def _check_agreement(optimizer: FusedOptimizer, params: Sequence[Tensor]) -> None:
    """Raises ValueError, on every rank, for hyperparameters that differ over ranks."""
    norm_group = optimizer._norm_group
    found: dict[str, Any] = {"the number of groups": len(optimizer.param_groups)}
    may_differ = ("backend",) if norm_group is None else ("backend", "seed")
    for i, group in enumerate(optimizer.param_groups):
        if norm_group is None:
            found[f"the number of parameters in group {i}"] = len(group["params"])
        for key in (key for key in optimizer.defaults if key in group and key not in may_differ):
            value = group[key]
            found[f"{key} of group {i}"] = float(value) if isinstance(value, Tensor) else value
    known = {key: [repr(value)] for key, value in found.items()}  # each with all values that ranks have
    meshes = dict.fromkeys(ranks for p in params if is_sharded(p) for ranks in p.device_mesh.get_all_groups())
    for ranks in meshes if norm_group is None else [norm_group]:
        heard: list[Any] = [None] * torch.distributed.get_world_size(ranks)
        torch.distributed.all_gather_object(heard, known, group=ranks)
        known = {key: list(dict.fromkeys(value for one in heard for value in one.get(key, ()))) for key in known}
    for key, values in known.items():  # once all groups have spoken: a rank that raised before would miss in the next
        require(len(values) == 1, optimizer._name, f"{key} alike on all ranks", ", ".join(values), _ALIKE)


def _failure(where: str) -> RuntimeError:
    """What the ranks raise that could have gone on."""
    remedy = "Its own error says why; nothing was changed."
    return RuntimeError(message(where, "every rank to take part", "an exception on another rank", remedy))


def has_dtensors(params: Sequence[Tensor]) -> bool:
    return any(map(has_shards, set(map(type, params))))
