# SPDX-License-Identifier: Apache-2.0
"""A low-rank layer's cache as plain data, bit for bit, and the checks of such data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..._errors import require
from .._checks import FLOATS
from .._state import check_same_options, shown
from ._groups import Group, Projection

_WHERE = "MatryoshkaLayer.load_state_dict"
_FOREIGN = "Pass what state_dict() of a layer with the same bases, ranks and options gave."
_KEYS = {"options", "length", "like", "groups"}

Pair = tuple[Tensor, Tensor]  # of keys and of values


def fingerprint(bases: Pair) -> str:
    """By which other bases are found out."""
    digest = hashlib.sha256()
    for basis in bases:
        digest.update(basis.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pack(options: dict[str, Any], length: int, like: Pair | None, groups: Sequence[Group]) -> dict[str, Any]:
    """A layer's cache as plain data and tensors, all of them copies. ``like``: of the tokens' shape, but none."""
    its = None if like is None else tuple(x.clone() for x in like)
    return {"options": options, "length": length, "like": its, "groups": [group.inner.state_dict() for group in groups]}


def load(
    saved: dict[str, Any],
    options: dict[str, Any],
    groups: Sequence[Group],
    bases: Pair,
    projections: Sequence[Projection],
) -> Pair | None:
    """Puts what :func:`pack` gave for a layer with these options into its empty groups.

    Returns:
        ``like``, as it was packed.

    Raises:
        ValueError: it is anything else. The groups are of no more use.
    """
    fits = isinstance(saved, dict) and set(saved) == _KEYS
    require(fits, _WHERE, f"a dictionary of {sorted(_KEYS)}", shown(saved), _FOREIGN)
    check_same_options(_WHERE, saved["options"], options)
    its, length, like = saved["groups"], saved["length"], saved["like"]
    fits = isinstance(its, list) and len(its) == len(groups)
    require(fits, _WHERE, f"{len(groups)} groups of heads", type(its).__name__, _FOREIGN)
    for group, state in zip(groups, its, strict=True):
        group.inner.load_state_dict(state)
        require(group.inner.length == length, _WHERE, f"{length} tokens", group.inner.length, _FOREIGN)
    require(like is not None or length == 0, _WHERE, "tokens and their shapes", "tokens alone", _FOREIGN)
    if like is None:
        return None
    _check_like(like, groups, bases, projections)
    return like[0].clone(), like[1].clone()


def _check_like(like: Any, groups: Sequence[Group], bases: Pair, projections: Sequence[Projection]) -> None:
    """Raises unless they are shapes of the tokens that groups hold."""
    fits = isinstance(like, tuple) and len(like) == 2
    for x, its in zip(like if fits else (), bases, strict=fits):
        fits = fits and isinstance(x, Tensor) and x.dtype in FLOATS and x.dim() == 4 and x.shape[2] == 0
        fits = fits and x.shape[1] == its.shape[0] and x.shape[3] == its.shape[1]
    ranks = zip(*(projection.ranks for projection in projections), strict=True)
    for group, (of_keys, of_values) in zip(groups, ranks, strict=True) if fits and groups[0].inner.length else ():
        k, v = (x[:, :, :0] for x in group.inner.dequantize())
        for x, rank, whole in ((k, of_keys, like[0]), (v, of_values, like[1])):
            fits = fits and x.shape == (len(whole), len(group.heads), 0, rank) and x.dtype == whole.dtype
            fits = fits and x.device == whole.device
    require(fits, _WHERE, "shapes of the tokens", type(like).__name__, _FOREIGN)
