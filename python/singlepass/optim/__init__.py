# SPDX-License-Identifier: Apache-2.0
"""Fused optimizers: drop-in :class:`torch.optim.Optimizer` subclasses whose steps read and write each tensor once."""

from .adabelief import AdaBelief
from .adamw import AdamW
from .adan import Adan
from .diffgrad import DiffGrad
from .lamb import LAMB
from .lars import LARS
from .lion import Lion
from .sgdsai import SGDSaI

__all__ = ["LAMB", "LARS", "AdaBelief", "AdamW", "Adan", "DiffGrad", "Lion", "SGDSaI"]
