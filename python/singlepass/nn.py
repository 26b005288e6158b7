# SPDX-License-Identifier: Apache-2.0
"""The modules of all families, and what makes and converts them.

* Learnable rational (KAN) activations, with coefficients shared within groups of channels: :class:`GroupRational`;
  layers that use them, :class:`GRKAN` and :class:`KATMLP`; :func:`kat_from_vit`, :func:`fit_rational`, :func:`table`.
* Linear layers for sparse spectral training: :class:`SSTLinear` and :class:`LorentzLinear`. The optimizer and the
  conversion of models are in :mod:`singlepass.spectral`.
"""

from .rational import GRKAN, KATMLP, GroupRational, Table, fit_rational, kat_from_vit, no_weight_decay, table
from .spectral import LorentzLinear, SSTLinear

__all__ = [
    "GRKAN",
    "KATMLP",
    "GroupRational",
    "LorentzLinear",
    "SSTLinear",
    "Table",
    "fit_rational",
    "kat_from_vit",
    "no_weight_decay",
    "table",
]


def __dir__() -> list[str]:
    """For completion: the public names."""
    return sorted(__all__)
