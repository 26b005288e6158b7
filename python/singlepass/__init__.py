# SPDX-License-Identifier: Apache-2.0
"""Fused CUDA, Triton and C++ kernels for PyTorch: every byte crosses memory once.

* :mod:`singlepass.optim`: optimizer steps, AdamW, Lion, AdaBelief, Adan, DiffGrad, LAMB, LARS, SGDSaI.
* :mod:`singlepass.nn`: rational (KAN) activations with group-wise coefficients, and :mod:`singlepass.functional` below.
* :mod:`singlepass.kv`: KV caches in 4 and 2 bits, and attention that reads their codes.
* :mod:`singlepass.spectral`: sparse spectral training, full-rank linear layers at the memory of low rank.

``singlepass info`` on the command line tells which backend runs each op here and why the others don't.
"""

from . import _dispatch, _native

_native.load()
_dispatch.register_implementations()

from . import functional, kv, nn, optim, spectral  # noqa: E402  they bind ops that must be registered first

__version__ = "0.1.0"
__all__ = ["__version__", "functional", "kv", "nn", "optim", "spectral"]
