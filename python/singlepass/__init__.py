# SPDX-License-Identifier: Apache-2.0
"""Fused optimizers, KAN activations, KV-cache compression and sparse spectral training for PyTorch.

* :mod:`singlepass.optim`: AdamW, Lion, AdaBelief, Adan, DiffGrad, LAMB, LARS, SGDSaI.
* :mod:`singlepass.nn`: learnable rational (KAN) activations, and the linear layers of sparse spectral training.
* :mod:`singlepass.functional`: every function of the package, by itself.
* :mod:`singlepass.kv`: KV caches in 4 and 2 bits, and attention on the packed codes.
* :mod:`singlepass.spectral`: sparse spectral training of full-rank linear layers in less memory.

Kernels are in C++, CUDA and Triton, and read and write each tensor once. ``singlepass info`` on the command line shows
which backend runs each op here and why the others do not. The logger is ``singlepass``.
"""

from . import _native, _ops, functional, kv, nn, optim, spectral
from . import reference as reference  # which registers itself behind the ops

_native.load()
_ops.bind()

__version__ = "0.1.0"
__all__ = ["__version__", "functional", "kv", "nn", "optim", "spectral"]


def __dir__() -> list[str]:
    """For completion: the public names."""
    return sorted(__all__)
