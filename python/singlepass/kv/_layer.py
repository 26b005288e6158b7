# SPDX-License-Identifier: Apache-2.0
"""The compressed cache of one attention layer. The file is long because it is one class, with its documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._errors import message, require
from ._codec import Codec
from ._functional import attend, check_exact, check_needs_no_gradient, check_queries
from ._modes import Lasting, lasting
from ._options import (
    check_hides_newest,
    check_index,
    check_mask,
    check_new_tokens,
    check_options,
    without_padding,
)
from ._prompt import behind, causal_attention, rotate
from ._saliency import prompt_saliency
from ._selection import REGULAR, SALIENT, ProbeDraw, all_of_kind, classify
from ._state import check, pack
from ._store import Compressed, held_nbytes
from ._window import Window

_OP = "ZipCacheLayer"
_SAVED = (
    *("salient_ratio", "salient_bits", "regular_bits", "window", "recent_probes", "random_probes", "max_probes"),
    *("normalization", "scale", "softcap", "sliding_window"),
)


class Held(NamedTuple):
    """The newest tokens, and those before them."""

    window: Window
    compressed: Compressed


class ZipCacheLayer(Lasting):
    """Compressed keys and values of one attention layer: salient tokens in more bits than regular ones, the newest ones
    uncompressed.

    A prompt is compressed at once. Later tokens stay uncompressed in a window, which is compressed as a whole when it
    is full; compressed tokens are never requantised. A token's saliency is the attention that it receives from probes,
    a few of the queries, per key head. Tokens that were stored without queries count as salient.

    Args:
        salient_ratio: fraction of the tokens compressed together that are kept in ``salient_bits``, those that receive
            most attention; 1 or 0: all in the same bits.
        salient_bits: 2, 4 or 8.
        regular_bits: 2, 4 or 8.
        codec: how tokens are quantised, see :class:`Codec`; None: ``Codec.zipcache()``.
        window: maximum number of uncompressed tokens, the newest ones.
        recent_probes: number of probes among the newest tokens, as a fraction of all tokens; at least one.
        random_probes: number of probes drawn from the other tokens, likewise.
        max_probes: maximum number of probes.
        normalization: "probe_nnz" (the paper) or "causal_nnz" (its code); see :func:`probe_saliency`.
        seed: for drawing the random probes.
        scale: of q @ k^T; None: channels^-0.5.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
        sliding_window: number of the newest tokens that a query sees, including its own; older ones are forgotten.
            Saliency ignores it. None: all tokens.
        backend: "native", "triton" or "eager"; None selects one.

    Attributes:
        length: number of cached tokens.

    Raises:
        ValueError: options out of range.

    Source: He et al., "ZipCache", arXiv 2405.14256. Unlike its code, this never requantises a token, uses the paper's
    normalisation, and has scales of values per head.

    Example:
        >>> import torch
        >>> from singlepass.kv import ZipCacheLayer
        >>> q, k, v = torch.randn(1, 8, 200, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
        >>> layer = ZipCacheLayer(salient_ratio=0.6)
        >>> layer.prefill(q, k, v).shape
        torch.Size([1, 8, 200, 64])
        >>> layer.append(k[:, :, :1], v[:, :, :1])
        >>> layer.attend(q[:, :, :1]).shape
        torch.Size([1, 8, 1, 64])
        >>> layer.length, layer.window_length
        (201, 1)
    """

    def __init__(
        self,
        salient_ratio: float = 0.6,
        *,
        salient_bits: int = 4,
        regular_bits: int = 2,
        codec: Codec | None = None,
        window: int = 128,
        recent_probes: float = 0.05,
        random_probes: float = 0.05,
        max_probes: int = 512,
        normalization: str = "probe_nnz",
        seed: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        sliding_window: int | None = None,
        backend: str | None = None,
    ):
        self.salient_ratio = salient_ratio
        self.salient_bits = salient_bits
        self.regular_bits = regular_bits
        self.codec = Codec() if codec is None else codec
        self.window = window
        self.recent_probes = recent_probes
        self.random_probes = random_probes
        self.max_probes = max_probes
        self.normalization = normalization
        self.seed = seed
        self.scale = scale
        self.softcap = softcap
        self.sliding_window = sliding_window
        self.backend = backend
        check_options(vars(self))
        self.reset()

    def reset(self) -> None:
        """Removes all tokens."""
        self.length = 0
        self._draw = ProbeDraw((self.recent_probes, self.random_probes, self.max_probes), self.seed)
        self._held: Held | None = None  # until the first tokens tell their shape

    def _tokens(self) -> Held:
        """All cached tokens, of which there must be some."""
        if self._held is None:
            raise ValueError(message(_OP, "cached tokens", "an empty cache", "Call append or prefill."))
        return self._held

    def _tokens_like(self, k: Tensor, v: Tensor) -> Held:
        """All cached tokens, which are like these; there may be none yet."""
        if self._held is None:
            bits = {SALIENT: self.salient_bits, REGULAR: self.regular_bits}
            compressed = Compressed(bits, self.codec, k, v, self.backend)
            self._held = Held(Window(k, v, self.window, self._draw), compressed)
        return self._held

    @property
    def window_length(self) -> int:
        """How many of the cached tokens are in the window, uncompressed."""
        return 0 if self._held is None else self._held.window.length

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the cached tokens; None as long as there are none."""
        return None if self._held is None else self._held.window.keys.dtype

    @property
    def batch(self) -> int | None:
        """How many sequences are cached; None as long as there are no tokens."""
        return None if self._held is None else len(self._held.window.keys)

    @property
    def mixed(self) -> bool:
        """Whether tokens have different numbers of bits, so that saliency is needed."""
        return 0.0 < self.salient_ratio < 1.0 and self.salient_bits != self.regular_bits

    @property
    def nbytes(self) -> int:
        """Bytes of all memory held, codes, scales, positions, the window, probes, and room preallocated for more tokens
        among it."""
        return held_nbytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        return [] if self._held is None else [t for part in self._held for t in part.tensors()]

    @property
    def holds_padding(self) -> bool:
        """Whether some of the tokens were padding, which takes no room but has a place among the tokens."""
        if self._held is None:
            return False
        window, compressed = self._held
        return not window.takes(None) or compressed.has_padding()

    def __repr__(self) -> str:
        parts = [f"salient_ratio={self.salient_ratio}", f"bits=({self.salient_bits}, {self.regular_bits})"]
        parts += [f"tokens={self.length}", f"uncompressed={self.window_length}"]
        if self._held is not None:
            for name, held in zip(("keys", "values"), self._held.window.room, strict=True):
                parts.append(f"{name}={(*held.shape[:2], self.length, held.shape[3])}")
        return f"ZipCacheLayer({', '.join(parts)}, nbytes={self.nbytes})"

    # Adding tokens

    @lasting
    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, sinks: Tensor | None = None
    ) -> Tensor:
        """Causal attention of a prompt's queries over all cached tokens and the prompt, which is then compressed.

        Args:
            q: (batch, query heads, tokens, channels).
            k: (batch, heads, tokens, channels).
            v: (batch, heads, tokens, value channels).
            mask: bool (batch, tokens), false for padding, or None.
            sinks: float32 (query heads,), the logit of an attention sink for each head, or None. Saliency ignores it.

        Returns:
            Tensor: (batch, query heads, tokens, value channels). The queries of padding see the tokens before them; if
            there are none, the result is zero.

        Raises:
            ValueError: invalid shapes, dtypes or devices, or a tensor that requires gradients. The cache is unchanged.
        """
        self._check_prompt(q, k, v, mask)
        check_exact(_OP, "sinks", sinks, torch.float32, (q.shape[1],), q)
        k, v = without_padding(k, v, mask)
        if self.codec.rotate:
            q, k, v = rotate(q), rotate(k), rotate(v)
        keys, values, seen = self._with_cached(k, v, mask)
        out = causal_attention(q, keys, values, seen, self.scale, self.softcap, sinks, self.sliding_window)
        self._add_prompt(q, k, v, mask, keys, seen)
        return rotate(out) if self.codec.rotate else out

    @lasting
    def store(self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Adds and compresses a prompt as :meth:`prefill` does, for those who compute its attention by themselves.

        Args:
            q: as for :meth:`prefill`; None: all tokens count as salient.
            k, v, mask: as for :meth:`prefill`.

        Raises:
            ValueError: as :meth:`prefill`. The cache is unchanged.
        """
        self._check_prompt(q, k, v, mask)
        k, v = without_padding(k, v, mask)
        if self.codec.rotate:
            q, k, v = None if q is None else rotate(q), rotate(k), rotate(v)
        keys, _, seen = self._with_cached(k, v, mask) if self.mixed and q is not None else (k, v, mask)
        self._add_prompt(q, k, v, mask, keys, seen)

    def _check_prompt(self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        check_new_tokens(_OP, k, v, None if self._held is None else self._held.window.room, self.codec, self.backend)
        if q is not None:
            check_queries(_OP, q, k)
            check_needs_no_gradient(_OP, q=q)
            require(q.shape[2] == k.shape[2], _OP, f"{k.shape[2]} queries, one for each token", q.shape[2], "Pass all.")
        check_mask(_OP, mask, (k.shape[0], k.shape[2]))

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

    @lasting
    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Adds new tokens to the window, which is compressed first if it is full. Padding is dropped when the window is
        compressed. If a sequence continues after padding, the window is compressed first.

        Args:
            k: (batch, heads, tokens, channels).
            v: (batch, heads, tokens, value channels).
            mask: bool (batch, tokens), false for padding, such as what follows sequences that have ended; or None.

        Raises:
            ValueError: invalid shapes, dtypes or devices, or a tensor that requires gradients. The cache is unchanged.
        """
        check_new_tokens(_OP, k, v, None if self._held is None else self._held.window.room, self.codec, self.backend)
        check_mask(_OP, mask, (k.shape[0], k.shape[2]))
        k, v = without_padding(k, v, mask)
        if self.codec.rotate:
            k, v = rotate(k), rotate(v)
        window = self._tokens_like(k, v).window
        tokens = k.shape[2]
        done = 0
        while done < tokens:
            shown = None if mask is None else mask[:, done]
            if window.length == self.window or not window.takes(shown):
                self._flush()
            n = min(tokens - done, self.window - window.length) if mask is None else 1
            part = (k, v) if n == tokens else (k[:, :, done : done + n], v[:, :, done : done + n])
            window.append(*part, shown)
            done += n
        self.length += tokens

    def reserve(self, tokens: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Where new tokens go, keys and values, for those who compute them there and then call :meth:`take`. None: they
        can't go there as they are, and :meth:`append` takes them."""
        if self._held is None or mask is not None or self.codec.rotate:
            return None
        window = self._held.window
        fits = window.length + tokens <= self.window and window.takes(None)
        return window.reserve(tokens) if fits else None

    def take(self, tokens: int, mask: Tensor | None = None) -> None:
        """Counts the tokens in what :meth:`reserve` gave for them."""
        self._tokens().window.take(tokens)
        self.length += tokens

    @lasting
    def make_room(self, tokens: int) -> None:
        """Compresses the window unless it has room for so many tokens, or is empty: new ones are to stay in one
        window, from which they can be removed."""
        if self.window_length + tokens > self.window:
            self._flush()

    def _flush(self) -> None:
        """Compresses the window."""
        if self.window_length == 0:
            return
        window = self._tokens().window
        saliency: Tensor | None = None
        unseen: int | Tensor = 0
        if self.mixed:
            saliency, unseen = window.saliency(self.normalization, **self._logits)
        self._compress(window.keys, window.values, saliency, window.mask, unseen)
        window.restart()
        self._forget()

    def _forget(self) -> None:
        """Frees compressed tokens that no later query sees."""
        if self._unseen:
            self._tokens().compressed.forget(self._unseen)

    @property
    def _logits(self) -> dict[str, Any]:
        """Options of :func:`attention_sums`."""
        return {"scale": self.scale, "softcap": self.softcap, "backend": self.backend}

    def _compress(
        self, k: Tensor, v: Tensor, saliency: Tensor | None, mask: Tensor | None, unseen: int | Tensor = 0
    ) -> None:
        """Compresses tokens of that saliency, of which no probe saw the last ``unseen`` (of each sequence)."""
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
        compressed.append(k, v, kinds, slots, salient, total, padded=mask is not None)

    # Using them

    @lasting
    def attend(self, q: Tensor, *, sliding_window: int | None = None, sinks: Tensor | None = None) -> Tensor:
        """Attention of the newest tokens' queries over all cached tokens, computed on the packed codes.

        Args:
            q: (batch, query heads, queries, channels). The last query belongs to the last token, and the tokens of all
                queries must still be in the window.
            sliding_window: number of the newest tokens that a query sees, including its own; None: that of the layer.
            sinks: float32 (query heads,), the logit of an attention sink for each head, or None.

        Returns:
            Tensor: (batch, query heads, queries, value channels), q's dtype.

        Raises:
            ValueError: invalid shapes or options, or a tensor that requires gradients.
        """
        window = self._tokens().window
        check_queries(_OP, q, window.room[0])
        check_needs_no_gradient(_OP, q=q)
        check_exact(_OP, "sinks", sinks, torch.float32, (q.shape[1],), q)
        if self.codec.rotate:
            q = rotate(q)
        queries = q.shape[2]
        fits = queries <= max(window.length, 1)
        remedy = "Pass longer pieces to prefill, which appends and attends by itself."
        require(fits, _OP, f"at most {window.length} queries, whose tokens the window holds", queries, remedy)
        fits = queries == 1 or window.takes(None)
        require(fits, _OP, "one query at a time after padding", queries, "Pass the tokens to prefill, with a mask.")
        if sliding_window is None:
            sliding_window = self.sliding_window
        else:
            most = "" if self.sliding_window is None else f", at most {self.sliding_window}"
            fits = sliding_window >= 1 and (self.sliding_window is None or sliding_window <= self.sliding_window)
            contract = f"a sliding window of at least 1{most}"
            require(fits, _OP, contract, sliding_window, "Leave it out for that of the layer.")
        if sliding_window is None or self.length <= sliding_window or queries == 1:
            outs = [self._attend(q, sliding_window, sinks, 0)]
        else:  # each query sees other tokens
            rows = (q[:, :, i : i + 1] for i in range(queries))
            outs = [self._attend(row, sliding_window, sinks, queries - 1 - i) for i, row in enumerate(rows)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        return rotate(out) if self.codec.rotate else out

    def _attend(self, q: Tensor, sliding_window: int | None, sinks: Tensor | None, newer: int) -> Tensor:
        """The same, of queries after whose tokens there are ``newer`` ones; of one where the sliding window matters."""
        window, compressed = self._tokens()
        begin, end = self.length - window.length, window.length - newer
        lowest, first = 0, None
        if sliding_window is not None and begin + end > sliding_window:
            oldest = begin + end - sliding_window
            lowest = max(oldest - begin, 0)
            first = compressed.first_slots(oldest)
        out, lse = attend(
            q,
            compressed.pairs,
            *window.room,
            window.bounds(lowest, newer),
            first=first,
            sinks=sinks,
            scale=self.scale,
            softcap=self.softcap,
            backend=self.backend,
        )
        place = end - q.shape[2]  # -1: right after a prompt, which is compressed already
        sees_all = lowest == 0  # else it tells nothing of the window's first tokens
        if self.mixed and sees_all and 0 <= place < end:
            window.probes.add(q, lse, place)
        return out

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """All keys and values in token order, (batch, heads, tokens, channels), in the dtype of the tokens that were
        added; zeros for padding, and for what is out of the sliding window."""
        window = self._tokens().window
        k, v = self._restore(window.keys.dtype)
        return (rotate(k), rotate(v)) if self.codec.rotate else (k, v)

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

    def token_mask(self) -> Tensor:
        """bool (batch, length), false for padding, and for what is out of the sliding window."""
        window, compressed = self._tokens()
        mask = F.pad(compressed.mask(), (0, window.length), value=True)
        if window.mask is not None:
            mask[:, self.length - window.length :] = window.mask
        mask[:, : self._unseen] = False
        return mask

    @lasting
    def hide(self, mask: Tensor) -> None:
        """Turns tokens into padding, for example those after the end of a sequence.

        Args:
            mask: bool (batch, length), false for the tokens to remove: the newest ones of a sequence.

        Raises:
            ValueError: an empty cache, another shape or dtype, or tokens with others after them. The cache is
                unchanged.
        """
        window, compressed = self._tokens()
        check_mask(_OP, mask, (len(window.keys), self.length))
        check_hides_newest(_OP, self.token_mask(), mask)
        mask = mask.clone()
        mask[:, : self._unseen] = True  # what left the sliding window is forgotten in its own time
        compressed.hide(mask[:, : self.length - window.length])
        window.hide(mask[:, self.length - window.length :])

    # Changing the batch and the length

    def _map_batch(self, function: Callable[[Tensor], Tensor], keep_room: bool = False) -> None:
        """Applies a function to every tensor that has a row for each sequence."""
        if self._held is not None:
            window, compressed = self._held
            window.map_batch(function, keep_room)
            compressed.map_batch(function)

    @lasting
    def select_sequences(self, index: Tensor | Sequence[int]) -> None:
        """Selects sequences of the batch by index, in that order, possibly repeated, as for beam search.

        Raises:
            ValueError: anything but indices of sequences.
        """
        chosen = check_index(_OP, index)
        beams = len(chosen) == self.batch  # at every step
        self._map_batch(lambda t: t.index_select(0, chosen.to(t.device)), keep_room=beams)

    @lasting
    def repeat_sequences(self, times: int) -> None:
        """Repeats each sequence of the batch ``times`` times in a row."""
        self._map_batch(lambda t: t.repeat_interleave(times, 0))

    @lasting
    def drop_newest(self, tokens: int) -> None:
        """Removes the newest tokens, which must still be in the window.

        Raises:
            ValueError: more tokens than the window holds. The cache is unchanged.
        """
        fits = 0 <= tokens <= self.window_length
        contract = f"0 to {self.window_length} tokens, those that are not compressed yet"
        require(fits, _OP, contract, tokens, "Compressed tokens can't be removed; build the cache anew.")
        if self._held is not None:
            self._held.window.drop_newest(tokens)
        self.length -= tokens

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything cached, for ``torch.save``."""
        window, compressed = (None, None) if self._held is None else self._held
        return pack(self._saved(), self.length, window, compressed, self._draw.generator)

    @lasting
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads the :meth:`state_dict` of a layer with the same options.

        Raises:
            ValueError: anything else. The cache is unchanged.
        """
        compressed = check(saved, self._saved(), self.codec, self.backend)
        self.reset()
        if compressed is not None:
            window = Window(saved["window_k"], saved["window_v"], self.window, self._draw)
            window.load(saved)
            self._held = Held(window, compressed)
        self.length = saved["length"]
        self._draw.generator.set_state(saved["generator"])

    def _saved(self) -> dict[str, Any]:
        """The options that decide on what is stored, as plain data."""
        return {name: getattr(self, name) for name in _SAVED} | {"codec": asdict(self.codec)}
