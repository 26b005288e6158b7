# SPDX-License-Identifier: Apache-2.0
"""Converts vision transformers to Kolmogorov-Arnold transformers. MLPs are recognised by their structure alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from .._linear import as_linear, is_linear, require_own_calls
from ._kat import KATMLP, linear_then_rational
from ._module import GroupRational, Init
from ._tables import TARGETS

# Exact and tanh GELU differ by 5e-4, and any two targets by more than 2e-2.
_SAME = 1e-3
_PROBE = (-8.0, 8.0, 160)

# What the activation of an MLP is called: by timm, DeiT and GPT-2, by transformers' DINOv2, by its CLIP and SigLIP, and
# by its DINOv3.
_ACTIVATIONS = ("act", "activation", "activation_fn", "act_fn")
# And the linear layers: by most, by DINOv3, by GPT-2.
_LINEARS = (("fc1", "fc2"), ("up_proj", "down_proj"), ("c_fc", "c_proj"))


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

    fc1: nn.Module
    activation: Callable[[Tensor], Tensor]
    fc2: nn.Module | None = None
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
    pair = next((pair for pair in _LINEARS if pair[0] in children), _LINEARS[0])
    fc1, fc2 = (children.pop(name, None) for name in pair)
    names = [name for name in _ACTIVATIONS if callable(getattr(module, name, None))]
    others = [child for name, child in children.items() if name not in names]
    if fc1 is None or fc2 is None or not is_linear(fc1) or not is_linear(fc2) or len(names) != 1:
        return None
    if _widths(fc1)[1] != _widths(fc2)[0] or not all(isinstance(child, nn.Dropout) for child in others):
        return None  # a gated unit, or one with a norm layer
    after = {name: child.p for name, child in children.items() if isinstance(child, nn.Dropout)}
    only = after.get("drop", after.get("dropout", 0.0))
    # KAT's first dropout stands before fc1 instead of after fc2.
    return _Parts(fc1, getattr(module, names[0]), fc2, (after.get("drop2", only), after.get("drop1", only)))


def _widths(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def _stays(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _sequence(module: nn.Module) -> _Parts | None:
    """Linear - activation - (dropout) - linear - (dropout) in a row, back to the width of the input, as torchvision's
    MLP; else None."""
    children = [child for child in module.children() if not isinstance(child, nn.Identity)]
    kinds = "".join("d" if isinstance(child, nn.Dropout) else "l" if is_linear(child) else "a" for child in children)
    if not isinstance(module, nn.Sequential) or kinds not in ("lal", "ladl", "lald", "ladld"):
        return None
    fc1, activation, fc2 = (child for child in children if not isinstance(child, nn.Dropout))
    if _widths(fc1) != _widths(fc2)[::-1] or _recognised(activation) is None:
        return None
    after = kinds.find("l", 1)
    drop2 = children[2].p if after == 3 else 0.0
    drop1 = children[-1].p if kinds.endswith("d") else 0.0
    return _Parts(fc1, activation, fc2, (drop1, drop2))  # type: ignore[arg-type]


def _intermediate(module: nn.Module) -> _Parts | None:
    """Linear - activation as in transformers' ViTIntermediate; else None."""
    activation = getattr(module, "intermediate_act_fn", None)
    dense = getattr(module, "dense", None)
    names = {name for name, _ in module.named_children()}
    if not callable(activation) or type(dense) is not nn.Linear or names - {"dense", "intermediate_act_fn"}:
        return None
    return _Parts(dense, activation)


def _find(model: nn.Module) -> list[_Found]:
    """All MLPs, each once, with all places where it stands."""
    found: dict[int, _Found] = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            parts = None if child is None else _mlp(child) or _sequence(child) or _intermediate(child)
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
    fc1, fc2 = as_linear(parts.fc1), None if parts.fc2 is None else as_linear(parts.fc2)
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

    MLPs are recognised by structure: two linear layers, an activation, and nothing else but dropouts. Layers are called
    ``fc1`` and ``fc2`` (timm, DeiT, DINOv2, CLIP), ``up_proj`` and ``down_proj`` (DINOv3), ``c_fc`` and ``c_proj``
    (GPT-2), or stand in a torch.nn.Sequential that leads back to the width of its input (torchvision; with an
    activation that has a table); they become ``fc1`` and ``fc2``. Or: ``dense`` and ``intermediate_act_fn`` only (ViT
    of Transformers); ``dense`` stays. The ``Conv1D`` layers of GPT-2 become torch.nn.Linear, with copies of their
    weights, transposed. Gated units, such as SwiGLU, stay as they are. The activation is recognised by its values.
    Dropout moves to where KAT has it: before fc1 instead of after fc2.

    Args:
        model: any module that contains such MLPs.
        groups: of all activations; divides the width of each MLP's input and hidden layer.
        init: initial function of the second activation, see :class:`GroupRational`; None for the model's activation.
        form, degrees, backend: of all activations.

    Returns:
        Module: ``model``. Create the optimizer afterwards, so that it gets the new coefficients. A checkpoint of the
        converted model loads into a model that was converted with the same arguments.

    Raises:
        ValueError: no such MLP, an activation without a table, an MLP with hooks or a patched forward method, or
            invalid arguments. The model is unchanged.

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
    contract = "a model with MLPs of two linear layers around an activation and no gate, as timm and transformers build"
    done = any(isinstance(module, KATMLP | KATIntermediate) for module in model.modules())
    remedy = "It has been converted already." if done else "Put singlepass.nn.KATMLP in place of its MLPs."
    require(len(found) > 0, op, contract, type(model).__name__, remedy)
    replaced = ((e.name, m) for e in found for m in (e.module, e.parts.fc1, e.parts.fc2) if m and not _stays(m))
    require_own_calls(op, replaced)
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
