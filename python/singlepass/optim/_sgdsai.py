# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops import optim as ops
from ._base import FusedOptimizer, Work, is_capturing
from ._buckets import has_values
from ._doc import shared_arguments
from ._exchange import Exchange, has_dtensors
from ._norm import moved, to_device

# Of a tensor's moments: the sum, the squares around the means of its parts, those of the means, how many parts.
_COLUMNS, _PARTS = 4, 3

# A deviation counts as at least this part of the root mean square.
_LEAST_SPREAD = 0.1


@shared_arguments
class SGDSaI(FusedOptimizer):
    r"""SGD-SaI: momentum SGD with learning rates scaled at initialisation (arXiv 2412.11768), as in ``sgd_sai.py``.

    .. math::
        \mathrm{gsnr} &= \frac{\|g\|}{\mathrm{std}(g) + \epsilon} \text{ at the first step}, \quad
        m = \mu m + (1-\mu) g \text{ (at the first step } g) \\
        p &= (1-\eta\lambda) p - \eta\,\mathrm{gsnr}\,m

    The gain is measured once per tensor, from its first gradient that is not zero. std(g) counts as at least a tenth of
    the root mean square of g, which limits the gain of n elements to 10 sqrt(n); a tensor of one element gets gain 1.
    With ``guard_gain=False`` the gain is the official code's: always 0 if the first gradient is zero, and norm / eps
    (some 1e8) if all its elements are equal or there is only one.

    While a tensor waits for its gain, each step synchronises with its device.

    States per parameter: ``momentum_buffer``, ``gsnr`` and ``step``. State dicts of the official code load.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: decay rate of the momentum.
        eps: added to the standard deviation.
        weight_decay: decoupled weight decay, times ``lr``.
        guard_gain: limit the gain, and wait for a gradient that is not zero; False: the official code's gain.
{shared}
    Example:
        >>> import torch, singlepass
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = singlepass.optim.SGDSaI(model.parameters())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = ops.sgdsai
    steps_where_uncounted = 1.0  # the official code counts none; its saved momentum has begun

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        guard_gain: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        unscale_in_step: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "eps": eps,
                "weight_decay": weight_decay,
                "guard_gain": guard_gain,
            },
            maximize=maximize,
            capturable=capturable,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            unscale_in_step=unscale_in_step,
            backend=backend,
        )

        self._measured: dict[int, Measured] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._measured = {}

    def _new_scale(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.full((), 0.0 if group["guard_gain"] else math.nan, dtype=torch.float32, device=p.device)

    def _rounds(self, is_first: bool) -> list[tuple[int, bool]]:
        rounds = super()._rounds(is_first)
        members = [(p, group) for p, group in self._members() if p.requires_grad]
        if has_dtensors([p for p, _ in members]) and any(self._waits(p, group) for p, group in members):
            rounds.append((_COLUMNS, False))
        return rounds

    def _members(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """All parameters, each with its group."""
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def _waits(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter waits for its gain: as said by what all ranks know, whichever have its gradient."""
        gain = self.state.get(p, {}).get("gsnr")
        return gain is None or bool(self._waiting([gain], group["guard_gain"]))

    def _prepare(
        self, work: Work, grad_scale: Tensor | None, found_inf: Tensor | None, exchange: Exchange
    ) -> Tensor | None:
        """Measures the gains that are not measured yet."""
        table = exchange.table() if exchange.rounds else None
        measured: list[tuple[Tensor, dict[str, Any], Tensor]] = []
        for group, buckets in work:
            names, guard = self._state_names(group), group["guard_gain"]
            for bucket in buckets:
                scale = to_device(grad_scale, bucket.device)
                gains = [self._state_of(p, group, names)["gsnr"] for p in bucket.owners]
                for i in self._waiting(gains, guard):
                    moments = _moments(bucket.grads[i], scale)
                    if table is None:
                        measured.append((bucket.owners[i], group, moments))
                    else:
                        table[bucket.ids[i]] = moved(moments, table.device)
        if table is not None:
            found_inf = exchange.add_up(table, found_inf)
            measured = [
                (p, group, moments)
                for (p, group), moments in zip(self._members(), table.unbind(), strict=True)
                if self._waits(p, group) and (p.grad is not None or moments[_PARTS] > 0.0)
            ]
        for p, group, moments in measured:
            state, guard = self._state_of(p, group, self._state_names(group)), group["guard_gain"]
            old = state["gsnr"]
            measures = _is_unmeasured(old, guard)
            if found_inf is not None:
                measures &= moved(found_inf, old.device).reshape(()) == 0.0
            gain = _gain(p.shape.numel(), moved(moments, old.device), group["eps"], guard)
            state["gsnr"] = torch.where(measures, gain, old)
        return found_inf

    def _waiting(self, gains: list[Tensor], guard: bool) -> Iterable[int]:
        """Positions of the gains that this step measures.

        The host looks at a gain until it is found measured, and again if another tensor takes its place or its value is
        written over. Where it cannot look, any may be waiting.
        """
        if torch.compiler.is_compiling() or is_capturing():
            return range(len(gains))
        found = [self._measured.get(id(gain)) for gain in gains]
        unknown = [
            i
            for i, (gain, seen) in enumerate(zip(gains, found, strict=True))
            if seen is None or seen.version != gain._version or seen.guard != guard
        ]
        if not all(has_values(gains[i]) for i in unknown):
            return unknown
        waits = torch.stack([_is_unmeasured(gains[i], guard) for i in unknown]).tolist() if unknown else []
        for i in (i for i, wait in zip(unknown, waits, strict=True) if not wait):
            self._measured[id(gains[i])] = Measured(gains[i], gains[i]._version, guard)
        return [i for i, wait in zip(unknown, waits, strict=True) if wait]


@dataclass(frozen=True)
class Measured:
    """A gain that the host has seen to be measured. Held, so that no other tensor gets its id."""

    gain: Tensor
    version: int
    guard: bool


def _is_unmeasured(gain: Tensor, guard: bool) -> Tensor:
    """What stands for a gain that is still to be measured: 0, or NaN where the official code measures gains of 0."""
    return gain.isnan() | (gain == 0.0) if guard else gain.isnan()


def _moments(g: Tensor, scale: Tensor | None) -> Tensor:
    """What a gain is made of, in float64, so that the moments of a tensor's parts add up to those of the whole."""
    g = g.double() if scale is None else g.double() / scale.reshape(()).double()
    total = g.sum()
    mean = total / max(g.numel(), 1)
    return torch.stack((total, (g - mean).square().sum(), total * mean, torch.ones_like(total)))


def _gain(n: int, moments: Tensor, eps: float, guard: bool) -> Tensor:
    """Gradient signal-to-noise ratio of a tensor of n elements; 0 where it is not a number."""
    total, around_means, of_means, _ = moments
    if n < 2 and guard:
        return torch.ones_like(total, dtype=torch.float32)
    norm = (around_means + of_means).sqrt()
    if n < 2:  # whose deviation is not a number
        return (norm / eps).float().nan_to_num(nan=0.0)
    # The parts have means of their own; what these deviate is 0 where there is one part.
    deviation = ((around_means + (of_means - total * (total / n))).clamp_min(0.0) / (n - 1)).sqrt()
    if guard:
        deviation = torch.maximum(deviation, _LEAST_SPREAD * norm / math.sqrt(n))
    gain = (norm / (deviation + eps)).float()
    return torch.where(gain.isfinite(), gain, 0.0) if guard else gain.nan_to_num(nan=0.0)
