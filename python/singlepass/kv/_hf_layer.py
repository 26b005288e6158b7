# SPDX-License-Identifier: Apache-2.0
"""The full-attention layers of a compressed cache, as transformers wants layers to be, and the attention implementation
"singlepass", which importing this module registers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .._errors import message, require
from ._layer import ZipCacheLayer
from ._masks import CAUSAL, Read, read_mask
from ._matryoshka._layer import MatryoshkaLayer
from ._modes import cut, lasting
from ._prompt import explicit_attention, masked_attention

logger = logging.getLogger("singlepass")

Inner = ZipCacheLayer | MatryoshkaLayer  # what holds a layer's tokens

NAME = "singlepass"
TRANSFORM = "singlepass_transform"  # an attribute of attention modules: what keys and values become without a cache
_WIDTH = "singlepass_width"  # an attribute of masks made here: how many tokens the attention_mask had, None without one
_PLANNED = -1  # where keys begin, for masks of planned steps
_HERE, _ANOTHER = f'attention "{NAME}"', "Choose another attention for this model."
_CROP = (
    "Compressed tokens can't be removed: for prompt lookup and assisted decoding give the cache a window of as many "
    "tokens as there are candidates."
)
_WHOLE = "Pass the whole conversation with its mask, or call reset() before another. Leave use_cache on."
# Models that change keys between the cache and attention, or attend to them twice.
_CHANGE_KEYS = {"diffllama", "idefics", "jetmoe"}
_CHANGED = (
    "%s: models of type %r do not attend to the keys that a cache returns, so every step restores all tokens, and no "
    "query tells which are salient."
)
_SLOW = (
    "%s: the model runs its attention %r, for which every step restores all tokens, and no query tells which are "
    'salient. Call model.set_attn_implementation("%s") to compute attention on what is stored.'
)


class Config:
    """A model's config, which copies of a cache share: it says which attention the model runs at the moment."""

    def __init__(self, config: PreTrainedConfig, where: str):
        self.config, self.where = config, where
        self._changes_keys = config.model_type in _CHANGE_KEYS
        self._warned = False

    def runs_ours(self) -> bool:
        """Whether the packed codes are attended to: "singlepass" runs, and gets the keys that the cache returned. The
        first time that this is not so, a warning is logged."""
        running, fits = self.config._attn_implementation, not self._changes_keys
        if not (running == NAME and fits) and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(
                *((_SLOW, self.where, running, NAME) if fits else (_CHANGED, self.where, self.config.model_type))
            )
        return running == NAME and fits

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return self

    def __reduce__(self) -> NoReturn:
        contract, remedy = "state_dict() of a cache to pickle or save", "Load that into a cache for the same model."
        raise TypeError(message(self.where, contract, "the cache itself, which is bound to its model's config", remedy))


class Undo:
    """What the layers were that a model asks before it asks the first compressed one, which may refuse the mask."""

    def __init__(self, first: int):
        self.first = first
        self._was: dict[int, tuple[Any, dict[str, Any]]] = {}

    def note(self, index: int, layer: Any) -> None:
        if index < self.first:
            self._was[index] = layer, dict(vars(layer))

    def forget(self) -> None:
        self._was.clear()

    def restore(self) -> None:
        for layer, was in self._was.values():
            vars(layer).update(was)
        self.forget()


