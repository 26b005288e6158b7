# SPDX-License-Identifier: Apache-2.0
"""What may go into a layer's cache: options, and how a saved cache tells them, and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._errors import require
from .._ops import check_backend
from .._ops import kv as ops
from ._checks import check_bits, check_logits, check_needs_no_gradient, check_tokens
from ._codec import Codec
from ._saliency import NORMALIZATIONS

_OP = "ZipCacheLayer"


def check_options(options: dict[str, Any]) -> None:
    """Raises unless a layer's options are in range."""
    check_backend(_OP, options["backend"])
    for name in ("salient_ratio", "recent_probes", "random_probes"):
        share = options[name]
        fits = isinstance(share, Real) and 0.0 <= float(share) <= 1.0
        require(fits, _OP, f"{name} from 0 to 1", repr(share), "It is a share of the tokens.")
    for name in ("salient_bits", "regular_bits"):
        check_bits(_OP, name, options[name])
    for name in ("window", "max_probes"):
        count = options[name]
        fits = isinstance(count, int) and count >= 1
        require(fits, _OP, f"{name} as a whole number, 1 or more", repr(count), "Leave it out for the default.")
    check_max_tokens(_OP, options["max_tokens"], options["sliding_window"])
    check_logits(_OP, options["scale"], options["softcap"])
    seed = options["seed"]
    require(isinstance(seed, int), _OP, "seed as a whole number", repr(seed), "Leave it out for 0.")
    sliding = options["sliding_window"]
    fits = sliding is None or (isinstance(sliding, int) and sliding >= 1)
    require(fits, _OP, "sliding_window as a whole number, 1 or more, or None", repr(sliding), "None: no limit.")
    remedy = "Call Codec.zipcache(), .kivi() or .per_token_head()."
    require(isinstance(options["codec"], Codec), _OP, "a Codec or None", repr(options["codec"]), remedy)
    known = options["normalization"] in NORMALIZATIONS
    require(known, _OP, " or ".join(NORMALIZATIONS), repr(options["normalization"]), "Choose one of them.")


def as_plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options without NumPy's numbers, which ``torch.load(weights_only=True)`` does not take."""
    return {k: float(v) if isinstance(v, Real) and not isinstance(v, int) else v for k, v in options.items()}


def check_max_tokens(where: str, tokens: int | None, sliding_window: int | None) -> None:
    """Raises unless it is a number of tokens to reserve room for, or None."""
    fits = tokens is None or (type(tokens) is int and tokens >= 1)
    require(fits, where, "max_tokens as a whole number, 1 or more, or None", repr(tokens), "None: room grows.")
    fits, contract = tokens is None or sliding_window is None, "max_tokens or a sliding window"
    require(fits, where, contract, "both", "Leave max_tokens out: a sliding window frees its room again.")


def check_new_tokens(
    where: str, k: Tensor, v: Tensor, held: tuple[Tensor, Tensor] | None, codec: Codec, backend: str | None
) -> None:
    """Raises unless keys and values are tokens that a cache can take, behind those that it holds if there are some."""
    if held is None or not (alike(k, held[0]) and alike(v, held[1]) and k.shape[2] == v.shape[2]):
        _check_anew(where, k, v, held, codec, backend)
    check_needs_no_gradient(where, k=k, v=v)


def alike(new: Tensor, held: Tensor) -> bool:
    """Whether new tokens differ from those of a cache in nothing but their number."""
    same = isinstance(new, Tensor) and new.dim() == 4 and new.dtype == held.dtype and new.device == held.device
    return same and new.shape[:2] == held.shape[:2] and new.shape[3] == held.shape[3]


def _check_anew(
    where: str, k: Tensor, v: Tensor, held: tuple[Tensor, Tensor] | None, codec: Codec, backend: str | None
) -> None:
    """The same with nothing known of them."""
    check_tokens(where, "k", k)
    check_tokens(where, "v", v)
    fits = k.shape[:3] == v.shape[:3] and k.dtype == v.dtype and k.device == v.device
    got = f"{tuple(v.shape)} of {v.dtype} on {v.device}"
    require(fits, where, f"v for k {tuple(k.shape)} of {k.dtype} on {k.device}", got, "Only channels may differ.")
    some = k.shape[0] > 0 and k.shape[1] > 0
    require(some, where, "at least one sequence and one head", tuple(k.shape), "Leave the call out.")
    for x in (k, v):
        codec.check_head_dim(where, x.shape[3])
    ops.quantize_.choose(k.device.type, {k.dtype}, backend)  # raises if there is none, before anything is changed
    if held is None:
        return
    for name, old, new in zip("kv", held, (k, v), strict=True):
        batch, heads, _, head_dim = old.shape
        fits = (batch, heads, head_dim) == (new.shape[0], new.shape[1], new.shape[3])
        fits = fits and old.dtype == new.dtype and old.device == new.device
        contract = f"{name} of shape ({batch}, {heads}, tokens, {head_dim}), {old.dtype} on {old.device}, as cached"
        got = f"{tuple(new.shape)}, {new.dtype} on {new.device}"
        require(fits, where, contract, got, "Call reset() for other sequences.")


def check_mask(where: str, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Raises unless it is a mask of so many sequences and tokens on their device, or None."""
    if mask is not None:
        is_tensor = isinstance(mask, Tensor)
        fits = is_tensor and mask.shape == shape and mask.dtype == torch.bool
        got = f"{tuple(mask.shape)} of {mask.dtype}" if is_tensor else type(mask).__name__
        require(fits, where, f"a bool mask of shape {shape}", got, "True marks tokens.")
        require(mask.device == device, where, f"a mask on {device}, as the tokens", mask.device, "Move it there.")


def check_hides_newest(where: str, held: Tensor, mask: Tensor) -> None:
    """Raises unless the tokens of ``held`` that a mask does not show are the newest of their sequence."""
    shown_after = ((held & ~mask).cumsum(1) > 0) & held & mask
    remedy = "Pass such a mask to the attention instead."
    require(not bool(shown_after.any()), where, "a mask that hides the newest tokens", "others", remedy)


def check_index(where: str, index: Tensor | Sequence[int], batch: int | None) -> Tensor:
    """Numbers of sequences as a tensor, if they are: one or more of ``batch``, None of an empty cache. What is on
    another device is not read."""
    try:
        chosen = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    except (RuntimeError, TypeError, ValueError):
        chosen = torch.empty(0, device="cpu")
    fits = chosen.dim() == 1 and chosen.dtype in (torch.int64, torch.int32) and len(chosen) > 0
    if fits and batch is not None and chosen.device.type == "cpu":
        lowest, highest = chosen.aminmax()
        fits = int(lowest) >= 0 and int(highest) < batch
    some = "numbers of sequences" if batch is None else f"numbers of sequences from 0 to {batch - 1}"
    require(fits, where, f"{some}, a list or an int64 tensor", index, "Pass [0] for the first.")
    return chosen


def check_count(where: str, count: int, least: int, most: int | None, what: str, remedy: str) -> None:
    """Raises unless it is a whole number from ``least`` to ``most``, None: any, of what it counts."""
    fits = type(count) is int and least <= count and (most is None or count <= most)
    numbers = f"{least} or more" if most is None else f"{least} to {most}"
    require(fits, where, f"{numbers} {what}", repr(count), remedy)


def without_padding(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros where a mask shows padding: what models compute for it may be NaN."""
    if mask is None:
        return k, v
    hidden = ~mask[:, None, :, None]
    return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
