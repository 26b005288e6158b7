# SPDX-License-Identifier: Apache-2.0
"""Converts vision transformers to Kolmogorov-Arnold transformers. MLPs are recognised by their structure alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from ._kat import KATMLP, linear_then_rational
from ._module import GroupRational, Init
from ._tables import TARGETS

# Exact and tanh GELU differ by 5e-4, and any two targets by more than 2e-2.
_SAME = 1e-3
_PROBE = (-8.0, 8.0, 160)

# What the activation of an MLP is called: by timm and DeiT, by transformers' DINOv2, and by its CLIP and SigLIP.
_ACTIVATIONS = ("act", "activation", "activation_fn")


class KATIntermediate(nn.Module):
    """act1 - dense - act2: what :func:`kat_from_vit` puts in the place of transformers' ``ViTIntermediate``."""

    def __init__(self, act1: GroupRational, dense: nn.Module, act2: GroupRational) -> None:
        super().__init__()
        self.act1 = act1
        self.dense = dense
        self.act2 = act2

    def forward(self, x: Tensor) -> Tensor:
        return linear_then_rational(self.act1(x), self.dense, self.act2)


@dataclass
class _Parts:
    """What an MLP is made of; transformers' ViT has the second linear layer elsewhere, where it stays."""

    fc1: nn.Linear
    activation: Callable[[Tensor], Tensor]
    fc2: nn.Linear | None = None
    drops: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Found:
    module: nn.Module
    name: str
    parts: _Parts
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


def _mlp(module: nn.Module) -> _Parts | None:
    """Linear - activation - (dropout) - linear - (dropout) and nothing else, as in timm; else None."""
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    fc1, fc2 = children.pop("fc1", None), children.pop("fc2", None)
    names = [name for name in _ACTIVATIONS if callable(getattr(module, name, None))]
    others = [child for name, child in children.items() if name not in names]
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear) or len(names) != 1:
        return None
    if fc1.out_features != fc2.in_features or not all(isinstance(child, nn.Dropout) for child in others):
        return None  # a gated unit, or one with a norm layer
    after = {name: child.p for name, child in children.items() if isinstance(child, nn.Dropout)}
    only = after.get("drop", after.get("dropout", 0.0))
    # KAT's first dropout stands before fc1 instead of after fc2.
    return _Parts(fc1, getattr(module, names[0]), fc2, (after.get("drop2", only), after.get("drop1", only)))


def _intermediate(module: nn.Module) -> _Parts | None:
    """Linear - activation as in transformers' ViTIntermediate; else None."""
    activation = getattr(module, "intermediate_act_fn", None)
    dense = getattr(module, "dense", None)
    names = {name for name, _ in module.named_children()}
    if not callable(activation) or not isinstance(dense, nn.Linear) or names - {"dense", "intermediate_act_fn"}:
        return None
    return _Parts(dense, activation)


def _find(model: nn.Module) -> list[_Found]:
    """All MLPs, each once, with all places where it stands."""
    found: dict[int, _Found] = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            parts = None if child is None else _mlp(child) or _intermediate(child)
            if child is not None and parts is not None:
                entry = found.setdefault(id(child), _Found(child, f"{path}.{name}".lstrip("."), parts))
                entry.places.append((parent, name))
    return list(found.values())


def _recognised(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The table of an activation, told by what it computes: class names differ between libraries and versions."""
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None
    x = torch.linspace(*_PROBE, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        y = activation(x.clone())  # which may work in place
        if y.shape != x.shape:
            return None
        return next((name for name, f in TARGETS.items() if float((y - f(x)).abs().max()) < _SAME), None)


def _converted(parts: _Parts, groups: int, init: Init, options: dict[str, Any]) -> nn.Module:
    fc1, fc2 = parts.fc1, parts.fc2
    options = {**options, "device": fc1.weight.device}
    act1 = GroupRational(fc1.in_features, groups, "identity", dropout=parts.drops[0], **options)
    act2 = GroupRational(fc1.out_features, groups, init, dropout=parts.drops[1], **options)
    if fc2 is None:
        return KATIntermediate(act1, fc1, act2)
    mlp = KATMLP(fc1.in_features, fc1.out_features, fc2.out_features, groups, device="meta")
    mlp.act1, mlp.fc1, mlp.act2, mlp.fc2 = act1, fc1, act2, fc2
    return mlp


def kat_from_vit(
    model: nn.Module,
    *,
    groups: int = 8,
    init: Init | None = None,
    form: str = "A",
    degrees: tuple[int, int] = (5, 4),
    backend: str | None = None,
) -> nn.Module:
    """Converts a vision transformer to a KAT, in place: each MLP becomes a :class:`KATMLP` with the same linear layers.

    The first activation of each MLP starts as the identity, the second as the model's own activation. So the model
    computes the same as before, up to the table's error within its interval, [-8, 8] for GELU, and more outside.
    ``init`` accepts other tables, such as those of :func:`fit_rational`. Coefficients are float32.

    MLPs are recognised by structure. Either: linear layers ``fc1`` and ``fc2``, an activation ``act``, ``activation``
    or ``activation_fn``, and nothing else but dropouts (timm, DeiT, DINOv2, CLIP); the names ``fc1`` and ``fc2`` stay.
    Or: ``dense`` and ``intermediate_act_fn`` only (ViT of Transformers); ``dense`` stays. ``Conv1D`` layers, as in
    Transformers' GPT-2, are not recognised. The activation is recognised by its values. Dropout moves to where KAT has
    it: before fc1 instead of after fc2.

    Args:
        model: any module that contains such MLPs.
        groups: of all activations; divides the width of each MLP's input and hidden layer.
        init: initial function of the second activation, see :class:`GroupRational`; None for the model's activation.
        form, degrees, backend: of all activations.

    Returns:
        Module: ``model``. Create the optimizer afterwards, so that it gets the new coefficients. A checkpoint of the
        converted model loads into a model that was converted with the same arguments.

    Raises:
        ValueError: no such MLP, an activation without a table, or invalid arguments. The model is unchanged.

    Example:
        >>> import torch
        >>> from singlepass.nn import kat_from_vit
        >>> class Mlp(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.act, self.fc2 = torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)
        >>> model = kat_from_vit(torch.nn.Sequential(Mlp()))
        >>> [name for name, _ in model[0].named_children()]
        ['act1', 'fc1', 'act2', 'fc2']
    """
    op = "kat_from_vit"
    found = _find(model)
    contract = "a model with MLPs of two linear layers around an activation, as timm and transformers build them"
    require(len(found) > 0, op, contract, type(model).__name__, "Put singlepass.nn.KATMLP in place of its MLPs.")
    made = []
    for entry in found:
        start = init if init is not None else _recognised(entry.parts.activation)
        contract = f"an activation among {', '.join(sorted(TARGETS))}"
        got = f"{entry.parts.activation} at {entry.name}"
        require(start is not None, op, contract, got, "Fit a table of it by singlepass.nn.fit_rational, as init.")
        assert start is not None
        options = {"form": form, "degrees": degrees, "backend": backend}
        made.append(_converted(entry.parts, groups, start, options).train(entry.module.training))
    for entry, module in zip(found, made, strict=True):
        for parent, name in entry.places:
            setattr(parent, name, module)
    return model
