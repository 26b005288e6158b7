# SPDX-License-Identifier: Apache-2.0
"""Compressed KV caches, with attention on the packed codes.

* :class:`ZipCache`: a cache for Hugging Face Transformers models (``pip install "transformers>=5.24"``).
* :class:`MatryoshkaCache`: another, of low rank; :func:`fit_matryoshka` finds the :class:`MatryoshkaBases` it needs.
* :class:`ZipCacheLayer`, :class:`MatryoshkaLayer`: the caches of one attention layer, without a framework.
* :func:`quantize`, :func:`dequantize`, :func:`probe_saliency`, :func:`decode_attention`: its parts.
* :func:`cache_nbytes`: the memory of a cache.
* :class:`Codec`: how tokens are quantised: as in ZipCache, as in KIVI, or per token and head.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._codec import Codec, cache_nbytes
from ._functional import Quantized, decode_attention, dequantize, quantize
from ._layer import ZipCacheLayer
from ._matryoshka._bases import MatryoshkaBases
from ._matryoshka._layer import MatryoshkaLayer
from ._saliency import probe_saliency

if TYPE_CHECKING:
    from ._hf import MatryoshkaCache as MatryoshkaCache
    from ._hf import ZipCache as ZipCache
    from ._matryoshka._fit import fit_matryoshka as fit_matryoshka
    from ._matryoshka._fold import fold_values as fold_values
    from ._matryoshka._search import search_ranks as search_ranks

__all__ = [
    "Codec",
    "MatryoshkaBases",
    "MatryoshkaLayer",
    "Quantized",
    "ZipCacheLayer",
    "cache_nbytes",
    "decode_attention",
    "dequantize",
    "probe_saliency",
    "quantize",
]
_OF_TRANSFORMERS = {
    "MatryoshkaCache": "_hf",
    "ZipCache": "_hf",
    "fit_matryoshka": "_matryoshka._fit",
    "fold_values": "_matryoshka._fold",
    "search_ranks": "_matryoshka._search",
}
if find_spec("transformers") is not None:  # so that `from singlepass.kv import *` works without
    __all__ += list(_OF_TRANSFORMERS)


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is first used: that takes seconds."""
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}._hf_cache")  # raises if transformers is missing or too old
    return getattr(import_module(f"{__name__}.{_OF_TRANSFORMERS[name]}"), name)


def __dir__() -> list[str]:
    """For completion: the public names, those that need transformers included."""
    return sorted(__all__)
