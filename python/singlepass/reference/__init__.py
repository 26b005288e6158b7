# SPDX-License-Identifier: Apache-2.0
"""The truth: every op in eager PyTorch, for any floating dtype up to float64, and the fallback on every device."""

from . import kv, optim, rational, spectral

__all__ = ["kv", "optim", "rational", "spectral"]
