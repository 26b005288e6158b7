# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._errors import message, require
from ._functional import lorentz
from ._linear import SSTLinear


class LorentzLinear(SSTLinear):
    """HyboNet's linear layer between hyperboloids, trained by sparse spectral training.

    Computes z = W x + b for points x (..., n) with the time coordinate first, then
    :func:`singlepass.spectral.lorentz` in one pass: the time coordinate becomes sigmoid(z_0) exp(log_scale) + offset,
    and the others are rescaled so that -x_0^2 + x_1^2 + ... = -k.

    Args:
        in_features: n, including the time coordinate.
        out_features: m, including the time coordinate, at least 2.
        rank: how many singular vectors are trained at a time.
        bias: whether there is a bias.
        k: minus the squared Lorentz norm of points, positive.
        offset: minimum of the time coordinate, at least sqrt(k).
        scale: the initial exp(log_scale), positive.
        train_scale: whether log_scale is trained.
        dropout: probability that an element of the input is zeroed in training.
        activation: applied to the input first, or None.
        frozen_dtype, gradient, evaluation, device, dtype, backend, weight: as for :class:`SSTLinear`.

    Parameters: those of :class:`SSTLinear`, and ``log_scale``, one element.

    Raises:
        ValueError: invalid sizes or options.

    Source: LorentzLinear of Chen et al., "Fully Hyperbolic Neural Networks", ACL 2022, arXiv 2105.14686.

    Example:
        >>> import torch
        >>> from singlepass.spectral import LorentzLinear
        >>> layer = LorentzLinear(9, 17, rank=2)
        >>> y = layer(torch.randn(4, 9))
        >>> torch.allclose(y[:, 1:].square().sum(-1) - y[:, 0] ** 2, -torch.ones(4), atol=1e-4)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: float,
        bias: bool = True,
        *,
        k: float = 1.0,
        offset: float = 1.1,
        scale: float = 10.0,
        train_scale: bool = True,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        frozen_dtype: torch.dtype | None = None,
        gradient: str = "enhanced",
        evaluation: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        weight: Tensor | None = None,
    ) -> None:
        require(out_features >= 2, "LorentzLinear", "out_features of at least 2", out_features, "Count the time.")
        require(k > 0.0 and offset >= k**0.5, "LorentzLinear", "k > 0, offset >= sqrt(k)", (k, offset), "Raise offset.")
        require(scale > 0.0, "LorentzLinear", "a positive scale", scale, "Its logarithm is the parameter.")
        super().__init__(
            in_features,
            out_features,
            rank,
            bias,
            frozen_dtype=frozen_dtype,
            gradient=gradient,
            evaluation=evaluation,
            device=device,
            dtype=dtype,
            backend=backend,
            weight=weight,
        )
        self.k, self.offset, self.scale, self.activation = k, offset, scale, activation
        self.dropout = nn.Dropout(dropout)
        log_scale = torch.empty((), device=device, dtype=self.active_u.dtype)
        self.log_scale = nn.Parameter(log_scale, requires_grad=train_scale)
        self._reset_scale()

    def reset_parameters(self) -> None:
        """Initialises as torch.nn.Linear does, and log_scale by the initial scale."""
        super().reset_parameters()
        self._reset_scale()

    def _reset_scale(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.scale))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: float,
        *,
        k: float = 1.0,
        offset: float = 1.1,
        scale: float = 10.0,
        train_scale: bool = True,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        frozen_dtype: torch.dtype | None = None,
        gradient: str = "enhanced",
        evaluation: str = "auto",
        backend: str | None = None,
    ) -> SSTLinear:
        """The layer whose W and b are those of ``linear``, of its device and dtype.

        Args:
            linear: a torch.nn.Linear; it is not changed, and its bias is copied.
            rank, k, offset, scale, train_scale, dropout, activation: as for the class.
            frozen_dtype, gradient, evaluation, backend: as for :class:`SSTLinear`.

        Raises:
            ValueError: another module, a weight that is not finite, a rank or options that don't fit.
        """
        options = {
            "k": k,
            "offset": offset,
            "scale": scale,
            "train_scale": train_scale,
            "dropout": dropout,
            "activation": activation,
            "frozen_dtype": frozen_dtype,
            "gradient": gradient,
            "evaluation": evaluation,
            "backend": backend,
        }
        return cls._from_linear(linear, rank, options)

    def to_linear(self) -> nn.Linear:
        """Not what a linear layer can be.

        Raises:
            NotImplementedError: always.
        """
        remedy = "Apply singlepass.spectral.lorentz after a torch.nn.Linear with this layer's weight and bias."
        raise NotImplementedError(message("LorentzLinear", "a layer without the map to be wanted", "this one", remedy))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to points (..., m) of the hyperboloid."""
        if self.activation is not None:
            x = self.activation(x)
        z = super().forward(self.dropout(x))
        return lorentz(z, self.log_scale, k=self.k, offset=self.offset, backend=self.backend)
