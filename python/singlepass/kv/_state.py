# SPDX-License-Identifier: Apache-2.0
"""A layer's cache as plain data, bit for bit, and the checks of such data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import message, require
from ..reference.kv import unpack
from ._checks import check_queries
from ._codec import Codec
from ._options import check_new_tokens
from ._segment import Segment
from ._selection import FILLER, REGULAR, SALIENT
from ._store import Compressed
from ._window import Window

_WHERE = "ZipCacheLayer.load_state_dict"
_FOREIGN = "Pass what state_dict() of a layer with the same options gave."
_EMPTY: dict[str, Any] = {
    "forgotten": 0,
    "window_length": 0,
    "window_counts": None,
    "window_k": None,
    "window_v": None,
    "due": [],
    "queries": [],
    "kinds": None,
    "segments": {},
}
_KEYS = {"options", "length", "generator", *_EMPTY}


def pack(
    options: dict[str, Any],
    length: int,
    window: Window | None,
    compressed: Compressed | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """A layer's cache as plain data and tensors, all of them copies."""
    saved = {"options": options, "length": length, "generator": generator.get_state()}
    if window is None or compressed is None:
        return saved | _EMPTY
    kinds, segments = compressed.state()
    return saved | window.state() | {"forgotten": compressed.forgotten, "kinds": kinds, "segments": segments}


def check(saved: dict[str, Any], options: dict[str, Any], codec: Codec) -> None:
    """Raises unless it is what :func:`pack` gives for a layer with these options."""
    require(isinstance(saved, dict) and set(saved) == _KEYS, _WHERE, "a saved cache", shown(saved), _FOREIGN)
    _check(isinstance(saved["segments"], dict), "a dictionary of segments", type(saved["segments"]).__name__)
    check_same_options(_WHERE, saved["options"], options)
    _check_numbers(saved, options["window"])
    k, v = saved["window_k"], saved["window_v"]
    if k is None:
        present = [name for name in ("window_v", "window_counts", "kinds") if saved[name] is not None]
        present += [name for name in ("length", "forgotten", "queries", "segments") if saved[name]]
        _check(not present, "nothing without a window", present)
        return
    _check_tensors(saved, options["window"], codec)
    bits = {SALIENT: options["salient_bits"], REGULAR: options["regular_bits"]}
    compressed = Compressed(bits, codec, k, v, None)
    for kind, parts in saved["segments"].items():
        _check_segment(compressed.new_segment(kind), parts, k)
    _check_kinds(saved)


def check_same_options(where: str, saved: Any, options: dict[str, Any]) -> None:
    """Raises unless what was saved had these options, and says which it had not."""
    require(isinstance(saved, dict), where, "a dictionary of options", type(saved).__name__, _FOREIGN)
    ours = {name: value for name, value in options.items() if name not in saved or saved[name] != value}
    theirs = {name: value for name, value in saved.items() if name not in options or options[name] != value}
    same, remedy = not ours and not theirs, "Load it into a cache made with the options that it had."
    require(same, where, f"the options {ours}", theirs, remedy)


def shown(saved: Any) -> Any:
    """What was passed as a saved cache, for messages: the names in it, or its type."""
    return sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__


def _check(holds: bool, contract: str, got: object) -> None:
    require(holds, _WHERE, contract, got, _FOREIGN)


