# SPDX-License-Identifier: Apache-2.0
"""What happens to the tokens of a low-rank layer: they are projected, and kept by groups of heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..._errors import message
from .._codec import Codec
from .._dense import DenseLayer
from .._layer import ZipCacheLayer
from .._modes import Lasting
from .._steps import Planned, check_planned
from ._groups import Group, Projection, Rotary, project

_OP = "MatryoshkaLayer"

Places = list[tuple[Tensor, Tensor]]  # of each group's keys and values


class GroupedTokens(Planned, Lasting):
    """The tokens of a :class:`MatryoshkaLayer`, whose options it has. Arguments were checked."""

    length: int
    bits: tuple[int, int] | None
    salient_ratio: float
    codec: Codec
    window: int
    seed: int
    scale: float | None
    softcap: float
    sliding_window: int | None
    max_tokens: int | None
    backend: str | None
    _bases: tuple[Tensor, Tensor]
    _ranks: tuple[Tensor, Tensor]

    def __init__(self) -> None:
        self._groups = self._new_groups()
        self._projections = self._new_projections()
        self._clear()

    def _clear(self) -> None:
        """Removes all tokens. Room that was reserved is kept for tokens of the same shape."""
        self._require_unplanned("reset")
        self.length = 0
        for group in self._groups:
            group.inner.reset()
        self._like: tuple[Tensor, Tensor] | None = None  # tokens' shape, dtype and device, once known

    def _parts(self) -> Sequence[Planned]:
        return [group.inner for group in self._groups]

    def _check_plan(self, tokens: int) -> None:
        check_planned(f"{_OP}.planned", tokens, self.length, self.max_tokens)
        self._check_held()

    def _plan(self, tokens: int) -> None:
        self.length += tokens

    def _unplan(self, tokens: int) -> None:
        self.length -= tokens

    def _new_groups(self) -> list[Group]:
        """Empty ones."""
        return [Group(heads, self._new_inner()) for heads in self._members().values()]

    def _new_inner(self) -> ZipCacheLayer | DenseLayer:
        if self.bits is None:
            slack = max(self.window, (self.sliding_window or 0) // 4)
            return DenseLayer(self._scale, self.softcap, self.sliding_window, slack, self.max_tokens, self.backend)
        return ZipCacheLayer(**self._options())

    def _members(self) -> dict[tuple[int, int], list[int]]:
        """The heads of each pair of ranks, of keys and values."""
        members: dict[tuple[int, int], list[int]] = {}
        of_keys, of_values = (ranks.tolist() for ranks in self._ranks)
        for head, ranks in enumerate(zip(of_keys, of_values, strict=True)):
            members.setdefault(ranks, []).append(head)
        return members

    def _new_projections(self) -> tuple[Projection, Projection]:
        """Of keys and of values."""
        members = self._members()
        keys, values = self._bases
        heads, ranks = list(members.values()), list(zip(*members, strict=True))
        return Projection(keys, heads, list(ranks[0])), Projection(values, heads, list(ranks[1]))

    def _options(self) -> dict[str, Any]:
        """Those of what holds quantised tokens."""
        high, low = (4, 2) if self.bits is None else self.bits
        return {
            "salient_ratio": self.salient_ratio,
            "salient_bits": high,
            "regular_bits": low,
            "codec": self.codec,
            "window": self.window,
            "seed": self.seed,
            "scale": self._scale,
            "softcap": self.softcap,
            "sliding_window": self.sliding_window,
            "max_tokens": self.max_tokens,
            "backend": self.backend,
        }

    @property
    def _scale(self) -> float:
        """That of whole vectors, not of what is kept of them."""
        return float(self._bases[0].shape[1] ** -0.5 if self.scale is None else self.scale)

    def _groups_for(self, k: Tensor, v: Tensor) -> list[Group]:
        """The groups, ready for such tokens."""
        if self._like is None:
            self._like = k[:, :, :0].clone(), v[:, :, :0].clone()
            self._settle(self._groups, self._like)
        for group in self._groups:
            group.inner.scale, group.inner.softcap = self._scale, self.softcap
        return self._groups

    def _settle(self, groups: list[Group], like: tuple[Tensor, Tensor]) -> None:
        """Makes projections and empty groups fit tokens like these."""
        for projection, x in zip(self._projections, like, strict=True):
            projection.settle(x)
        for i, group in enumerate(groups):
            if isinstance(group.inner, DenseLayer):
                group.inner.begin(*(p.empty(x)[i] for p, x in zip(self._projections, like, strict=True)))

    @property
    def window_length(self) -> int:
        """How many of the cached tokens can be removed. These are the ones not quantised yet, as long as no tokens were
        forgotten that would be seen again."""
        return self._groups[0].inner.window_length

    def _make_room(self, tokens: int) -> None:
        """Makes sure that the next tokens stay together, so that they can be removed."""
        for group in self._groups:
            group.inner.make_room(tokens)

    def _check_held(self) -> tuple[Tensor, Tensor]:
        if self._like is None:
            raise ValueError(message(_OP, "cached tokens", "an empty cache", "Call append or prefill."))
        return self._like

    def _places(self, k: Tensor, v: Tensor, mask: Tensor | None = None, prompt: bool = False) -> Places | None:
        """Where the groups store such new tokens as they are; None if they are to be quantised first, or no later query
        sees some of them."""
        groups = self._groups_for(k, v)
        if prompt and (self.bits is not None or k.shape[2] > (self.sliding_window or k.shape[2])):
            return None
        places = [place for group in groups if (place := group.inner.reserve(k.shape[2], mask)) is not None]
        return places if len(places) == len(groups) else None

    def _project(self, k: Tensor, v: Tensor, places: Places | None = None, rotary: Rotary | None = None) -> Places:
        """What the groups keep of all heads' keys and values, in ``places`` if there are such."""
        to = None if places is None else list(map(list, zip(*places, strict=True)))
        return list(zip(*project(self._projections, (k, v), rotary, to, self.backend), strict=True))

    def _project_queries(self, q: Tensor, rotary: Rotary | None = None) -> list[Tensor]:
        return project(self._projections[:1], (q,), rotary, None, self.backend)[0]

    def _store(self, q: Tensor | None, projected: Places, mask: Tensor | None, placed: bool) -> None:
        """Adds a prompt, which may stand in its place already."""
        mixed = q is not None and self._groups[0].inner.mixed
        queries = self._project_queries(q) if q is not None and mixed else [None] * len(self._groups)
        for group, its, (k, v) in zip(self._groups, queries, projected, strict=True):
            if placed:
                group.inner.take(k.shape[2], mask)
            else:
                group.inner.store(its, k, v, mask)
        self.length += projected[0][0].shape[2]

    def _back(self, projected: Places) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, from what the groups keep of them."""
        keys, values = map(list, zip(*projected, strict=True))
        return self._projections[0].back(keys, self.backend), self._projections[1].back(values, self.backend)

    def _map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        self._require_unplanned("a change of the batch")
        self._like = None if self._like is None else (function(self._like[0]), function(self._like[1]))
