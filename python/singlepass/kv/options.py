# SPDX-License-Identifier: Apache-2.0
"""The options of a layer's cache: what they may be, and how a saved cache tells them."""

from __future__ import annotations

from dataclasses import asdict
from numbers import Real
from typing import TYPE_CHECKING, Any

from .._dispatch import BACKENDS
from .._errors import require
from .codec import Codec
from .functional import NORMALIZATIONS, check_bits

if TYPE_CHECKING:
    from .layer import ZipCacheLayer

_OP = "ZipCacheLayer"
_SAVED = (
    "salient_ratio",
    "salient_bits",
    "regular_bits",
    "window",
    "recent_probes",
    "random_probes",
    "max_probes",
    "normalization",
    "scale",
    "softcap",
)


def check_backend(where: str, backend: str | None) -> None:
    known = backend is None or backend in BACKENDS
    require(known, where, f"backend among {', '.join(BACKENDS)}", repr(backend), "Leave it out to have one chosen.")


def check_options(layer: ZipCacheLayer) -> None:
    """Raises unless a layer's options are in range."""
    check_backend(_OP, layer.backend)
    for name in ("salient_ratio", "recent_probes", "random_probes"):
        share = getattr(layer, name)
        fits = isinstance(share, Real) and 0.0 <= float(share) <= 1.0
        require(fits, _OP, f"{name} from 0 to 1", repr(share), "It is a share of the tokens.")
    for name in ("salient_bits", "regular_bits"):
        check_bits(_OP, name, getattr(layer, name))
    for name in ("window", "max_probes"):
        count = getattr(layer, name)
        fits = isinstance(count, int) and count >= 1
        require(fits, _OP, f"{name} as a whole number, 1 or more", repr(count), "Leave it out for the default.")
    remedy = "Call Codec.zipcache(), .kivi() or .per_token_head()."
    require(isinstance(layer.codec, Codec), _OP, "a Codec or None", repr(layer.codec), remedy)
    known = layer.normalization in NORMALIZATIONS
    require(known, _OP, " or ".join(NORMALIZATIONS), repr(layer.normalization), "Choose one of them.")


def saved_options(layer: ZipCacheLayer) -> dict[str, Any]:
    """The options that decide on what is stored, as plain data."""
    return {name: getattr(layer, name) for name in _SAVED} | {"codec": asdict(layer.codec)}
