# SPDX-License-Identifier: Apache-2.0
"""Compressed KV caches whose attention reads the packed codes.

* :class:`ZipCache`: the cache of a transformers model (``pip install "transformers>=5.24"``).
* :class:`ZipCacheLayer`: one attention layer's cache, without any framework.
* :func:`quantize`, :func:`dequantize`, :func:`probe_saliency`, :func:`decode_attention`: its parts.
* :func:`cache_nbytes`: what a cache takes.
* :class:`Codec`: how tokens are quantised: ZipCache's way, KIVI's, or per token and head.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .codec import Codec, cache_nbytes
from .functional import Quantized, decode_attention, dequantize, quantize
from .layer import ZipCacheLayer
from .saliency import probe_saliency

if TYPE_CHECKING:
    from .hf import ZipCache

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
    """ZipCache, when it is asked for: importing transformers takes seconds."""
    if name != "ZipCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .hf import ZipCache

    return ZipCache
