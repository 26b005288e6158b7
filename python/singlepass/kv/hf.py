# SPDX-License-Identifier: Apache-2.0
"""Compressed caches for models of transformers, which need no change.

Importing this module, as ``from singlepass.kv import ZipCache`` does, registers the attention implementation
"singlepass". A model that runs it hands queries to the cache, which finds salient tokens by them and reads its codes as
they stand. Under any other implementation a :class:`ZipCache` works too, but restores all its tokens at every step.

Tested with transformers 5.23.0; older versions lack some of the interfaces used here, and are refused.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._errors import message, require
from .layer import ZipCacheLayer
from .options import check_backend
from .prompt import padding_in

try:
    from transformers.cache_utils import (
        DYNAMIC_LAYER_TYPE_MAPPING,
        Cache,
        CacheLayerMixin,
        DynamicSlidingWindowLayer,
        get_layer_types_and_kwargs,
    )
    from transformers.configuration_utils import PreTrainedConfig

    from .hf_attention import NAME, cut
except ImportError as error:
    _contract, _remedy = "transformers 5.23 or newer", 'Run: pip install --upgrade "transformers>=5.23".'
    raise ImportError(message("singlepass.kv.ZipCache", _contract, error, _remedy)) from error

__all__ = ["ZipCache"]

logger = logging.getLogger("singlepass")

_OP = "ZipCache"
# Layers that hold no keys and values token by token, or those of a few tokens only: they stay what transformers makes
# of them. Kinds that are in neither this nor "full_attention" would not be compressed, and are refused.
_UNCHANGED = {"sliding_attention", "chunked_attention", "linear_attention", "conv", "dummy"}
_FOREIGN = "Pass what state_dict() of a cache for the same model gave."
_CROP = (
    "Compressed tokens can't be removed: for prompt lookup and assisted decoding give ZipCache a window of as many "
    f'tokens as there are candidates, and the model the attention "{NAME}".'
)
_SLOW = (
    "%s: the model runs its attention %r, for which every step restores all tokens, and all count as salient. "
    'Call model.set_attn_implementation("%s") to have the codes read as they stand.'
)
_SLIDING = ("keys", "values", "cumulative_length")  # what is saved of sliding layers


class ZipCache(Cache):
    """Keys and values of a transformers model, compressed: salient tokens in more bits than regular ones.

    Full-attention layers are compressed, each by a :class:`ZipCacheLayer`. Sliding, chunked and linear layers, which
    hold little, stay as transformers has them. With ``model.set_attn_implementation("singlepass")``, which exists once
    ``ZipCache`` is imported, a prompt is compressed as a whole after its attention was computed from what it was, and
    later tokens read the codes as they stand; continuations of up to ``window`` tokens stay uncompressed first. With
    other implementations ("sdpa", "eager", ...) the cache sees no queries: all tokens count as salient, and every step
    restores them.

    Batches may be padded anywhere: padding, by the attention mask that the model gets, is not stored.

    Args:
        config: the model's, ``model.config`` itself, for the cache asks it which attention runs.
        salient_ratio: share of tokens, of each compressed piece, that are salient.
        **options: of :class:`ZipCacheLayer`: salient_bits, regular_bits, codec, window, recent_probes, random_probes,
            max_probes, normalization, seed, backend. Scale and softcap come from the model.

    Shapes: as in transformers, keys and values (batch, heads, tokens, channels), channels a multiple of 16 up to 512;
    float32, bfloat16 or float16.

    Raises:
        ValueError: options out of range, or models whose cache this can't be: encoder-decoders, layers that share
            keys and values, kinds of layers that are unknown here. Later, when the model runs: masks that are not
            causal masks with padding, or that hide tokens which the cache holds; attention with a position bias;
            :meth:`crop` of more tokens than are uncompressed; gradients through the cache. What raises in the middle of
            a forward pass leaves the cache to be reset.
        ImportError: on import, without transformers 5.23 or newer. Tested with 5.23.0.

    Source: He et al., "ZipCache", arXiv 2405.14256; see :class:`ZipCacheLayer`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from singlepass.kv import ZipCache
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, vocab_size=32)
        >>> model = LlamaForCausalLM(config)
        >>> model.set_attn_implementation("singlepass")
        >>> cache = ZipCache(model.config, salient_ratio=0.6)
        >>> tokens = model.generate(torch.arange(30)[None], past_key_values=cache, max_new_tokens=5, do_sample=False,
        ...                         eos_token_id=None, pad_token_id=0)
        >>> tokens.shape, cache.get_seq_length()
        (torch.Size([1, 35]), 34)
    """

    def __init__(self, config: PreTrainedConfig, salient_ratio: float = 0.6, **options: Any):
        check_backend(_OP, options.get("backend"))
        is_config = isinstance(config, PreTrainedConfig)
        require(is_config, _OP, "a model's config", type(config).__name__, "Pass model.config.")
        remedy = "Leave it to transformers' own caches."
        require(not config.is_encoder_decoder, _OP, "a decoder-only model", config.model_type, remedy)
        given = sorted({"scale", "softcap"} & set(options))
        require(not given, _OP, "no scale and softcap, which the model gives", given, "Leave them out.")
        decoder = config.get_text_config(decoder=True)
        shares = "reuse" in (getattr(decoder, "kv_sharing_modes", None) or ())
        shares = shares or bool(getattr(decoder, "num_kv_shared_layers", 0))
        require(not shares, _OP, "layers with keys and values of their own", decoder.model_type, remedy)
        types, arguments = get_layer_types_and_kwargs(decoder)
        unknown = sorted(set(types) - _UNCHANGED - {"full_attention"})
        require(not unknown, _OP, f"layers among full_attention, {', '.join(sorted(_UNCHANGED))}", unknown, remedy)
        require("full_attention" in types, _OP, "a full-attention layer", f"only {sorted(set(types))}", remedy)
        shared = _Config(decoder)
        layers: list[Any] = []
        for i, (kind, its_arguments) in enumerate(zip(types, arguments, strict=True)):
            if kind == "full_attention":
                layers.append(CompressedLayer(i, shared, {"salient_ratio": salient_ratio, **options}))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**its_arguments))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, of layers that are not compressed too."""
        parts = tree_leaves([x.inner if isinstance(x, CompressedLayer) else vars(x) for x in self.layers])
        return sum(x.nbytes for x in parts if isinstance(x, (ZipCacheLayer, Tensor)))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens, as many as the negative number says, which must be in the windows still.

        Raises:
            ValueError: a positive number, or more tokens than that; the cache is unchanged.
        """
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.check_crop(tokens_to_remove)
        ordered: list[Any] = sorted(self.layers, key=lambda x: isinstance(x, CompressedLayer))
        for layer in ordered:  # those that were asked come last, for others may refuse
            layer.crop(tokens_to_remove)

    def state_dict(self) -> dict[str, Any]:
        """Everything cached, as copies, for ``torch.save``; layers are full, sliding or chunked attention.

        Raises:
            ValueError: other layers.
        """
        return {"layers": [_save(layer) for layer in self.layers]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` of a cache for the same model with the same options gave.

        Raises:
            ValueError: anything else; the cache is unchanged.
        """
        layers = saved.get("layers") if isinstance(saved, dict) else None
        fits = isinstance(layers, list) and len(layers) == len(self.layers)
        got = f"{len(layers)} layers" if isinstance(layers, list) else type(saved).__name__
        require(fits, f"{_OP}.load_state_dict", f"a saved cache of {len(self.layers)} layers", got, _FOREIGN)
        assert layers is not None
        self.layers = [_loaded(layer, its) for layer, its in zip(self.layers, layers, strict=True)]


