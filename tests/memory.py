# SPDX-License-Identifier: Apache-2.0
"""Huge tensors need what other programs have left, not what the machine has: else the system ends one of them."""

from __future__ import annotations

import pytest
import torch

from singlepass.bench.memory import available_bytes

GIB = 2**30


def need(device: str, nbytes: int) -> None:
    """Skips a test where there is no room for these bytes and a GiB of others."""
    available = available_bytes(torch.device(device))
    if available < nbytes + GIB:
        pytest.skip(f"needs {nbytes / GIB:.0f} GiB, {device} has {available / GIB:.0f} left")
