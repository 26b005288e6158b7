# SPDX-License-Identifier: Apache-2.0
"""Rational activations as a module.

Sources: Yang and Wang, "Kolmogorov-Arnold Transformer", arXiv 2409.10594, and its code, Adamdad/kat and
Adamdad/rational_kat_cu; FlashKAT, arXiv 2505.13813.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import message, require
from .._ops import check_backend
from ._functional import rational
from ._tables import Table, resolve

Init = str | Table | tuple[Sequence[float], Sequence[float]]

# What KAT's and FlashKAT's checkpoints call our parameters.
_THEIR_NAMES = {
    "numerator": ("weight_numerator", "numerator_v"),
    "denominator": ("weight_denominator", "denominator_v"),
}


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that should have no weight decay: the coefficients of rational activations.

    Decay pulls an activation towards zero, not towards a simpler one. The function searches modules, so parameters may
    have been replaced: by FSDP2, tensor parallelism, a parametrisation, pruning or by hand. Parameters of other modules
    are included if they have the attribute ``_no_weight_decay = True``, as Mamba's have.

    For timm, pass ``model.no_weight_decay() | singlepass.nn.no_weight_decay(model)`` as the names without decay.

    Args:
        model: any module, wrapped or not; names are those of ``model.named_parameters()``.

    Raises:
        ValueError: an activation without parameters of its own, as FSDP1 leaves it with ``use_orig_params=False``.

    Example:
        >>> import singlepass
        >>> sorted(singlepass.nn.no_weight_decay(singlepass.nn.GRKAN(16, 4)))
        ['act.denominator', 'act.numerator']
    """
    coefficients: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, GroupRational):
            own = [*module.parameters()]
            contract = "rational activations with parameters of their own"
            remedy = "Pass use_orig_params=True to FullyShardedDataParallel, or ask before the model is flattened."
            require(bool(own or [*module.buffers()]), "no_weight_decay", contract, f"none in {name!r}", remedy)
            coefficients.update(id(p) for p in own)
    return {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", id(p) in coefficients)}


def require_counts(where: str, **counts: int) -> None:
    """Raises unless all are sizes of a dimension."""
    for name, count in counts.items():
        fits = isinstance(count, Integral) and count >= 1
        require(fits, where, f"{name} as a whole number, 1 or more", repr(count), "Pass the size of that dimension.")


class GroupRational(nn.Module):
    r"""Rational activation P(x) / Q(x) with coefficients shared within groups of channels (KAT, arXiv 2409.10594).

    By default, as in KAT's code, all groups share the numerator and each has its own denominator. The paper's text says
    the opposite; its author calls that a typo (github.com/Adamdad/kat/issues/15).

    Parameters are ``numerator`` (``numerator_groups``, m + 1) and ``denominator`` (``denominator_groups``, n; form C:
    n + 1), float32 by default, whatever the dtype of x. They should have no weight decay: :func:`no_weight_decay`
    returns their names, and they have the attribute ``_no_weight_decay = True``.

    State dicts of KAT (``weight_numerator``, ``weight_denominator``) and FlashKAT (``numerator_v``, ``denominator_v``)
    load, in form A and degrees (5, 4): that is what their kernels compute, also from the tables that KAT fitted for B.

    Args:
        channels: number of channels of x.
        groups: number of groups, a divisor of ``channels``; channel c belongs to group ``c // (channels // groups)``.
        init: initial function: a name as in :func:`singlepass.nn.table`, a :class:`Table` such as
            :func:`singlepass.nn.fit_rational` returns, or a pair (numerator, denominator) of coefficients.
        form: "A", "B", "C" or "D", see :func:`singlepass.functional.rational`.
        degrees: of numerator (1 to 7) and denominator (1 to 6).
        channel_dim: the channel dimension of x.
        numerator_groups: 1 or ``groups``.
        denominator_groups: 1 or ``groups``; None for ``groups``.
        dropout: probability that an element of the result is zeroed in training, fused into the same pass.
        backend: "native", "triton" or "eager"; None selects one.

    Raises:
        ValueError: invalid arguments, or ``init`` names a table that does not exist for this form and degrees.

    Example:
        >>> import torch
        >>> from singlepass.nn import GroupRational
        >>> act = GroupRational(64, groups=8, init="silu")
        >>> x = torch.randn(2, 10, 64).clamp(-3, 3)
        >>> torch.allclose(act(x), torch.nn.functional.silu(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: int,
        groups: int = 8,
        init: Init = "gelu",
        form: str = "A",
        degrees: tuple[int, int] = (5, 4),
        channel_dim: int = -1,
        *,
        numerator_groups: int = 1,
        denominator_groups: int | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "GroupRational"
        denominator_groups = groups if denominator_groups is None else denominator_groups
        require_counts(op, channels=channels)
        divides = isinstance(groups, Integral) and groups >= 1 and channels % groups == 0
        divisors = ", ".join(str(d) for d in range(1, min(channels, 64) + 1) if channels % d == 0)
        remedy = f"Choose among {divisors}."
        require(divides, op, f"a number of groups that divides {channels} channels", repr(groups), remedy)
        for name, rows in (("numerator_groups", numerator_groups), ("denominator_groups", denominator_groups)):
            fits = isinstance(rows, Integral) and rows in (1, groups)
            require(fits, op, f"{name} 1 or {groups}", rows, "Share coefficients among all groups or none.")
        contract = "channel_dim as a dimension of x"
        require(isinstance(channel_dim, Integral), op, contract, channel_dim, "Count from 0, or back from -1.")
        fits = isinstance(dropout, Real) and 0.0 <= dropout < 1.0
        require(fits, op, "0 <= dropout < 1", dropout, "It is the probability of becoming zero.")
        check_backend(op, backend)
        self.channels = channels
        self.groups = groups
        self.form = form
        self.degrees = degrees
        self.channel_dim = channel_dim
        self.dropout = dropout
        self.backend = backend
        self.init = resolve(op, init, form, degrees)
        self._init_name = init if isinstance(init, str) else None
        options: dict[str, Any] = {"device": device, "dtype": torch.float32 if dtype is None else dtype}
        columns = len(self.init.numerator), len(self.init.denominator)
        self.numerator = nn.Parameter(torch.empty(numerator_groups, columns[0], **options))
        self.denominator = nn.Parameter(torch.empty(denominator_groups, columns[1], **options))
        self.reset_parameters()
        self._mark()

    def reset_parameters(self) -> None:
        """Resets the coefficients to the initial function."""
        with torch.no_grad():
            for p, row in ((self.numerator, self.init.numerator), (self.denominator, self.init.denominator)):
                p.copy_(p.new_tensor(row))

    def forward(self, x: Tensor, *, bias: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """``dropout(f(x + bias)) * gate``, x's shape and dtype, in one pass over memory.

        Args:
            x: any shape with ``channels`` elements along ``channel_dim``, any strides; floating-point.
            bias: (channels,), added first; its gradient comes from the same pass.
            gate: x's shape and dtype, multiplied last.

        Raises:
            ValueError: invalid shapes or dtypes.
        """
        dim = self.channel_dim
        require(isinstance(x, Tensor), "GroupRational", "x as a tensor", type(x).__name__, "Convert it.")
        fits = -x.dim() <= dim < x.dim() and x.shape[dim] == self.channels
        contract = f"x with {self.channels} channels in dimension {dim}"
        remedy = "Make the module with the channels of x, and channel_dim=1 for (batch, channels, height, width)."
        require(fits, "GroupRational", contract, tuple(x.shape), remedy)
        return rational(
            x,
            self.numerator,
            self.denominator,
            form=self.form,
            channel_dim=dim,
            bias=bias,
            gate=gate,
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        rows_a, rows_b = self.numerator.shape[0], self.denominator.shape[0]
        parts = [str(self.channels), f"groups={self.groups}"]
        parts += [f"init={self._init_name!r}"] * (self._init_name is not None)
        parts += [f"form={self.form!r}", f"degrees={self.degrees}"]
        parts += [f"channel_dim={self.channel_dim}"] * (self.channel_dim != -1)
        parts += [f"numerator_groups={rows_a}"] * (rows_a != 1)
        parts += [f"denominator_groups={rows_b}"] * (rows_b != self.groups)
        parts += [f"dropout={self.dropout}"] * (self.dropout > 0.0)
        parts += [f"backend={self.backend!r}"] * (self.backend is not None)
        return ", ".join(parts)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in the form that timm expects."""
        return no_weight_decay(self)

    def _mark(self) -> None:
        for p in self.parameters(recurse=False):
            p._no_weight_decay = True  # type: ignore[attr-defined]

    # Copies, conversions and loading with assign=True put new parameters in place of the marked ones. Others who do so
    # lose the marks, which is why no_weight_decay() does not depend on them.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, *args: Any, **kwargs: Any) -> GroupRational:
        super()._apply(*args, **kwargs)
        self._mark()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for ours, theirs in _THEIR_NAMES.items():
            for name in theirs:
                if prefix + name not in state_dict or prefix + ours in state_dict:
                    continue
                state_dict[prefix + ours] = state_dict.pop(prefix + name)
                if self.form != "A":
                    got, remedy = f"a module of form {self.form}", "Build the module with form='A'."
                    where = f"GroupRational {prefix}{name}"
                    error_msgs.append(message(where, "form A, which KAT's kernels compute", got, remedy))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._mark()