class _Config:
    """A model's config, which copies of a cache share: it says which attention the model runs at the moment."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self._warned = False

    def runs_ours(self) -> bool:
        """Whether that is "singlepass"; the first time that it is not, a warning is logged."""
        running = self.config._attn_implementation
        if running != NAME and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(_SLOW, _OP, running, NAME)
        return running == NAME

    def __deepcopy__(self, memo: dict[int, Any]) -> _Config:
        return self


class CompressedLayer(CacheLayerMixin):
    """A full-attention layer of a :class:`ZipCache`, as transformers wants layers to be.

    Models call :meth:`update`, then the attention function. Only the latter has the queries, by which tokens are
    compressed: ``update`` lays tokens aside, and marks the keys with this layer for the attention function to find.
    """

    is_sliding = False
    # is_croppable stays False: it promises that removed tokens leave no trace, but what they compressed stays so.

    def __init__(self, index: int, shared: _Config, options: dict[str, Any]):
        super().__init__()
        self.index = index
        self.inner = ZipCacheLayer(**options)
        self.record_past = False
        self._shared = shared
        self._options = options
        self._pending: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.require_settled()
        self.lazy_initialization(key_states, value_states)
        if self._shared.runs_ours():
            keys = key_states.view_as(key_states)  # the caller's own tensor stays unmarked
            keys.singlepass_layer = self  # type: ignore[attr-defined]
            self._pending = keys, value_states
            return keys, value_states
        before = self.inner.length
        with torch.no_grad():
            old = self.inner.dequantize() if before else ()
            self.inner.append(key_states, value_states)
        # New tokens are returned as they are: a prompt's attention need not suffer from its compression.
        new = key_states, value_states
        whole = [torch.cat(parts, 2) for parts in zip(old, new, strict=True)] if before else new
        return (cut(whole[0], *new), cut(whole[1], *new)) if before else (whole[0], whole[1])

    def take(self) -> tuple[Tensor, Tensor]:
        """What the last update laid aside."""
        remedy = "Layers that share keys and values can't share a ZipCache."
        require(self._pending is not None, _OP, "one attention call for each update", "another call", remedy)
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending

    def require_settled(self) -> None:
        contract = f'a call of the attention "{NAME}" with the very keys that update returned'
        remedy = "Call reset() after an error; else choose another attention for this model."
        require(self._pending is None, _OP, contract, f"none by layer {self.index}", remedy)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Attention of new tokens' queries, and the tokens cached: compressed at once if they are a prompt, else at
        first as they are."""
        inner, tokens = self.inner, k.shape[2]
        kept = tokens if inner.length and padding is None and tokens <= inner.window else 0
        if self.record_past and not kept:
            # Speculative decoding sends a prompt with its first candidates, which must be removable.
            newest = min(tokens, inner.window)
            kept = newest if padding is None or bool(padding[:, tokens - newest :].all()) else 0
        head = tokens - kept
        outs = []
        if head:
            mask = None if padding is None else padding[:, :head]
            outs.append(inner.prefill(q[:, :, :head], k[:, :, :head], v[:, :, :head], mask, sinks=sinks))
        if kept:
            if inner.window_length + kept > inner.window:
                inner._flush()  # all of the new tokens, and so their queries, must find room in one window
            inner.append(k[:, :, head:], v[:, :, head:])
            outs.append(inner.attend(q[:, :, head:], sinks=sinks))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def read_mask(self, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """Which of the new tokens are none, (batch, tokens), false for padding; None if all are tokens."""
        if mask is None:
            return None
        before = self.inner.length
        # All layers of a model get the same mask: what the first found out holds for the others.
        found = getattr(mask, "singlepass_padding", None)
        if found is not None and found[0] < self.index and found[1] == before:
            return found[2]
        held = self.inner._token_mask() if before else None
        padding = padding_in(mask, before, batch, tokens, held, _OP)
        mask.singlepass_padding = self.index, before, padding  # type: ignore[attr-defined]
        return padding

    @property
    def batch_size(self) -> int:
        if self.inner._window is None:
            raise AttributeError("batch_size")  # by which transformers tells layers that are empty
        return self.inner._window[0].shape[0]

    def get_seq_length(self) -> int:
        return self.inner.length + (0 if self._pending is None else self._pending[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self.inner.reset()
        self._pending = None
        self.is_initialized = False

    def check_crop(self, tokens_to_remove: int) -> None:
        self.require_settled()
        where, fits = f"{_OP}.crop", -self.inner.window_length <= tokens_to_remove <= 0
        contract = f"{-self.inner.window_length} to 0, minus the tokens to remove, which are not compressed yet"
        require(fits, where, contract, tokens_to_remove, _CROP)

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
            self.inner.select_sequences(torch.arange(self.batch_size, device=indices.device)[indices])


def _save(layer: Any) -> dict[str, Any]:
    if isinstance(layer, CompressedLayer):
        layer.require_settled()
        return layer.inner.state_dict()
    known, contract = type(layer) is DynamicSlidingWindowLayer, "layers of full, sliding or chunked attention"
    require(known, f"{_OP}.state_dict", contract, layer, "Save the tokens instead, and run the model on them again.")
    return {name: _copied(getattr(layer, name)) for name in _SLIDING}


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _loaded(layer: Any, saved: Any) -> Any:
    """A layer like that one, with what was saved."""
    if isinstance(layer, CompressedLayer):
        compressed = CompressedLayer(layer.index, layer._shared, layer._options)
        options = saved.get("options") if isinstance(saved, dict) else None
        if isinstance(options, dict):  # these came from the model, and will again
            compressed.inner.scale, compressed.inner.softcap = options.get("scale"), options.get("softcap", 0.0)
        compressed.inner.load_state_dict(saved)
        return compressed
    fits = type(layer) is DynamicSlidingWindowLayer and isinstance(saved, dict) and set(saved) == set(_SLIDING)
    require(fits, f"{_OP}.load_state_dict", f"{_SLIDING} of a sliding layer", type(saved).__name__, _FOREIGN)
    sliding = DynamicSlidingWindowLayer(layer.sliding_window)
    if saved["keys"] is not None:
        sliding.lazy_initialization(saved["keys"], saved["values"])
        for name in _SLIDING:
            setattr(sliding, name, _copied(saved[name]))
    return sliding
