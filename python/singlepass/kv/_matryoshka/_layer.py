# SPDX-License-Identifier: Apache-2.0
"""The low-rank cache of one attention layer: what it promises, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..._errors import message, require
from .._checks import check_sinks
from .._codec import Codec
from .._layer import ZipCacheLayer
from .._modes import lasting
from .._options import (
    as_plain,
    check_count,
    check_hides_newest,
    check_index,
    check_mask,
    check_new_tokens,
    without_padding,
)
from .._prompt import behind, causal_attention
from .._segment import held_nbytes
from .._steps import check_step
from ._attention import GroupedAttention
from ._bases import check_bases, check_ranks
from ._groups import Rotary, check_bits, check_rotary
from ._state import fingerprint, load, pack

_OP = "MatryoshkaLayer"
_ANY_WIDTH = Codec()  # projected vectors are what is quantised, whose ranks the constructor has checked
PREFILLS = ("full", "truncated")


class MatryoshkaLayer(GroupedAttention):
    """Keys and values of one attention layer, projected on orthogonal bases of which each head keeps as many directions
    as its ranks say: a fraction of the memory, in as many bits as they came with, or in few.

    Heads of equal ranks are stored and attended to together, without padding. Attention is computed on projected
    vectors, with queries projected likewise; only its result is projected back.

    Args:
        key_bases: orthogonal matrices, float32 (heads, channels, channels), a basis in the columns of each, the most
            important direction first.
        value_bases: likewise (heads, value channels, value channels).
        key_ranks: how many directions each head keeps, multiples of 16: one for all, or one for each.
        value_ranks: likewise.
        bits: None: projected vectors keep their dtype. 8, 4 or 2: they are quantised. (4, 2) or another pair: salient
            tokens are kept in more bits than regular ones, as in a :class:`ZipCacheLayer`.
        salient_ratio: fraction of salient tokens, if ``bits`` is a pair.
        codec: how tokens are quantised; None: ``Codec.zipcache()``.
        window: with ``bits``, maximum number of tokens that are not quantised yet, the newest ones.
        prefill: what a prompt attends to, "full" or "truncated" keys and values of its own. Those from before it are
            truncated in any case.
        seed: for drawing the random probes.
        scale: of q @ k^T; None: channels^-0.5.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
        sliding_window: number of the newest tokens that a query sees, including its own; older ones are forgotten.
            None: all tokens.
        max_tokens: reserves room for so many tokens with the first ones, and lets steps be :meth:`planned`. None: room
            grows; see :class:`ZipCacheLayer`.
        backend: "native", "triton" or "eager"; None selects one.

    Attributes:
        length: number of cached tokens.

    Raises:
        ValueError: options out of range; bases that are not orthogonal, such as those per query head.

    Source: Lin et al., "MatryoshkaKV", arXiv 2410.14731. Unlike there, bases belong to KV heads, not to query heads, so
    that grouped-query attention saves memory; no mean is subtracted, so that softcap and sinks are exact; nothing is
    padded to the largest rank.

    Example:
        >>> import torch
        >>> from singlepass.kv import MatryoshkaLayer
        >>> q, k, v = torch.randn(1, 8, 200, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
        >>> bases = torch.linalg.qr(torch.randn(2, 64, 64)).Q
        >>> layer = MatryoshkaLayer(bases, bases, key_ranks=32, value_ranks=[32, 48])
        >>> layer.prefill(q, k, v).shape
        torch.Size([1, 8, 200, 64])
        >>> layer.step(q[:, :, :1], k[:, :, :1], v[:, :, :1]).shape
        torch.Size([1, 8, 1, 64])
        >>> layer.kept_channels, layer.all_channels, layer.length
        (144, 256, 201)
    """

    def __init__(
        self,
        key_bases: Tensor,
        value_bases: Tensor,
        *,
        key_ranks: int | Sequence[int] | Tensor,
        value_ranks: int | Sequence[int] | Tensor,
        bits: int | tuple[int, int] | None = None,
        salient_ratio: float = 0.6,
        codec: Codec | None = None,
        window: int = 128,
        prefill: str = "full",
        seed: int = 0,
        scale: float | None = None,
        softcap: float = 0.0,
        sliding_window: int | None = None,
        max_tokens: int | None = None,
        backend: str | None = None,
    ):
        for name, bases in (("key_bases", key_bases), ("value_bases", value_bases)):
            check_bases(_OP, name, bases)
        heads, fits = key_bases.shape[0], key_bases.shape[0] == value_bases.shape[0]
        require(fits, _OP, f"value_bases of {heads} heads, as keys", value_bases.shape[0], "Pass one for each KV head.")
        keys = check_ranks(_OP, key_ranks, "keys", heads, key_bases.shape[1])
        values = check_ranks(_OP, value_ranks, "values", heads, value_bases.shape[1])
        require(prefill in PREFILLS, _OP, " or ".join(map(repr, PREFILLS)), repr(prefill), "Choose one of them.")
        self.bits = check_bits(_OP, bits)
        self.salient_ratio, self.codec = salient_ratio, Codec() if codec is None else codec
        self.window, self.prefill_on, self.seed = window, prefill, seed
        self.scale, self.softcap, self.sliding_window = scale, softcap, sliding_window
        self.max_tokens, self.backend = max_tokens, backend
        self._bases = key_bases, value_bases
        self._ranks = keys, values
        ZipCacheLayer(**self._options())  # raises unless options are in range
        for rank in torch.cat(self._ranks).tolist() if self.bits is not None else ():
            self.codec.check_head_dim(_OP, rank)
        super().__init__()

    def reset(self) -> None:
        """Removes all tokens. Room for ``max_tokens`` is kept."""
        self._clear()

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the tokens; None as long as there are none."""
        return None if self._like is None else self._like[0].dtype

    @property
    def batch(self) -> int | None:
        """How many sequences are cached; None as long as there are no tokens."""
        return None if self._like is None else len(self._like[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all memory held, with room preallocated for more tokens, but without the bases."""
        return held_nbytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, but for the bases."""
        return [t for group in self._groups for t in group.inner.tensors()]

    @property
    def kept_channels(self) -> int:
        """How many numbers are stored for a token, all heads' keys and values together."""
        return sum(int(ranks.sum()) for ranks in self._ranks)

    @property
    def all_channels(self) -> int:
        """How many a token has."""
        return sum(basis.shape[0] * basis.shape[1] for basis in self._bases)

    @property
    def holds_padding(self) -> bool:
        """Whether some of the tokens were padding."""
        return self._groups[0].inner.holds_padding

    def __repr__(self) -> str:
        ranks = [f"{name}_ranks={its.tolist()}" for name, its in zip(("key", "value"), self._ranks, strict=True)]
        bits = None if self.bits is None else self.bits[0] if self.bits[0] == self.bits[1] else self.bits
        return f"MatryoshkaLayer({', '.join(ranks)}, bits={bits}, tokens={self.length}, nbytes={self.nbytes})"

    # Adding tokens

    def _check_new(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        check_new_tokens(_OP, k, v, self._like, _ANY_WIDTH, self.backend)
        for name, x, bases in zip("kv", (k, v), self._bases, strict=True) if self._like is None else ():
            fits = x.shape[1] == bases.shape[0] and x.shape[3] == bases.shape[1]
            contract = f"{name} (batch, {bases.shape[0]}, tokens, {bases.shape[1]}), as the bases"
            require(fits, _OP, contract, tuple(x.shape), "Pass bases of this layer.")
        check_mask(_OP, mask, (k.shape[0], k.shape[2]), k.device)

    @lasting
    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, sinks: Tensor | None = None
    ) -> Tensor:
        """Causal attention of a prompt's queries over all cached tokens and the prompt, which is then stored.

        Args:
            q: (batch, query heads, tokens, channels).
            k: (batch, heads, tokens, channels).
            v: (batch, heads, tokens, value channels).
            mask: bool (batch, tokens), false for padding, or None.
            sinks: float32 (query heads,), the logit of an attention sink for each head, or None.

        Returns:
            Tensor: (batch, query heads, tokens, value channels). The queries of padding see the tokens before them; if
            there are none, the result is zero.

        Raises:
            ValueError: invalid shapes, dtypes or devices, or a tensor that requires gradients. The cache is unchanged.
        """
        self._check_prompt(q, k, v, mask)
        check_sinks(_OP, sinks, q)
        k, v = without_padding(k, v, mask)
        places = self._places(k, v, prompt=True)
        projected = self._project(k, v, places)
        keys, values = (k, v) if self.prefill_on == "full" else self._back(projected)
        seen = mask
        if self.length:
            held = self.token_mask() if mask is not None or self.holds_padding else None
            keys, values, seen = behind(self.dequantize(), held, keys, values, mask)
        out = causal_attention(q, keys, values, seen, self._scale, self.softcap, sinks, self.sliding_window)
        self._store(q, projected, mask, places is not None)
        return out

    @lasting
    def store(
        self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None = None, *, rotary: Rotary | None = None
    ) -> None:
        """Projects and adds a prompt as :meth:`prefill` does, for those who compute its attention by themselves.

        Args:
            q: as for :meth:`prefill`, rotated already; None: all tokens count as salient.
            k, v, mask: as for :meth:`prefill`.
            rotary: as for :meth:`append`.

        Raises:
            ValueError: as :meth:`prefill`. The cache is unchanged.
        """
        self._check_prompt(q, k, v, mask)
        rotary = check_rotary(_OP, rotary, k)
        k, v = without_padding(k, v, mask)
        places = self._places(k, v, prompt=True)
        self._store(q, self._project(k, v, places, rotary), mask, places is not None)

    def _check_prompt(self, q: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        self._require_unplanned("a prompt")
        self._check_new(k, v, mask)
        if q is not None:
            self._check_queries(q, k, None)
            require(q.shape[2] == k.shape[2], _OP, f"{k.shape[2]} queries, one for each token", q.shape[2], "Pass all.")

    @lasting
    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None, *, rotary: Rotary | None = None) -> None:
        """Projects and adds new tokens.

        Args:
            k: (batch, heads, tokens, channels).
            v: (batch, heads, tokens, value channels).
            mask: bool (batch, tokens), false for padding, such as what follows sequences that have ended; or None.
            rotary: cosines and sines (batch or 1, tokens, an even number of channels), as rotary embeddings of
                Transformers give them: keys are rotated before they are projected. None: they are rotated already.

        Raises:
            ValueError: invalid shapes, dtypes or devices, or a tensor that requires gradients. The cache is unchanged.
        """
        self._check_new(k, v, mask)
        if self._planned:
            check_step(_OP, k.shape[2], self._planned, mask)
        self._append(k, v, mask, check_rotary(_OP, rotary, k))

    @lasting
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """:meth:`append` and :meth:`attend` of tokens that come with their queries.

        Args:
            q: (batch, query heads, tokens, channels).
            k: (batch, heads, tokens, channels). With ``bits``, there must be no more tokens than the window takes.
            v: (batch, heads, tokens, value channels).
            sinks, rotary: as for both; cosines and sines are those of q and k.

        Returns:
            Tensor: (batch, query heads, tokens, value channels), q's dtype.

        Raises:
            ValueError: as both. The cache is unchanged.
        """
        self._check_new(k, v, None)
        sinks = self._check_queries(q, k, sinks)
        tokens, most = k.shape[2], k.shape[2] if self.bits is None else self.window
        if not q.shape[2] == tokens <= most:
            contract, got = f"a query for each of at most {most} tokens", f"{q.shape[2]} for {tokens}"
            raise ValueError(message(_OP, contract, got, "Pass prompts to prefill."))
        rotary = check_rotary(_OP, rotary, q)
        if self._planned:
            check_step(_OP, tokens, self._planned, None)
        elif tokens > 1:
            self._make_room(tokens)
        self._append(k, v, None, rotary)
        return self._attend(q, sinks, rotary)

    def _append(self, k: Tensor, v: Tensor, mask: Tensor | None, rotary: Rotary | None) -> None:
        k, v = without_padding(k, v, mask)
        places = self._places(k, v, mask)
        for group, (keys, values) in zip(self._groups, self._project(k, v, places, rotary), strict=True):
            if places is None:
                group.inner.append(keys, values, mask)
            else:
                group.inner.take(k.shape[2], mask)
        if not self._planned:
            self.length += k.shape[2]

    @lasting
    def make_room(self, tokens: int) -> None:
        """Makes sure that the next ``tokens`` tokens can be removed again together."""
        self._require_unplanned("make_room")
        self._make_room(tokens)

    # Using them

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """All keys and values in token order, (batch, heads, tokens, channels), in the dtype of the tokens that were
        added, as far as the bases keep them; zeros for padding.

        Raises:
            ValueError: an empty cache.
        """
        self._require_unplanned("dequantize")
        self._check_held()
        return self._back([group.inner.dequantize() for group in self._groups])

    def token_mask(self) -> Tensor:
        """bool (batch, length), false for padding.

        Raises:
            ValueError: an empty cache.
        """
        self._require_unplanned("token_mask")
        self._check_held()
        return self._groups[0].inner.token_mask()

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
        k, _ = self._check_held()
        check_mask(_OP, mask, (len(k), self.length), k.device)
        check_hides_newest(_OP, self.token_mask(), mask)
        for group in self._groups:
            group.inner.hide(mask)

    # Changing the batch and the length

    @lasting
    def select_sequences(self, index: Tensor | Sequence[int]) -> None:
        """Selects sequences of the batch by index, in that order, possibly repeated, as for beam search.

        Raises:
            ValueError: anything but indices of sequences.
        """
        chosen = check_index(_OP, index, self.batch)
        self._map_batch(lambda t: t.index_select(0, chosen.to(t.device)))
        for group in self._groups:
            group.inner.select_sequences(chosen)

    @lasting
    def repeat_sequences(self, times: int) -> None:
        """Repeats each sequence of the batch ``times`` times in a row.

        Raises:
            ValueError: anything but a number of times, one or more.
        """
        check_count(_OP, times, 1, None, "times", "Call reset() to remove all.")
        self._map_batch(lambda t: t.repeat_interleave(times, 0))
        for group in self._groups:
            group.inner.repeat_sequences(times)

    @lasting
    def drop_newest(self, tokens: int) -> None:
        """Removes the newest tokens, up to ``window_length`` of them.

        Raises:
            ValueError: more tokens than that. The cache is unchanged.
        """
        self._require_unplanned("drop_newest")
        remedy = "Build the cache anew, of fewer tokens."
        check_count(_OP, tokens, 0, self.window_length, "tokens, those that can still be removed", remedy)
        for group in self._groups:
            group.inner.drop_newest(tokens)
        self.length -= tokens

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything cached, for ``torch.save``. The bases are not among it."""
        self._require_unplanned("state_dict")
        return pack(self._saved(), self.length, self._like, self._groups)

    @lasting
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads the :meth:`state_dict` of a layer with the same bases, ranks and options.

        Raises:
            ValueError: anything else. The cache is unchanged.
        """
        self._require_unplanned("load_state_dict")
        groups = self._new_groups()
        like = load(saved, self._saved(), groups, self._bases, self._projections)
        if like is not None:
            self._settle(groups, like)
        self._groups, self._like, self.length = groups, like, saved["length"]

    def _saved(self) -> dict[str, Any]:
        """What decides on what is stored, as plain data."""
        names = ("bits", "salient_ratio", "window", "scale", "softcap", "sliding_window")
        options = as_plain({name: getattr(self, name) for name in names}) | {"prefill": self.prefill_on}
        ranks = {name: its.tolist() for name, its in zip(("key_ranks", "value_ranks"), self._ranks, strict=True)}
        return options | ranks | {"codec": asdict(self.codec), "bases": fingerprint(self._bases)}
