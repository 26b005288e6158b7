# SPDX-License-Identifier: Apache-2.0
"""The compressed cache of one attention layer: what it promises, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .._errors import require
from ._attention import LayerAttention
from ._checks import check_needs_no_gradient, check_queries, check_sinks
from ._codec import Codec
from ._modes import lasting
from ._options import (
    as_plain,
    check_count,
    check_hides_newest,
    check_index,
    check_mask,
    check_new_tokens,
    check_options,
    without_padding,
)
from ._prompt import causal_attention, rotate
from ._segment import held_nbytes
from ._state import check, pack
from ._steps import check_step

_OP = "ZipCacheLayer"
_SAVED = (
    *("salient_ratio", "salient_bits", "regular_bits", "window", "recent_probes", "random_probes", "max_probes"),
    *("normalization", "scale", "softcap", "sliding_window"),
)


class ZipCacheLayer(LayerAttention):
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
        max_tokens: reserves room for so many tokens with the first ones, and lets steps be :meth:`planned`. None: room
            grows by a quarter when it is full. With it, room grows too, if more tokens come, many short prompts, or
            tokens without queries; that is logged once, and is an error in planned steps.
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
        >>> layer.step(q[:, :, :1], k[:, :, :1], v[:, :, :1]).shape
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
        max_tokens: int | None = None,
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
        self.max_tokens = max_tokens
        self.backend = backend
        check_options(vars(self))
        super().__init__()

    def reset(self) -> None:
        """Removes all tokens. Room for ``max_tokens`` is kept."""
        self._clear()

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the cached tokens; None as long as there are none."""
        return None if self._held is None else self._held.window.room[0].dtype

    @property
    def batch(self) -> int | None:
        """How many sequences are cached; None as long as there are no tokens."""
        return None if self._held is None else len(self._held.window.room[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all memory held, codes, scales, positions, the window, probes, and room preallocated for more tokens
        among it."""
        return held_nbytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        held = self._spare if self._held is None else self._held
        return [] if held is None else [t for part in held for t in part.tensors()]

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
        require(q.dtype == k.dtype, _OP, f"q of {k.dtype}, as the keys", q.dtype, "Convert it.")
        check_sinks(_OP, sinks, q)
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
        self._require_unplanned("a prompt")
        check_new_tokens(_OP, k, v, None if self._held is None else self._held.window.room, self.codec, self.backend)
        if q is not None:
            check_queries(_OP, q, k)
            check_needs_no_gradient(_OP, q=q)
            require(q.shape[2] == k.shape[2], _OP, f"{k.shape[2]} queries, one for each token", q.shape[2], "Pass all.")
        check_mask(_OP, mask, (k.shape[0], k.shape[2]), k.device)

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
        check_mask(_OP, mask, (k.shape[0], k.shape[2]), k.device)
        k, v = without_padding(k, v, mask)
        if self.codec.rotate:
            k, v = rotate(k), rotate(v)
        if self._planned:
            check_step(_OP, k.shape[2], self._planned, mask)
            self._tokens().window.write(k, v)
            return
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

    @lasting
    def make_room(self, tokens: int) -> None:
        """Compresses the window unless it has room for so many tokens, or is empty: new ones are to stay in one
        window, from which they can be removed."""
        self._require_unplanned("make_room")
        if self.window_length + tokens > self.window:
            self._flush()

    # Using them

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """All keys and values in token order, (batch, heads, tokens, channels), in the dtype of the tokens that were
        added; zeros for padding, and for what is out of the sliding window."""
        self._require_unplanned("dequantize")
        window = self._tokens().window
        k, v = self._restore(window.keys.dtype)
        return (rotate(k), rotate(v)) if self.codec.rotate else (k, v)

    @lasting
    def hide(self, mask: Tensor) -> None:
        """Turns tokens into padding, for example those after the end of a sequence.

        Args:
            mask: bool (batch, length), false for the tokens to remove: the newest ones of a sequence.

        Raises:
            ValueError: an empty cache, another shape or dtype, or tokens with others after them. The cache is
                unchanged.
        """
        self._require_unplanned("hide")
        window, compressed = self._tokens()
        check_mask(_OP, mask, (len(window.keys), self.length), window.keys.device)
        check_hides_newest(_OP, self.token_mask(), mask)
        mask = mask.clone()
        # What left the sliding window is forgotten in its own time, unless its sequence ended before the window.
        mask[:, : self._unseen] |= mask[:, self._unseen :].any(1, keepdim=True)
        compressed.hide(mask[:, : self.length - window.length])
        window.hide(mask[:, self.length - window.length :])

    # Changing the batch and the length

    @lasting
    def select_sequences(self, index: Tensor | Sequence[int]) -> None:
        """Selects sequences of the batch by index, in that order, possibly repeated, as for beam search.

        Raises:
            ValueError: anything but indices of sequences.
        """
        chosen = check_index(_OP, index, self.batch)
        beams = len(chosen) == self.batch  # at every step
        self._map_batch(lambda t: t.index_select(0, chosen.to(t.device)), keep_room=beams)

    @lasting
    def repeat_sequences(self, times: int) -> None:
        """Repeats each sequence of the batch ``times`` times in a row.

        Raises:
            ValueError: anything but a number of times, one or more.
        """
        check_count(_OP, times, 1, None, "times", "Call reset() to remove all.")
        self._map_batch(lambda t: t.repeat_interleave(times, 0))

    @lasting
    def drop_newest(self, tokens: int) -> None:
        """Removes the newest tokens, which must still be in the window.

        Raises:
            ValueError: more tokens than the window holds. The cache is unchanged.
        """
        self._require_unplanned("drop_newest")
        remedy = "Compressed tokens can't be removed; build the cache anew."
        check_count(_OP, tokens, 0, self.window_length, "tokens, those that are not compressed yet", remedy)
        if self._held is not None:
            self._held.window.drop_newest(tokens)
        self.length -= tokens

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything cached, for ``torch.save``."""
        self._require_unplanned("state_dict")
        window, compressed = (None, None) if self._held is None else self._held
        return pack(self._saved(), self.length, window, compressed, self._draw.generator)

    @lasting
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads the :meth:`state_dict` of a layer with the same options.

        Raises:
            ValueError: anything else. The cache is unchanged.
        """
        check(saved, self._saved(), self.codec)
        self.reset()
        if saved["window_k"] is not None:
            window, compressed = self._tokens_like(saved["window_k"], saved["window_v"])
            window.load(saved)
            compressed.load(saved["kinds"], saved["segments"], saved["forgotten"])
        self.length = saved["length"]
        self._draw.generator.set_state(saved["generator"])

    def _saved(self) -> dict[str, Any]:
        """The options that decide on what is stored, as plain data."""
        return as_plain({name: getattr(self, name) for name in _SAVED}) | {"codec": asdict(self.codec)}
