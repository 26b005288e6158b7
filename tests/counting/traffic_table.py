# SPDX-License-Identifier: Apache-2.0
"""All calls whose traffic is counted."""

from __future__ import annotations

from ..kv import traffic as kv
from ..optim import traffic as optim
from ..rational import traffic as rational
from ..spectral import traffic as spectral

ROWS = [*kv.rows(), *optim.rows(), *rational.rows(), *spectral.rows()]
