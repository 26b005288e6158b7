# SPDX-License-Identifier: Apache-2.0
"""Learnable rational (KAN) activations with coefficients shared within groups of channels, and layers that use them."""

from .convert import kat_from_vit
from .fit import fit_rational
from .kat import GRKAN, KATMLP
from .rational import GroupRational, no_weight_decay
from .tables import Table, table

__all__ = ["GRKAN", "KATMLP", "GroupRational", "Table", "fit_rational", "kat_from_vit", "no_weight_decay", "table"]
