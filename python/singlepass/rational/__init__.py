# SPDX-License-Identifier: Apache-2.0
"""Rational (KAN) activations. :mod:`singlepass.nn` and :mod:`singlepass.functional` are where users find them."""

from ._convert import kat_from_vit
from ._fit import fit_rational
from ._functional import rational
from ._kat import GRKAN, KATMLP
from ._module import GroupRational, no_weight_decay
from ._tables import Table, table

__all__ = [
    "GRKAN",
    "KATMLP",
    "GroupRational",
    "Table",
    "fit_rational",
    "kat_from_vit",
    "no_weight_decay",
    "rational",
    "table",
]


def __dir__() -> list[str]:
    """For completion: the public names."""
    return sorted(__all__)
