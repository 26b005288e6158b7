# SPDX-License-Identifier: Apache-2.0
"""Compressed caches for unmodified models of Hugging Face Transformers.

Importing this module, as ``from singlepass.kv import ZipCache`` does, registers the attention implementation
"singlepass". It passes queries to the cache, which uses them to find salient tokens, and computes attention on packed
codes. With any other implementation a :class:`ZipCache` works too, but decompresses all tokens at every step.

Tested with transformers 5.24.0; older versions lack some of the interfaces used here, and are refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._errors import message, require
from ._codec import Codec
from ._functional import MAX_HEAD_DIM
from ._options import check_backend
from ._store import held_nbytes

try:
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        raise ImportError(f"version {transformers.__version__}")
    from transformers.cache_utils import (
        DYNAMIC_LAYER_TYPE_MAPPING,
        Cache,
        DynamicSlidingWindowLayer,
        get_layer_types_and_kwargs,
    )
    from transformers.configuration_utils import PreTrainedConfig

    from ._hf_layer import CompressedLayer, Config, Undo
except ImportError as error:
    _contract, _remedy = "transformers 5.24 or newer", 'Run: pip install --upgrade "transformers>=5.24".'
    raise ImportError(message("singlepass.kv.ZipCache", _contract, error, _remedy)) from error

__all__ = ["ZipCache"]

_OP = "ZipCache"
# Layers that hold no keys and values token by token, or those of a few tokens only: they stay what transformers makes
# of them. Kinds that are in neither this nor "full_attention" would not be compressed, and are refused.
_UNCHANGED = {"sliding_attention", "chunked_attention", "linear_attention", "conv", "dummy"}
_FOREIGN = "Pass what state_dict() of a cache for the same model gave."
_SLIDING = ("keys", "values", "cumulative_length")  # what is saved of sliding layers


class ZipCache(Cache):
    """Compressed KV cache of a Transformers model: salient tokens in more bits than regular ones.

    Full-attention layers are compressed, each by a :class:`ZipCacheLayer`, and sliding-window layers if asked for.
    Other layers, which hold little, keep Transformers' own cache. Call ``model.set_attn_implementation("singlepass")``
    after importing ``ZipCache``: then a prompt attends to uncompressed keys and values, is compressed as a whole, and
    later tokens attend to the packed codes. Up to ``window`` new tokens stay uncompressed first. With other
    implementations ("sdpa", "eager", ...) the cache sees no queries: all tokens count as salient, and every step
    decompresses them.

    Batches may be padded on any side: what the attention mask marks as padding is not stored. Any other mask, bool or
    added to logits (trees of drafts, packed documents, masks per head), is applied too: such a step decompresses all
    tokens, and those that it adds count as salient until probes see them.

    Args:
        config: ``model.config`` itself: through it the cache sees which attention runs.
        salient_ratio: fraction of the tokens compressed together that are kept in ``salient_bits``.
        salient_bits, regular_bits, codec, window, recent_probes, random_probes, max_probes, normalization, seed,
            backend: passed to every :class:`ZipCacheLayer`. Scale and softcap come from the model.
        compress_sliding: whether layers with sliding windows are compressed too, for models with large ones (Mistral,
            Phi-3: up to 4,096 tokens).

    Shapes: as in Transformers, keys and values (batch, heads, tokens, channels), channels a multiple of 16 up to 512;
    float32, bfloat16 or float16.

    Raises:
        ValueError: options out of range, or unsupported models: encoder-decoders, layers that share keys and values,
            latent attention, a head dimension that is not a multiple of 16, unknown kinds of layers, no layer to
            compress. Later, when the model runs: a mask of another shape, or one that shows padding, which is not
            stored (the cache is unchanged, except for layers without attention); attention with a position bias or
            dropout; :meth:`crop` of more tokens than are uncompressed; gradients through the cache. After any other
            error during a forward pass, call ``reset()``.
        ImportError: on import, without transformers 5.24 or newer. Tested with 5.24.0.

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
        >>> tokens = model.generate(torch.arange(30)[None], cache=cache, max_new_tokens=5, do_sample=False,
        ...                         eos_token_id=None, pad_token_id=0)
        >>> tokens.shape, cache.get_seq_length()
        (torch.Size([1, 35]), 34)
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
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
        compress_sliding: bool = False,
        backend: str | None = None,
    ):
        options = {
            "salient_ratio": salient_ratio,
            "salient_bits": salient_bits,
            "regular_bits": regular_bits,
            "codec": codec,
            "window": window,
            "recent_probes": recent_probes,
            "random_probes": random_probes,
            "max_probes": max_probes,
            "normalization": normalization,
            "seed": seed,
            "backend": backend,
        }
        check_backend(_OP, backend)
        is_config = isinstance(config, PreTrainedConfig)
        require(is_config, _OP, "a model's config", type(config).__name__, "Pass model.config.")
        remedy = "Leave it to transformers' own caches."
        require(not config.is_encoder_decoder, _OP, "a decoder-only model", config.model_type, remedy)
        decoder = config.get_text_config(decoder=True)
        shares = "reuse" in (getattr(decoder, "kv_sharing_modes", None) or ())
        shares = shares or bool(getattr(decoder, "num_kv_shared_layers", 0))
        require(not shares, _OP, "layers with keys and values of their own", decoder.model_type, remedy)
        types, arguments = get_layer_types_and_kwargs(decoder)
        unknown = sorted(set(types) - _UNCHANGED - {"full_attention"})
        require(not unknown, _OP, f"layers among full_attention, {', '.join(sorted(_UNCHANGED))}", unknown, remedy)
        compressed = {"full_attention", "sliding_attention"} if compress_sliding else {"full_attention"}
        contract, got = f"a layer of {' or '.join(sorted(compressed))}", f"only {sorted(set(types))}"
        slides = "Pass compress_sliding=True, or leave it to transformers' own caches."
        ways_out = slides if "sliding_attention" in types else remedy
        require(bool(compressed & set(types)), _OP, contract, got, ways_out)
        latent = getattr(decoder, "kv_lora_rank", None) is not None
        ours = "Leave it to transformers' own caches: what it stores is compressed already."
        require(not latent, _OP, "keys and values of heads", f"the latents of {decoder.model_type}", ours)
        head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        fits = head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM
        require(fits, _OP, f"a head_dim of 16, 32, ..., {MAX_HEAD_DIM}", head_dim, remedy)
        shared = Config(decoder)
        self._undo = Undo(min(types.index(kind) for kind in compressed & set(types)))
        layers: list[Any] = []
        for i, (kind, its_arguments) in enumerate(zip(types, arguments, strict=True)):
            if kind in compressed:
                layers.append(CompressedLayer(i, shared, self._undo, options, its_arguments.get("sliding_window")))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**its_arguments))
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._undo.note(layer_idx, self.layers[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __repr__(self) -> str:
        compressed = [layer.inner for layer in self.layers if isinstance(layer, CompressedLayer)]
        first = compressed[0]
        parts = [f"salient_ratio={first.salient_ratio}", f"bits=({first.salient_bits}, {first.regular_bits})"]
        parts += [f"layers={len(self.layers)}", f"compressed={len(compressed)}", f"tokens={first.length}"]
        return f"ZipCache({', '.join(parts)}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Total bytes held, including layers that are not compressed and space allocated for more tokens."""
        parts = [[x.inner.tensors(), x.pending] if isinstance(x, CompressedLayer) else vars(x) for x in self.layers]
        return held_nbytes(x for x in tree_leaves(parts) if isinstance(x, Tensor))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens: pass a negative number. They must still be uncompressed.

        Raises:
            ValueError: a positive number, more tokens than are uncompressed, or a sliding-window layer that has already
                dropped tokens that it would need. The cache is unchanged.
        """
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.check_crop(tokens_to_remove)
            elif not getattr(layer, "record_past", True):
                short = isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() < layer.sliding_window
                remedy = "Call activate_past_recording() before those tokens come."
                require(short, f"{_OP}.crop", "layers that record their past", type(layer).__name__, remedy)
        super().crop(tokens_to_remove)

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything cached, for ``torch.save``. Layers must be full, sliding or chunked attention.

        Raises:
            ValueError: other layers.
        """
        return {"layers": [_save(layer) for layer in self.layers]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads the :meth:`state_dict` of a cache for the same model with the same options.

        Raises:
            ValueError: anything else. The cache is unchanged.
        """
        layers = saved.get("layers") if isinstance(saved, dict) else None
        fits = isinstance(layers, list) and len(layers) == len(self.layers)
        got = f"{len(layers)} layers" if isinstance(layers, list) else type(saved).__name__
        require(fits, f"{_OP}.load_state_dict", f"a saved cache of {len(self.layers)} layers", got, _FOREIGN)
        assert layers is not None
        self.layers = [_loaded(layer, its) for layer, its in zip(self.layers, layers, strict=True)]


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
        compressed = layer.like()
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
