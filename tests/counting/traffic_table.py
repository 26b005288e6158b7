# SPDX-License-Identifier: Apache-2.0
"""All calls whose traffic is counted."""

from __future__ import annotations

from ..kv import traffic as kv
from ..optim import traffic as optim
from ..rational import traffic as rational
from ..spectral import traffic as spectral

ROWS = [*kv.rows(), *optim.rows(), *rational.rows(), *spectral.rows()]
# What Triton's interpreter runs in seconds: of each op the first.
TRITON_ROWS = [*{row.op.name: row for row in reversed(ROWS) if row.op.has_triton and not row.deep}.values()]
