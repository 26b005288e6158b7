# SPDX-License-Identifier: Apache-2.0
"""The layer and the MLP of the Kolmogorov-Arnold Transformer (KAT).

Source: Yang and Wang, "Kolmogorov-Arnold Transformer", arXiv 2409.10594, and its code, Adamdad/kat.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import require
from .._linear import is_just_linear
from ._module import GroupRational, Init, no_weight_decay, require_counts
from ._tables import Table


def _preserve_variance(linear: nn.Linear, table: Table) -> None:
    """w ~ N(0, gain / fan_in), gain = 1 / E[f(z)^2]: variance 1 goes in, standard normal, and comes out."""
    nn.init.normal_(linear.weight, 0.0, math.sqrt(table.gain / linear.in_features))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def linear_then_rational(x: Tensor, linear: nn.Module, act: GroupRational) -> Tensor:
    """act(linear(x)), the bias added by the activation's pass, which also gives its gradient.

    Only where ``linear`` is nothing but that: adapters, parametrizations, hooks and offloading are left to work.
    """
    if is_just_linear(linear):
        return act(F.linear(x, linear.weight), bias=linear.bias)  # type: ignore[arg-type]
    return act(linear(x))


class GRKAN(nn.Module):
    """Group-rational KAN layer: a :class:`GroupRational` ``act``, then a Linear ``linear`` (KAT, arXiv 2409.10594).

    Weights are initialised as N(0, gain / in_features) and the bias as zero, where gain = 1 / E[f(z)^2] for standard
    normal z and the initial activation f. This preserves the variance of a normal input.

    Args:
        in_features, out_features, bias: of the linear layer.
        groups, init, form, degrees, dropout, numerator_groups, denominator_groups, backend: see :class:`GroupRational`.
        device, dtype: of all parameters; without dtype, coefficients are float32.

    Shapes: (..., in_features) to (..., out_features).

    Raises:
        ValueError: invalid arguments.

    Example:
        >>> import torch
        >>> from singlepass.nn import GRKAN
        >>> layer = GRKAN(256, 128, init="silu")
        >>> layer(torch.randn(32, 256)).shape
        torch.Size([32, 128])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        groups: int = 8,
        init: Init = "gelu",
        form: str = "A",
        degrees: tuple[int, int] = (5, 4),
        dropout: float = 0.0,
        *,
        numerator_groups: int = 1,
        denominator_groups: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_counts("GRKAN", in_features=in_features, out_features=out_features)
        self.act = GroupRational(
            in_features,
            groups,
            init,
            form,
            degrees,
            numerator_groups=numerator_groups,
            denominator_groups=denominator_groups,
            dropout=dropout,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.act.reset_parameters()
        _preserve_variance(self.linear, self.act.init)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(x))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in the form that timm expects."""
        return no_weight_decay(self)


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    require(len(pair) == 2, "KATMLP", f"{name} as one value or a pair", value, "Pass one for each half of the MLP.")
    return pair


class KATMLP(nn.Module):
    """KAT's MLP, in place of a transformer's MLP: act1, dropout, fc1, act2, dropout, fc2.

    Order and names are those of ``KAN`` in Adamdad/kat, katransformer.py, so its checkpoints load by name. act1 starts
    as the identity. Dropout, and the bias of fc1 with its gradient, are fused into the activations. The initialisation
    of linear layers preserves variance, see :class:`GRKAN`.

    Args:
        in_features: channels of the input.
        hidden_features, out_features: None for ``in_features``.
        groups: of both activations.
        act_init: initial function of act2, see :class:`GroupRational`; the published models use "silu" or "gelu".
        drop: probability of both dropouts, or a pair.
        bias: of both linear layers, or a pair.
        form, degrees: of both activations.
        act_layer, norm_layer: passed by timm. ``act_layer`` is ignored, as in KAT; ``norm_layer`` must be None.
        backend: of both activations.
        device, dtype: of all parameters; without dtype, coefficients are float32.

    Shapes: (..., in_features) to (..., out_features).

    Raises:
        ValueError: invalid arguments.

    Example:
        >>> import torch
        >>> from singlepass.nn import KATMLP
        >>> mlp = KATMLP(64, 256, act_init="silu", drop=0.1)
        >>> mlp(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        groups: int = 8,
        act_init: Init = "gelu",
        drop: float | tuple[float, float] = 0.0,
        bias: bool | tuple[bool, bool] = True,
        form: str = "A",
        degrees: tuple[int, int] = (5, 4),
        *,
        act_layer: object = None,
        norm_layer: object = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        remedy = "KAT's MLP has none: normalise before it."
        require(norm_layer is None, "KATMLP", "norm_layer None", norm_layer, remedy)
        hidden = in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        require_counts("KATMLP", in_features=in_features, hidden_features=hidden, out_features=out)
        (drop1, drop2), (bias1, bias2) = _pair("drop", drop), _pair("bias", bias)
        shared: dict[str, Any] = {
            "form": form,
            "degrees": degrees,
            "backend": backend,
            "device": device,
            "dtype": dtype,
        }
        self.act1 = GroupRational(in_features, groups, "identity", dropout=drop1, **shared)
        self.fc1 = nn.Linear(in_features, hidden, bias1, device=device, dtype=dtype)
        self.act2 = GroupRational(hidden, groups, act_init, dropout=drop2, **shared)
        self.fc2 = nn.Linear(hidden, out, bias2, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for act, linear in ((self.act1, self.fc1), (self.act2, self.fc2)):
            act.reset_parameters()
            _preserve_variance(linear, act.init)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_then_rational(self.act1(x), self.fc1, self.act2))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in the form that timm expects."""
        return no_weight_decay(self)
