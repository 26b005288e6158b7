# SPDX-License-Identifier: Apache-2.0
"""What happens to a layer's tokens: new ones go into a window, which is compressed when it is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._errors import message, require
from ._codec import Codec
from ._modes import Lasting, lasting
from ._options import alike, without_padding
from ._prompt import behind
from ._saliency import prompt_saliency
from ._segment import Room
from ._selection import REGULAR, SALIENT, ProbeDraw, all_of_kind, classify
from ._steps import Planned, check_planned
from ._store import Compressed, Reserved
from ._window import Window

_OP = "ZipCacheLayer"
_PLANNED = f"{_OP}.planned"


class Held(NamedTuple):
    """The newest tokens, and those before them."""

    window: Window
    compressed: Compressed


class LayerTokens(Planned, Lasting):
    """The tokens of a :class:`ZipCacheLayer`, whose options it has. Arguments were checked."""

    length: int
    salient_ratio: float
    salient_bits: int
    regular_bits: int
    codec: Codec
    window: int
    recent_probes: float
    random_probes: float
    max_probes: int
    normalization: str
    seed: int
    scale: float | None
    softcap: float
    sliding_window: int | None
    max_tokens: int | None
    backend: str | None

    def __init__(self) -> None:
        self._spare: Held | None = None  # the room of what was removed
        self._held: Held | None = None  # until the first tokens tell their shape
        self._queries: Tensor | None = None  # none of them, but of the shape, dtype and device of those seen
        self._clear()

    def _clear(self) -> None:
        """Removes all tokens. Room that was reserved is kept for tokens of the same shape."""
        self._require_unplanned("reset")
        self.length = 0
        self._draw = ProbeDraw((self.recent_probes, self.random_probes, self.max_probes), self.seed)
        if self.max_tokens is not None and self._held is not None:
            self._spare = self._held
        self._held = None

    def _tokens(self) -> Held:
        """All cached tokens, of which there must be some."""
        if self._held is None:
            raise ValueError(message(_OP, "cached tokens", "an empty cache", "Call append or prefill."))
        return self._held

    def _tokens_like(self, k: Tensor, v: Tensor) -> Held:
        """All cached tokens, which are like these; there may be none yet."""
        if self._held is None:
            self._held = self._new_held(k, v)
        return self._held

    def _new_held(self, k: Tensor, v: Tensor) -> Held:
        """Room for tokens like these: what is spare, or anew."""
        spare, self._spare = self._spare, None
        if spare is not None and all(map(alike, (k, v), spare.window.room)):
            spare.window.clear(self._draw)
            spare.compressed.clear()
            return spare
        bits = {SALIENT: self.salient_bits, REGULAR: self.regular_bits}
        compressed = Compressed(bits, self.codec, k, v, self.backend, self._reserved)
        self._fixed = False
        return Held(Window(k, v, self.window, self._draw, self.max_tokens is not None), compressed)

    @property
    def _reserved(self) -> Reserved | None:
        """The room for ``max_tokens`` tokens that come with their queries."""
        if self.max_tokens is None:
            return None
        if self.mixed:
            shares = {SALIENT: self.salient_ratio, REGULAR: 1.0 - self.salient_ratio}
        else:
            shares = {SALIENT if self.salient_ratio > 0.0 else REGULAR: 1.0}
        blocks = {SALIENT: self.codec.block, REGULAR: self.codec.regular_block}
        rooms = {kind: Room.of(self.max_tokens, share, self.window, blocks[kind]) for kind, share in shares.items()}
        return Reserved(self.max_tokens, rooms)

    @property
    def window_length(self) -> int:
        """How many of the cached tokens are in the window, uncompressed."""
        return 0 if self._held is None else self._held.window.length

    @property
    def mixed(self) -> bool:
        """Whether tokens have different numbers of bits, so that saliency is needed."""
        return 0.0 < self.salient_ratio < 1.0 and self.salient_bits != self.regular_bits

    def _with_cached(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of all tokens, cached and new, and which are no padding, bool (batch, tokens); None: all."""
        if self.length == 0:
            return k, v, mask
        held = self.token_mask() if mask is not None or self.holds_padding else None
        return behind(self._restore(k.dtype), held, k, v, mask)

    def _add_prompt(
        self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor, seen: Tensor | None
    ) -> None:
        """Compresses a prompt, whose saliency is that among all tokens: those of ``keys``, as far as ``seen``."""
        if q is not None:
            self._note_queries(q)
        tokens = k.shape[2]
        unseen = 0 if self.sliding_window is None else max(tokens - self.sliding_window, 0)  # by later queries
        if unseen:  # nor are the tokens before these
            before = keys.shape[2] - tokens
            q = None if q is None else q[:, :, unseen:]
            k, v, keys = k[:, :, unseen:], v[:, :, unseen:], keys[:, :, before + unseen :]
            mask = None if mask is None else mask[:, unseen:]
            seen = None if seen is None else seen[:, before + unseen :]
        saliency = None
        if self.mixed and tokens and q is not None:
            options = {"normalization": self.normalization, **self._logits}
            saliency = prompt_saliency(q, keys, mask, seen, self._draw, **options)
        self._flush()
        if tokens:
            if unseen:
                self._tokens_like(k, v).compressed.skip(unseen)
            self._compress(k, v, saliency, mask)
            self.length += tokens
            self._forget()

    def _check_plan(self, tokens: int) -> None:
        check_planned(_PLANNED, tokens, self.length, self.max_tokens)
        self._tokens()
        known = not self.mixed or self._queries is not None
        remedy = "Call prefill, or attend to one token first."
        require(known, _PLANNED, "a cache that has seen queries, as many heads of them", "none", remedy)
        fits = tokens <= self.window
        require(fits, _PLANNED, f"at most the window's {self.window} tokens", tokens, "Give the cache a larger window.")

    @lasting
    def _plan(self, tokens: int) -> None:
        """Counts tokens that will come in a step that is planned, for which the window is compressed if need be."""
        window, compressed = self._tokens()
        if window.length + tokens > self.window or not window.takes(None):
            self._flush(fixed=True)
        _ = compressed.operands  # made before the step
        window.plan(tokens, self._queries if self.mixed else None)
        self.length += tokens

    @lasting
    def _unplan(self, tokens: int) -> None:
        """Removes the tokens planned last."""
        self._tokens().window.unplan(tokens)
        self.length -= tokens

    def _fixed_tensors(self) -> list[Tensor]:
        window, compressed = self._tokens()
        return [*window.fixed(), *(t for segment in compressed.segments.values() for t in segment.tensors())]

    def _counts(self) -> tuple[Tensor, int]:
        window = self._tokens().window
        return window.ends, window.length

    def _note_queries(self, q: Tensor) -> None:
        """Remembers what queries are like, for planned steps."""
        if self.max_tokens is not None and (self._queries is None or not alike(q, self._queries)):
            self._queries = q.new_empty((*q.shape[:2], 0, q.shape[3]))

    def _flush(self, fixed: bool = False) -> None:
        """Compresses the window. ``fixed``: an error if there is no room for that."""
        if self.window_length == 0:
            return
        window = self._tokens().window
        saliency: Tensor | None = None
        unseen: int | Tensor = 0
        if self.mixed:
            saliency, unseen = window.saliency(self.normalization, **self._logits)
        self._compress(window.keys, window.values, saliency, window.mask, unseen, fixed)
        window.restart()
        self._forget()

    def _forget(self) -> None:
        """Frees compressed tokens that no later query sees."""
        if self._unseen:
            self._tokens().compressed.forget(self._unseen)

    @property
    def _logits(self) -> dict[str, Any]:
        """Options of attention, and of :func:`attention_sums`."""
        return {"scale": self.scale, "softcap": self.softcap, "backend": self.backend}

    def _compress(
        self,
        k: Tensor,
        v: Tensor,
        saliency: Tensor | None,
        mask: Tensor | None,
        unseen: int | Tensor = 0,
        fixed: bool = False,
    ) -> None:
        """Compresses tokens of that saliency, of which no probe saw the last ``unseen`` (of each sequence). ``fixed``:
        an error if there is no room for them."""
        batch, _, tokens, _ = k.shape
        total = torch.full((batch,), tokens, device=k.device) if mask is None else mask.sum(1)
        if self.mixed and saliency is not None:
            kinds, salient = classify(saliency, mask, self.salient_ratio, unseen)
            if isinstance(unseen, Tensor):  # other shares of each sequence
                slots = int(salient.max()), int((total - salient).max())
            else:  # no shorter sequence has more of either
                most = max(int(tokens * self.salient_ratio + 0.5), unseen)
                slots = most, tokens - most
        else:  # all in the same bits, or of unknown saliency
            some = self.salient_ratio > 0.0
            slots = (tokens, 0) if some else (0, tokens)
            kinds, salient = all_of_kind(SALIENT if some else REGULAR, k, mask), total * int(some)
        compressed = self._tokens_like(k, v).compressed
        contract = f"tokens that fit in the room for max_tokens={self.max_tokens}"
        got, remedy = "more blocks, or more salient ones", "Make the cache with a larger max_tokens."
        require(not fixed or compressed.fits(slots), _PLANNED, contract, got, remedy)
        compressed.append(k, v, kinds, slots, salient, total, padded=mask is not None)

    def reserve(self, tokens: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Where new tokens go, keys and values, for those who compute them there and then call :meth:`take`. None: they
        can't go there as they are, and :meth:`append` takes them."""
        if self._held is None or self._planned or mask is not None or self.codec.rotate:
            return None
        window = self._held.window
        fits = window.length + tokens <= self.window and window.takes(None)
        return window.reserve(tokens) if fits else None

    def take(self, tokens: int, mask: Tensor | None = None) -> None:
        """Counts the tokens in what :meth:`reserve` gave for them."""
        self._tokens().window.take(tokens)
        self.length += tokens

    def _restore(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All tokens as they are stored, in their order."""
        window, compressed = self._tokens()
        k, v = (x.new_zeros((*x.shape[:2], self.length, x.shape[3]), dtype=dtype) for x in window.room)
        for held, out in zip(without_padding(window.keys, window.values, window.mask), (k, v), strict=True):
            out[:, :, self.length - window.length :] = held
        compressed.restore(k, v)
        k[:, :, : self._unseen], v[:, :, : self._unseen] = 0.0, 0.0
        return k, v

    @property
    def _unseen(self) -> int:
        """How many of the oldest tokens no later query sees. Some are held still, with others of their block."""
        return 0 if self.sliding_window is None else max(self.length - self.sliding_window, 0)

    def _map_batch(self, function: Callable[[Tensor], Tensor], keep_room: bool = False) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        self._require_unplanned("a change of the batch")
        self._queries = None if self._queries is None else function(self._queries)
        if self._held is not None:
            window, compressed = self._held
            window.map_batch(function, keep_room)
            compressed.map_batch(function)

    @property
    def holds_padding(self) -> bool:
        """Whether some of the tokens were padding, which takes no room but has a place among the tokens."""
        if self._held is None:
            return False
        window, compressed = self._held
        return not window.takes(None) or compressed.has_padding()

    def token_mask(self) -> Tensor:
        """bool (batch, length), false for padding, and for what is out of the sliding window."""
        self._require_unplanned("token_mask")
        window, compressed = self._tokens()
        mask = F.pad(compressed.mask(), (0, window.length), value=True)
        if window.mask is not None:
            mask[:, self.length - window.length :] = window.mask
        mask[:, : self._unseen] = False
        return mask