def _check_like(name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises unless it is a tensor of that kind; -1 in a shape is any size."""
    is_tensor = isinstance(tensor, Tensor)
    _check(is_tensor, f"a tensor {name}", type(tensor).__name__)
    alike = len(shape) == tensor.dim() and all(want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True))
    got = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
    _check(alike and tensor.dtype == dtype and tensor.device == device, f"{name} {shape} of {dtype} on {device}", got)


def _check_numbers(saved: dict[str, Any], window: int) -> None:
    length, n = saved["length"], saved["window_length"]
    _check(type(length) is type(n) is int and 0 <= n <= length, "lengths of all tokens and of the window", (length, n))
    forgotten = saved["forgotten"]
    fits = type(forgotten) is int and 0 <= forgotten <= length - n
    _check(fits, f"forgotten from 0 to {length - n}", forgotten)
    _check_places("due", saved["due"], 0, window)
    _check(isinstance(saved["queries"], list), "a list of queries", type(saved["queries"]).__name__)
    try:
        torch.Generator().set_state(saved["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(message(_WHERE, "a generator's state", str(error).splitlines()[0], _FOREIGN)) from error


def _check_kinds(saved: dict[str, Any]) -> None:
    """Raises unless segments hold what kinds say."""
    compressed = saved["length"] - saved["window_length"] - saved["forgotten"]
    kinds = unpack(saved["kinds"][..., None], 2).flatten(2)
    tokens = kinds != FILLER
    _check(bool((tokens == tokens[:1, :1]).all()), "the same tokens in all sequences and heads", "others")
    got = int(tokens[0, 0].sum()) if tokens.numel() else compressed
    _check(got == compressed, f"kinds of {compressed} tokens", got)
    for kind in (SALIENT, REGULAR):
        found, parts = (kinds == kind).sum(2), saved["segments"].get(kind)
        held = torch.zeros_like(found) if parts is None else parts["counts"].sum(2)
        _check(bool((found == held).all()), f"as many tokens of kind {kind} as their segment holds", held.tolist())


def _check_tensors(saved: dict[str, Any], window: int, codec: Codec) -> None:
    k, v, n = saved["window_k"], saved["window_v"], saved["window_length"]
    _check(isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == 4, "tensors of a window", shown(saved))
    check_new_tokens(_WHERE, k, v, None, codec, None)
    _check(k.shape[2] == n <= window, f"a window of {n} tokens, at most {window}", k.shape[2])
    batch, heads = k.shape[:2]
    _check_like("kinds", saved["kinds"], (batch, heads, -1), torch.uint8, k.device)
    counts = saved["window_counts"]
    if counts is not None:
        _check_like("window_counts", counts, (batch,), torch.int64, k.device)
        _check(bool(((counts >= 0) & (counts <= n)).all()), f"window_counts from 0 to {n}", counts.tolist())
    _check_queries(saved["queries"], k)
    _check(set(saved["segments"]) <= {SALIENT, REGULAR}, "segments 0 and 1", list(saved["segments"]))


def _check_places(name: str, places: Any, begin: int, end: int) -> None:
    fits = isinstance(places, list) and all(type(place) is int and begin <= place < end for place in places)
    rising = fits and sorted(set(places)) == places
    _check(rising, f"{name} as a rising list of places from {begin} to {end - 1}", places)


def _check_queries(queries: list[Any], k: Tensor) -> None:
    """Raises unless they are queries of the window's tokens, whose keys are k."""
    begin = 0
    for part in queries:
        _check(isinstance(part, tuple) and len(part) == 3, "places, queries and their sums", type(part).__name__)
        places, q, lse = part
        check_queries(_WHERE, q, k)
        _check_places("queries", places, begin, k.shape[2])
        _check(0 < len(places) == q.shape[2], f"{len(places)} queries", q.shape[2])
        _check_like("their sums", lse, tuple(q.shape[:3]), torch.float32, k.device)
        begin = places[-1] + 1


def _check_segment(segment: Segment, parts: dict[str, Any], k: Tensor) -> None:
    """Raises unless ``parts`` can be a segment's tensors."""
    empty = segment.state()
    _check(isinstance(parts, dict), "a dictionary of a segment's tensors", type(parts).__name__)
    _check(set(parts) == set(empty), f"tensors {sorted(empty)}", sorted(map(str, parts)))
    codes, counts = parts["key_codes"], parts["counts"]
    _check(isinstance(codes, Tensor) and codes.dim() == 4, "key_codes of four dimensions", shown(parts))
    _check(isinstance(counts, Tensor) and counts.dim() == 3, "counts of three dimensions", shown(parts))
    sizes = {"slots": codes.shape[2], "blocks": counts.shape[2]}
    for name, tensor in empty.items():
        dim, unit, extra = segment.extent(name)
        shape = list(tensor.shape)
        shape[dim] = sizes[unit] + extra
        _check_like(name, parts[name], tuple(shape), tensor.dtype, k.device)
    starts = parts["starts"]
    fits = int(starts[0]) == 0 and int(starts[-1]) == sizes["slots"] and bool((starts.diff() > 0).all())
    _check(fits, f"starts that rise from 0 to {sizes['slots']}", starts.tolist())
    _check(bool(((counts >= 0) & (counts <= starts.diff())).all()), "counts within blocks", counts.tolist())
