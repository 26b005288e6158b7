# SPDX-License-Identifier: Apache-2.0
"""Fused optimizers: drop-in :class:`torch.optim.Optimizer` subclasses whose steps read and write each tensor once.

:func:`param_groups` sorts a model's parameters by weight decay, and :func:`clip_grad_norm_` clips their gradients.
:func:`register_with_timm` makes the optimizers known to timm.
``SST``, the optimizer of sparse spectral training, is :class:`singlepass.spectral.SST`.
"""

from typing import Any

from ._adabelief import AdaBelief
from ._adamw import AdamW
from ._adan import Adan
from ._clip import clip_grad_norm_
from ._diffgrad import DiffGrad
from ._groups import param_groups
from ._lamb import LAMB
from ._lars import LARS
from ._lion import Lion
from ._sgdsai import SGDSaI
from ._timm import register_with_timm

__all__ = [
    "LAMB",
    "LARS",
    "AdaBelief",
    "AdamW",
    "Adan",
    "DiffGrad",
    "Lion",
    "SGDSaI",
    "clip_grad_norm_",
    "param_groups",
    "register_with_timm",
]

_OPTIMIZERS = tuple(name for name in __all__ if isinstance(globals()[name], type))


def __getattr__(name: str) -> Any:
    """SST builds on AdamW, so that its family is imported after this one."""
    if name != "SST":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..spectral import SST

    return SST


def __dir__() -> list[str]:
    """For completion: the public names, SST included."""
    return sorted([*__all__, "SST"])
