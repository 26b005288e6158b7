# SPDX-License-Identifier: Apache-2.0
"""The contract of every op: schemas and fakes, which exist whether or not a binary was built."""

from __future__ import annotations

import torch

NAMESPACE = "singlepass"

# Registrations live as long as this object.
library = torch.library.Library(NAMESPACE, "DEF")


def op(name: str) -> torch._ops.OpOverload:
    """The default overload of a singlepass op, bound once by its callers."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default
