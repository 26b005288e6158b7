# SPDX-License-Identifier: Apache-2.0
"""The contract of every op, one :class:`~singlepass._ops.op.Op` each. They exist whether or not a binary was built."""

from . import kv, optim, rational, spectral
from .op import BACKENDS, ENV, OPS, Op, bind, check_backend, requested

__all__ = ["BACKENDS", "ENV", "OPS", "Op", "bind", "check_backend", "kv", "optim", "rational", "requested", "spectral"]
