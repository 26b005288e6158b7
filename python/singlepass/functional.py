# SPDX-License-Identifier: Apache-2.0
"""The functions of all families.

* :func:`rational`: learnable activations P(x) / Q(x).
* :func:`quantize`, :func:`dequantize`, :func:`probe_saliency`, :func:`decode_attention`: the parts of compressed KV
  caches.
* :func:`sst_linear`, :func:`lorentz`: the layers of sparse spectral training.
"""

from .kv import decode_attention, dequantize, probe_saliency, quantize
from .rational import rational
from .spectral import lorentz, sst_linear

__all__ = ["decode_attention", "dequantize", "lorentz", "probe_saliency", "quantize", "rational", "sst_linear"]


def __dir__() -> list[str]:
    """For completion: the public names."""
    return sorted(__all__)
