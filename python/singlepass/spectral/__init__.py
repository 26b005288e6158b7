# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training: linear layers U^T diag(s) V that train all singular values and a few vectors at a time."""

from .convert import HEADS, convert, merge
from .frozen import training_nbytes
from .functional import lorentz, sst_linear
from .hyperbolic import LorentzLinear
from .linear import SSTLinear
from .optimizer import SST

__all__ = ["HEADS", "SST", "LorentzLinear", "SSTLinear", "convert", "lorentz", "merge", "sst_linear", "training_nbytes"]
