# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training: linear layers U^T diag(s) V that train all singular values and a few vectors at a time."""

from ._convert import HEADS, convert, merge
from ._frozen import training_nbytes
from ._functional import lorentz, sst_linear
from ._hyperbolic import LorentzLinear
from ._linear import SSTLinear
from ._optimizer import SST

__all__ = ["HEADS", "SST", "LorentzLinear", "SSTLinear", "convert", "lorentz", "merge", "sst_linear", "training_nbytes"]


def __dir__() -> list[str]:
    """For completion: the public names."""
    return sorted(__all__)