class CompressedLayer(CacheLayerMixin):
    """A compressed layer of full or sliding attention, as transformers wants layers to be. A sliding one
    has places for all tokens, though it forgets those that it does not see any more: its masks are those of all tokens.

    Models call :meth:`update`, then the attention function. Only the latter has the queries, by which tokens are
    compressed: ``update`` lays tokens aside, and marks the keys with this layer for the attention function to find.
    """

    is_sliding = False

    def __init__(
        self,
        index: int,
        shared: Config,
        undo: Undo,
        make: Callable[[int, int | None], Inner],
        sliding_window: int | None = None,
    ):
        super().__init__()
        self.index = index
        self.inner = make(index, sliding_window)
        self.record_past = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self._shared = shared
        self._undo = undo
        self._make = make

    def like(self) -> CompressedLayer:
        """An empty one in its place."""
        return CompressedLayer(self.index, self._shared, self._undo, self._make, self.inner.sliding_window)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.require_settled()
        self.lazy_initialization(key_states, value_states)
        if self._shared.runs_ours():
            keys = key_states.view_as(key_states)  # the caller's own tensor stays unmarked
            keys.singlepass_layer = self  # type: ignore[attr-defined]
            self.pending = keys, value_states
            return keys, value_states
        with torch.no_grad():
            keys, values = self._restore_and_append(key_states, value_states)
        new = key_states, value_states
        return (keys, values) if keys is key_states else (cut(keys, *new), cut(values, *new))

    def _restore_and_append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, for an attention that is not ours. New ones are returned as they are: a prompt's
        attention need not suffer from its compression."""
        inner, tokens = self.inner, k.shape[2]
        old = inner.dequantize() if inner.length else None
        head = tokens - self._removable(tokens)
        dtype = self.stored_dtype(k, v)
        stored = k.to(dtype), v.to(dtype)
        inner.append(*(x[:, :, :head] for x in stored))
        inner.make_room(tokens - head)
        inner.append(*(x[:, :, head:] for x in stored))
        return (k, v) if old is None else (torch.cat((old[0], k), 2), torch.cat((old[1], v), 2))

    def stored_dtype(self, *new: Tensor) -> torch.dtype:
        """That of the first tokens, which new ones may differ from, as do keys from values: under autocast, rotary
        embeddings make keys float32."""
        if (held := self.inner.dtype) is not None:
            return held
        kind = new[0].device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return functools.reduce(torch.promote_types, [x.dtype for x in new])

    def _removable(self, tokens: int) -> int:
        """How many of so many new tokens must stay uncompressed, and so removable: short continuations, and where
        decoding is speculative as many as there is room for, since a prompt comes with its first candidates."""
        continues = self.inner.length > 0 and tokens <= self.inner.window
        return min(tokens, self.inner.window) if continues or self.record_past else 0

    def runs_ours(self) -> bool:
        """As :meth:`Config.runs_ours`."""
        return self._shared.runs_ours()

    def take(self) -> tuple[Tensor, Tensor]:
        """What the last update laid aside."""
        pending, self.pending = self.pending, None
        if pending is None:
            remedy = 'This model attends to them twice: call model.set_attn_implementation("sdpa").'
            raise ValueError(message(self._shared.where, "one attention call for each update", "another call", remedy))
        return pending

    def require_settled(self) -> None:
        if self.pending is not None:
            contract = f'a call of the attention "{NAME}" with the very keys that update returned'
            remedy = "Call reset() after an error; else choose another attention for this model."
            raise ValueError(message(self._shared.where, contract, f"none by layer {self.index}", remedy))

    @lasting  # once, not in each of the calls within
    def extend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Attention of new tokens' queries, and the tokens cached: compressed at once if they are a prompt, else at
        first as they are."""
        inner, tokens = self.inner, k.shape[2]
        if inner._planned:
            remedy = "Leave it out: all tokens of a planned step are tokens."
            require(mask is None, f"{self._shared.where}.planned", "no mask", "one of four dimensions", remedy)
            return inner.step(q, k, v, sinks=sinks)
        padding, is_plain, cached = self._read_mask(mask, q)
        self._undo.forget()
        if cached is not None:
            inner.hide(cached)
        if mask is not None and not is_plain:
            keys, values = self._restore_and_append(k, v)
            return masked_attention(q, keys, values, mask, inner.scale, inner.softcap, sinks)
        head = tokens - self._removable(tokens)
        ended = padding if tokens == 1 and inner.length else None  # padding of sequences that wait for the others
        if padding is not None and ended is None and not (self.record_past and bool(padding[:, head:].all())):
            head = tokens  # other padding has no place in a window
        if head == tokens:
            return inner.prefill(q, k, v, padding, sinks=sinks)
        first = None
        if head:
            its = None if padding is None else padding[:, :head]
            first = inner.prefill(q[:, :, :head], k[:, :, :head], v[:, :, :head], its, sinks=sinks)
            q, k, v = q[:, :, head:], k[:, :, head:], v[:, :, head:]
        if ended is None:
            out = inner.step(q, k, v, sinks=sinks)
        else:
            inner.append(k, v, ended)
            out = inner.attend(q, sinks=sinks)
        return out if first is None else torch.cat((first, out), 2)

    def _read_mask(self, mask: Tensor | None, q: Tensor) -> Read:
        """As :func:`read_mask`; None is causal. What raises leaves the whole cache as it was."""
        inner = self.inner
        # All layers of a kind get the same mask: what the first found out holds for the others.
        state = self._shared, inner.length, inner.sliding_window
        found = getattr(mask, "singlepass_read", None)
        if found is not None and found[0] < self.index and found[1] == state:
            return found[2]
        try:
            if mask is None:
                if inner.holds_padding:
                    contract = "a mask that hides padding, which the cache does not hold"
                    remedy = "Pass the attention_mask of the whole conversation."
                    raise ValueError(message(self._shared.where, contract, "no mask", remedy))
                return CAUSAL
            held = inner.token_mask() if inner.holds_padding else None
            batch, heads, tokens, _ = q.shape
            width, all_tokens = getattr(mask, _WIDTH, None), inner.length + tokens
            if width is not None and width < all_tokens:  # transformers would take the newest tokens for padding
                contract = f"an attention_mask of {all_tokens} tokens, cached and new"
                raise ValueError(message(self._shared.where, contract, f"one of {width}", _WHOLE))
            options: dict[str, Any] = {"final": width is not None, "sliding_window": inner.sliding_window}
            read = read_mask(mask, inner.length, (batch, heads, tokens), held, self._shared.where, **options)
        except ValueError:
            self._undo.restore()
            raise
        mask.singlepass_read = self.index, state, read  # type: ignore[attr-defined]
        return read

    def check_positions(self, positions: Tensor | None, mask: Tensor | None) -> None:
        """Raises if new tokens begin before the end of those cached: what ``generate`` makes of an unrelated prompt,
        and of ``use_cache=False``. Not asked for single tokens, as it reads a number of the device."""
        inner, first = self.inner, self.index == self._undo.first
        if not first or positions is None or positions.dim() != 2 or torch.compiler.is_compiling():
            return
        # With an attention_mask, padding may be at position 0.
        causal = mask is None or getattr(mask, _WIDTH, 0) is None
        if not causal or inner._planned or inner.holds_padding:
            return
        begin = int(positions[0, 0])
        if begin < inner.length:
            self._undo.restore()
            contract = f"new tokens from position {inner.length} on, after those cached"
            raise ValueError(message(self._shared.where, contract, f"position {begin}", _WHOLE))

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be removed. Asked once, after a prompt and its first candidates."""
        return self.pending is None and (self.inner.window_length > 0 or self.inner.length == 0)

    @property
    def batch_size(self) -> int:
        if self.inner.batch is None:
            raise AttributeError("batch_size")  # by which transformers tells layers that are empty
        return self.inner.batch

    def get_seq_length(self) -> int:
        return self.inner.length + (0 if self.pending is None else self.pending[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.inner._planned:
            return query_length, _PLANNED  # sizes stay the same, and no mask is made of them
        held, remedy = self.get_seq_length(), "Pass the whole conversation, or call reset() before another."
        require(query_length > 0, self._shared.where, "new tokens", f"none after the {held} that it holds", remedy)
        return held + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self.inner.reset()
        self.pending = None
        self.is_initialized = False

    def check_crop(self, tokens_to_remove: int) -> None:
        self.require_settled()
        where, most = f"{self._shared.where}.crop", self.inner.window_length
        remedy = "Pass -3 to remove the 3 newest tokens."
        require(tokens_to_remove <= 0, where, "minus the number of tokens to remove", tokens_to_remove, remedy)
        contract = f"{-most} to 0, minus the number of tokens to remove, which are not compressed yet"
        require(-most <= tokens_to_remove, where, contract, tokens_to_remove, _CROP)

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        self.inner.drop_newest(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.require_settled()
        self.inner.select_sequences(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.require_settled()
        self.inner.repeat_sequences(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.require_settled()
        if self.inner.length:  # indices may be a mask too
            indices = indices if isinstance(indices, Tensor) else torch.as_tensor(indices, device="cpu")
            self.inner.select_sequences(torch.arange(self.batch_size, device=indices.device)[indices])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation "singlepass": of a compressed cache, or transformers' "sdpa" without one, to which
    logit softcapping and sinks are added."""
    layer: CompressedLayer | None = getattr(key, "singlepass_layer", None)
    softcap, sinks, bias, local = map(kwargs.get, ("softcap", "s_aux", "position_bias", "sliding_window"))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if layer is None and (transform := getattr(module, TRANSFORM, None)) is not None:
        key, value = transform(key, value)
    if layer is None and softcap is None and sinks is None:
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    if bias is not None:
        raise ValueError(message(_HERE, "no position bias with this cache, softcap or sinks", "a tensor", _ANOTHER))
    if layer is None:
        if attention_mask is None and causal and query.shape[2] > 1:
            shape = (1, 1, query.shape[2], key.shape[2])
            attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        out = explicit_attention(query, key, value, attention_mask, scaling, softcap or 0.0, sinks, dropout)
        return out.transpose(1, 2).contiguous(), None
    k, v = layer.take()
    its = layer.inner.sliding_window
    if local is not None and local != its:
        contract = f"a sliding window {its}, as in the config"
        raise ValueError(message(_HERE, contract, f"a sliding window {local}", _ANOTHER))
    if dropout:
        raise ValueError(message(_HERE, "no dropout with a cache", dropout, "Call model.eval()."))
    if not (causal or attention_mask is not None or k.shape[2] == 1):
        raise ValueError(message(_HERE, "causal attention with a cache", "attention in both directions", _ANOTHER))
    layer.inner.scale, layer.inner.softcap = scaling, softcap or 0.0
    kind = query.device.type
    autocast = torch.is_autocast_enabled(kind)
    result = torch.get_autocast_dtype(kind) if autocast else query.dtype
    dtype = layer.stored_dtype(k, v)
    q = query
    if not q.dtype == k.dtype == v.dtype == dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if k.shape[2] > 1 and layer.inner.length:
        layer.check_positions(kwargs.get("position_ids"), attention_mask)
    sinks = None if sinks is None else sinks.flatten().float()
    if autocast or torch.is_grad_enabled():
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            out = layer.extend(q, k, v, attention_mask, sinks)
    else:  # as in generate, where entering these for each layer would take time
        out = layer.extend(q, k, v, attention_mask, sinks)
    return cut(out.to(result), query, k, v).transpose(1, 2).contiguous(), None


def padding_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for "sdpa", which remembers how wide the attention_mask of padding was."""
    if kwargs.get("kv_offset") == _PLANNED:
        given, remedy = kwargs.get("attention_mask"), "Leave it out: all tokens of such a step are tokens."
        contract, got = "no attention_mask in a planned step", None if given is None else tuple(given.shape)
        require(given is None, _HERE, contract, got, remedy)
        return None
    mask, given = sdpa_mask(*args, **kwargs), kwargs.get("attention_mask")
    if mask is not None:
        setattr(mask, _WIDTH, None if given is None else given.shape[-1])
    return mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
