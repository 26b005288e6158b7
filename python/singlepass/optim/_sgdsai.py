# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops import optim as ops
from ._base import Bucket, FusedOptimizer, is_capturing
from ._buckets import has_values
from ._doc import shared_arguments
from ._shards import whole

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
            backend=backend,
        )

        self._measured: dict[int, Measured] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._measured = {}

    def _new_scale(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.full((), 0.0 if group["guard_gain"] else math.nan, dtype=torch.float32, device=p.device)

    def _before_step(
        self, bucket: Bucket, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        guard = group["guard_gain"]
        states = [self.state[p] for p in bucket.owners]
        for i in self._waiting([state["gsnr"] for state in states], guard):
            g, gain = bucket.grads[i], states[i]["gsnr"]
            scale = 1.0 if grad_scale is None else grad_scale.reshape(())
            wide = g.to(torch.promote_types(g.dtype, torch.float32)) / scale
            measure = _is_unmeasured(gain, guard)
            if found_inf is not None:
                measure &= found_inf.reshape(()) == 0.0
            states[i]["gsnr"] = torch.where(measure, whole(_gain(wide, group["eps"], guard)), gain)

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


def _gain(g: Tensor, eps: float, guard: bool) -> Tensor:
    """Gradient signal-to-noise ratio of one tensor; 0 where it is not a number."""
    if g.numel() < 2 and guard:
        return torch.ones((), dtype=torch.float32, device=g.device)
    # In units of the largest element, in which no square overflows or vanishes.
    unit = g.abs().amax() if g.numel() else g.new_ones(())
    unit = torch.where((unit > 0.0) & unit.isfinite(), unit, 1.0)
    g, least = g / unit, eps / unit
    norm = torch.linalg.vector_norm(g)
    if g.numel() < 2:  # whose deviation is not a number
        return (norm / least).nan_to_num(nan=0.0).float()
    deviation = g.std()
    if guard:
        deviation = torch.maximum(deviation, _LEAST_SPREAD * norm / math.sqrt(g.numel()))
    gain = (norm / (deviation + least)).float()
    return torch.where(gain.isfinite(), gain, 0.0) if guard else gain.nan_to_num(nan=0.0)
