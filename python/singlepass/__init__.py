# SPDX-License-Identifier: Apache-2.0
"""Fused CUDA, Triton and C++ kernels for PyTorch: every byte crosses memory once.

* :mod:`singlepass.optim`: optimizer steps, AdamW, Lion, AdaBelief, Adan, DiffGrad, LAMB, LARS, SGDSaI.

``singlepass info`` on the command line tells which backend runs each op here and why the others don't.
"""

from . import _dispatch, _native
from ._ops import optim as _optim_ops

_native.load()
_dispatch.register_implementations()

from . import optim  # noqa: E402  the classes bind ops that must be registered first

__version__ = "0.1.0"
__all__ = ["__version__", "optim"]

del _optim_ops
