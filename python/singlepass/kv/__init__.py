# SPDX-License-Identifier: Apache-2.0
"""Compressed KV caches, with attention on the packed codes.

* :class:`ZipCache`: a cache for Hugging Face Transformers models (``pip install "transformers>=5.24"``).
* :class:`ZipCacheLayer`: the cache of one attention layer, without a framework.
* :func:`quantize`, :func:`dequantize`, :func:`probe_saliency`, :func:`decode_attention`: its parts.
* :func:`cache_nbytes`: the memory of a cache.
* :class:`Codec`: how tokens are quantised: as in ZipCache, as in KIVI, or per token and head.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._codec import Codec, cache_nbytes
from ._functional import Quantized, decode_attention, dequantize, quantize
from ._layer import ZipCacheLayer
from ._saliency import probe_saliency

if TYPE_CHECKING:
    from ._hf import ZipCache

__all__ = [
    "Codec",
    "Quantized",
    "ZipCacheLayer",
    "cache_nbytes",
    "decode_attention",
    "dequantize",
    "probe_saliency",
    "quantize",
]
if find_spec("transformers") is not None:  # so that `from singlepass.kv import *` works without
    __all__ += ["ZipCache"]


def __getattr__(name: str) -> Any:
    """Imports ZipCache when it is first used: importing transformers takes seconds."""
    if name != "ZipCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._hf import ZipCache

    return ZipCache


def __dir__() -> list[str]:
    """For completion: the public names, ZipCache included."""
    return sorted(__all__)
