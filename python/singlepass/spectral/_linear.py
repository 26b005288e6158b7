# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import message, require
from .._ops import check_backend
from ._decompose import decompose
from ._frozen import check_frozen_dtype, factors_shape, freeze, frozen_parameter, thaw
from ._functional import EVALUATIONS, GRADIENTS, sst_linear
from ._watch import Watch, off_unit, warn
from ._weight import CONTRACT, REMEDY, WeightCopy

# Every layer that lives: an optimizer that is given parameters finds theirs here.
_layers: weakref.WeakSet[SSTLinear] = weakref.WeakSet()


def layers_by_parameter() -> dict[int, SSTLinear]:
    """The layer to which each spectral parameter belongs, by the parameter's id."""
    return {id(p): layer for layer in list(_layers) for p in (layer.singular_values, layer.active_u, layer.active_v)}


def frozen_parameters() -> set[int]:
    """The ids of all vectors that no optimizer may touch."""
    return {id(p) for layer in list(_layers) for p in (layer.frozen_u, layer.frozen_v)}


def rank_of(where: str, rank: float, size: int) -> int:
    """A rank given as a number of vectors, or as a fraction of all ``size`` of them.

    Raises:
        ValueError: a rank outside 1..size.
    """
    count = rank
    if isinstance(rank, Real) and not isinstance(rank, Integral) and 0.0 < rank < 1.0:
        count = max(1, round(rank * size))
    fits = isinstance(count, Integral) and not isinstance(count, bool) and 1 <= count <= size
    require(fits, where, f"a rank from 1 to {size}, or a fraction between 0 and 1", repr(rank), "Choose one within.")
    return int(count)


class SSTLinear(nn.Module):
    """A linear layer for sparse spectral training: W = U^T diag(s) V, of which ``rank`` vectors are trained at a time.

    W is (m, n) with m = ``out_features`` and n = ``in_features``. It has full rank and k = min(m, n) singular values,
    all of which are trained. :class:`SST` chooses the active singular vectors and keeps them at unit length. Train the
    layer with :class:`SST` only.

    Args:
        in_features: n.
        out_features: m.
        rank: how many singular vectors are trained at a time, 1 to k, or a fraction of k.
        bias: whether there is a bias.
        frozen_dtype: storage dtype of the k - rank frozen vectors: None for ``dtype``; torch.bfloat16 or torch.float16;
            torch.int8 for codes with one float32 scale per 128 columns of a vector. Rounding changes W slightly, at the
            start and whenever vectors are swapped.
        gradient: of active vectors: "enhanced", without the singular value, or "default" (see :func:`sst_linear`).
        evaluation: "auto", "factored" or "materialized" (see :func:`sst_linear`).
        device: of the parameters.
        dtype: of the parameters, torch.float32, bfloat16, float16 or float64.
        backend: "native", "triton" or "eager"; None selects one.
        weight: the initial W (m, n); None: as in torch.nn.Linear.

    Parameters: ``singular_values`` (k,), the active ones first; ``active_u`` (rank, m) and ``active_v`` (rank, n);
    ``frozen_u`` (k - rank, m) and ``frozen_v`` (k - rank, n), without gradients; ``bias`` (m,) or None. Buffers:
    ``scales_u`` and ``scales_v``, the scales of int8 codes, and ``draws``, int64, how often vectors were drawn. What
    has no elements is not in state dicts. The initial weight is decomposed in float64.

    Raises:
        ValueError: invalid sizes, rank or options.

    Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML
    2025, arXiv 2405.15481.

    Example:
        >>> import torch
        >>> from singlepass.spectral import SSTLinear
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = SSTLinear.from_linear(linear, rank=4)
        >>> x = torch.randn(8, 64)
        >>> torch.allclose(layer(x), linear(x), atol=1e-5)
        True
        >>> layer
        SSTLinear(in_features=64, out_features=32, rank=4, bias=True)
    """

    weights_of_one_dimension = ("singular_values",)  # for singlepass.optim.param_groups: they decay

    bias: nn.Parameter | None
    frozen_u: nn.Parameter
    frozen_v: nn.Parameter
    scales_u: Tensor
    scales_v: Tensor
    draws: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: float,
        bias: bool = True,
        *,
        frozen_dtype: torch.dtype | None = None,
        gradient: str = "enhanced",
        evaluation: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._watch = Watch()
        sizes = (in_features, out_features)
        fits = all(isinstance(size, Integral) and size >= 1 for size in sizes)
        require(fits, "SSTLinear", "in_features and out_features of at least 1", sizes, "Pass positive ints.")
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.rank = rank_of("SSTLinear", rank, min(sizes))
        check_frozen_dtype("SSTLinear", frozen_dtype)
        for name, value, known in (("gradient", gradient, GRADIENTS), ("evaluation", evaluation, EVALUATIONS)):
            require(value in known, "SSTLinear", f"{name} among {', '.join(known)}", repr(value), "Choose one of them.")
        check_backend("SSTLinear", backend)
        self.gradient, self.evaluation, self.backend = gradient, evaluation, backend
        dtype = torch.get_default_dtype() if dtype is None else dtype
        stored = dtype if frozen_dtype is None else frozen_dtype
        k, rest = min(sizes), min(sizes) - self.rank
        self.singular_values = nn.Parameter(torch.empty(k, device=device, dtype=dtype))
        self.active_u = nn.Parameter(torch.empty(self.rank, self.out_features, device=device, dtype=dtype))
        self.active_v = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=dtype))
        for side, columns in (("u", self.out_features), ("v", self.in_features)):
            rows = torch.empty(rest, columns, device=device, dtype=stored)
            self.register_parameter(f"frozen_{side}", frozen_parameter(rows))
            factors = factors_shape(rest, columns, stored)
            self.register_buffer(f"scales_{side}", torch.empty(factors, device=device, dtype=torch.float32))
        self.register_buffer("draws", torch.zeros((), device=device, dtype=torch.int64))
        offset = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", offset)
        if weight is None:
            SSTLinear.reset_parameters(self)  # of a subclass, parameters are still missing
        else:
            self.set_weight(weight)
            self._reset_bias()
        self.trust_vectors()
        _layers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _layers.add(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(message("SSTLinear", CONTRACT, "an assignment", REMEDY))
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SSTLinear:
        factors = self.scales_u, self.scales_v
        super()._apply(fn, recurse)
        if self.scales_u.dtype != torch.float32:
            # What converts the layer to another dtype leaves int8 codes their factors.
            device = self.scales_u.device
            self.scales_u, self.scales_v = (t.to(device) for t in factors)
        self._keep_frozen()
        return self

    def _keep_frozen(self) -> None:
        """Where others have replaced frozen vectors, what they are made of is what it was."""
        for name in ("frozen_u", "frozen_v"):
            setattr(self, name, frozen_parameter(getattr(self, name)))

    @property
    def frozen_dtype(self) -> torch.dtype:
        """How frozen vectors are stored."""
        return self.frozen_u.dtype

    def reset_parameters(self) -> None:
        """Initialises as torch.nn.Linear does."""
        weight = torch.empty(self.out_features, self.in_features, device=self.active_u.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.set_weight(weight)
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Takes the singular value decomposition of a weight (m, n), finite; the largest values become active.

        They count as not drawn: what is saved before the next draw of an optimizer does not resume.

        Raises:
            ValueError: another shape, or values that are not finite; nothing is changed.
        """
        if weight.is_meta:
            return
        shape = (self.out_features, self.in_features)
        require(
            tuple(weight.shape) == shape, "SSTLinear", f"a weight of shape {shape}", tuple(weight.shape), "Check it."
        )
        finite = bool(weight.isfinite().all())
        require(finite, "SSTLinear", "a finite weight", "infinities or NaNs", "Mend the weight first.")
        self.set_factors(*decompose(weight))

    @torch.no_grad()
    def set_factors(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Takes U (k, m), s (k,) and V (k, n); the first ``rank`` become active, and count as not drawn."""
        self.singular_values.copy_(s)
        self.active_u.copy_(u[: self.rank])
        self.active_v.copy_(v[: self.rank])
        for name, rows in (("u", u[self.rank :]), ("v", v[self.rank :])):
            stored, scales = freeze(rows, self.frozen_dtype)
            getattr(self, f"frozen_{name}").copy_(stored)
            getattr(self, f"scales_{name}").copy_(scales)
        self.draws.zero_()

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (k, m), s (k,) and V (k, n), active ones first, copied; of frozen vectors what their storage holds."""
        dtype = self.active_u.dtype
        u, v = thaw(self.frozen_u, self.scales_u), thaw(self.frozen_v, self.scales_v)
        rows = [torch.cat((a, f.to(dtype))) for a, f in ((self.active_u, u), (self.active_v, v))]
        return rows[0], self.singular_values.detach().clone(), rows[1]

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:
        """W (m, n), of the parameters' dtype, made anew at each access; it takes no gradient.

        Writing to it raises a RuntimeError, and assigning it an AttributeError: :meth:`set_weight` is the way.
        """
        weight = self._dense()
        return weight if torch.compiler.is_compiling() else weight.as_subclass(WeightCopy)

    @torch.no_grad()
    def _dense(self) -> Tensor:
        u, s, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in self.factors())
        return ((u * s.unsqueeze(-1)).mT @ v).to(self.active_u.dtype)

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters that have singular vectors: active u and v, frozen u and v."""
        return self.active_u, self.active_v, self.frozen_u, self.frozen_v

    def _is_trained(self) -> bool:
        """Whether the layer is not frozen by ``requires_grad_(False)``."""
        return any(p.requires_grad for p in (self.singular_values, self.active_u, self.active_v))

    def trust_vectors(self) -> None:
        """Takes the active vectors to be of unit length until somebody writes to them. SST calls this after its steps.

        In training, a layer whose vectors others have moved from unit length warns, once in a process.
        """
        self._watch.trust(self.active_u, self.active_v)

    @torch.no_grad()
    def set_rank(self, rank: float) -> bool:
        """Trains another number of vectors at a time, the first ones in the present order.

        Active and frozen vectors become new parameters, without gradients.

        Returns:
            bool: whether the rank is another than before.

        Raises:
            ValueError: a rank that doesn't fit; nothing is changed.
        """
        rank = rank_of("SSTLinear", rank, len(self.singular_values))
        if rank == self.rank:
            return False
        u, _, v = self.factors()
        stored = self.frozen_dtype
        self.rank = rank
        for side, rows in (("u", u), ("v", v)):
            frozen, scales = freeze(rows[rank:], stored)
            trained = getattr(self, f"active_{side}").requires_grad
            setattr(self, f"active_{side}", nn.Parameter(rows[:rank].clone(), requires_grad=trained))
            setattr(self, f"frozen_{side}", frozen_parameter(frozen))
            setattr(self, f"scales_{side}", scales)
        return True

    def _empty(self) -> dict[str, Tensor]:
        """What has no elements. Savers take several tensors without memory for one that is shared, and leave it out."""
        tensors = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        return {name: t for name, t in tensors if t.numel() == 0}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._empty():
            del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = (state_dict.get(f"{prefix}active_{side}") for side in "uv")
        active = [t for t in found if isinstance(t, Tensor) and t.dim() == 2]
        if len(active) == 2:
            (rank, outputs), (_, inputs) = (t.shape for t in active)
            known = outputs == self.out_features and inputs == self.in_features
            if known and 1 <= rank <= len(self.singular_values):
                self.set_rank(rank)
        for name, t in self._empty().items():
            state_dict.setdefault(prefix + name, t)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._keep_frozen()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: float,
        *,
        frozen_dtype: torch.dtype | None = None,
        gradient: str = "enhanced",
        evaluation: str = "auto",
        backend: str | None = None,
    ) -> SSTLinear:
        """The layer that computes what ``linear`` does, of its device and dtype.

        Args:
            linear: a torch.nn.Linear; it is not changed, and its bias is copied.
            rank, frozen_dtype, gradient, evaluation, backend: as for the class.

        Raises:
            ValueError: another module, a weight that is not finite, a rank or options that don't fit.
        """
        options = {"frozen_dtype": frozen_dtype, "gradient": gradient, "evaluation": evaluation, "backend": backend}
        return cls._from_linear(linear, rank, options)

    @classmethod
    def _from_linear(cls, linear: nn.Linear, rank: float, options: dict[str, Any]) -> SSTLinear:
        fits = isinstance(linear, nn.Linear)
        require(fits, "SSTLinear.from_linear", "a torch.nn.Linear", type(linear).__name__, "Convert its linear layers.")
        weight = linear.weight
        require(not weight.is_meta, "SSTLinear.from_linear", "a weight with values", "one on meta", "Load it first.")
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            weight=weight.detach(),
            **options,
        )
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A torch.nn.Linear with this weight and bias, of the same device and dtype.

        Warns if singular vectors are not of unit length: the weight is right, but was not trained by :class:`SST`.
        """
        lengths = self._off_unit()
        if lengths is not None:
            warn("SSTLinear.to_linear", f"lengths from {lengths[0]:.3g} to {lengths[1]:.3g}")
        return self._as_linear()

    def _off_unit(self) -> tuple[float, float] | None:
        """The least and the greatest length of singular vectors, if one of them is not of unit length."""
        u, _, v = self.factors()
        return off_unit(u, v)

    def _as_linear(self) -> nn.Linear:
        """What :meth:`to_linear` returns, without its warning."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self._dense())
        linear.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias.detach().clone()))
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to (..., m)."""
        u, v = self.active_u, self.active_v
        if not torch.compiler.is_compiling() and self.training and torch.is_grad_enabled():
            self._watch.look("SSTLinear", u, v)
        return sst_linear(
            x,
            u,
            v,
            self.singular_values,
            self.frozen_u,
            self.frozen_v,
            self.bias,
            scales=(self.scales_u, self.scales_v) if self.frozen_dtype == torch.int8 else None,
            gradient=self.gradient,
            evaluation=self.evaluation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        text += f", bias={self.bias is not None}"
        return text if self.frozen_dtype == self.active_u.dtype else f"{text}, frozen_dtype={self.frozen_dtype}"
