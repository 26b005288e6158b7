# SPDX-License-Identifier: Apache-2.0
"""What compressed caches for models of Hugging Face Transformers have in common.

Tested with transformers 5.24.0; older versions lack some of the interfaces used here, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._errors import message, require
from .._ops.kv import MAX_HEAD_DIM
from ._checks import check_logits
from ._modes import lasting
from ._segment import held_nbytes
from ._steps import Planned

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

    from ._hf_layer import NAME as NAME
    from ._hf_layer import TRANSFORM as TRANSFORM
    from ._hf_layer import CompressedLayer, Config, Inner, Undo
except ImportError as error:
    _contract, _remedy = "transformers 5.24 or newer", 'Run: pip install --upgrade "transformers>=5.24".'
    raise ImportError(message("singlepass.kv", _contract, error, _remedy)) from error

# Layers that hold no keys and values token by token, or those of a few tokens only: they stay what transformers makes
# of them. Kinds that are in neither this nor "full_attention" would not be compressed, and are refused.
_UNCHANGED = {"sliding_attention", "chunked_attention", "linear_attention", "conv", "dummy"}
_FOREIGN = "Pass what state_dict() of a cache for the same model gave."
_SLIDING = ("keys", "values", "cumulative_length")  # what is saved of sliding layers


def compressed_kinds(sliding: bool) -> set[str]:
    """The kinds of the layers that a cache compresses, with sliding ones or without."""
    return {"full_attention", "sliding_attention"} if sliding else {"full_attention"}


class CompressedCache(Planned, Cache):
    """A cache whose full-attention layers are compressed, and its sliding ones if asked for; the others are those of
    transformers.

    Args:
        config: the model's.
        kinds: of the layers to compress.
        make: gives for the number of a layer and its sliding window an empty one.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, kinds: set[str], make: Callable[[int, int | None], Inner]):
        self.where = type(self).__name__
        types, arguments = self._check_config(config, kinds)
        shared = Config(config.get_text_config(decoder=True), self.where)
        self._undo = Undo(min(types.index(kind) for kind in kinds & set(types)))
        layers: list[Any] = []
        for i, (kind, its_arguments) in enumerate(zip(types, arguments, strict=True)):
            if kind in kinds:
                layers.append(CompressedLayer(i, shared, self._undo, make, its_arguments.get("sliding_window")))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**its_arguments))
        self._position: Tensor | None = None  # of a planned step's first token, int64 (1,)
        super().__init__(layers=layers)

    def _check_plan(self, tokens: int) -> None:
        where, remedy = f"{self.where}.planned", "Leave the step unplanned."
        others = [type(layer).__name__ for layer in self.layers if not isinstance(layer, CompressedLayer)]
        require(not others, where, "compressed layers alone", f"{others[:1]}", remedy)
        for layer in self.layers:
            layer.require_settled()
        ours, call = self.layers[0].runs_ours(), f'Call model.set_attn_implementation("{NAME}").'
        require(ours, where, f'a model that runs the attention "{NAME}" on what a cache returns', "another", call)
        require(not self.layers[0].inner.holds_padding, where, "a cache without padding", "one with some", remedy)

    def _parts(self) -> list[Planned]:
        return [layer.inner for layer in self.layers]

    @lasting
    def _plan(self, tokens: int) -> None:
        if self._position is None:
            self._position = torch.zeros(1, dtype=torch.int64, device=self.layers[0].device)
        self._position.fill_(self.layers[0].inner.length - tokens)

    def _fixed_tensors(self) -> list[Tensor]:
        return [] if self._position is None else [self._position]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many tokens are cached; in a planned step those before it, as a tensor."""
        return self._position if self._planned else super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return 0 if self._planned else super().get_query_offset(layer_idx)

    def _check_config(self, config: PreTrainedConfig, kinds: set[str]) -> tuple[list[str], list[dict[str, Any]]]:
        """The kinds of a model's layers and their arguments. Raises if it can't have such a cache."""
        is_config = isinstance(config, PreTrainedConfig)
        require(is_config, self.where, "a model's config", type(config).__name__, "Pass model.config.")
        remedy = "Leave it to transformers' own caches."
        require(not config.is_encoder_decoder, self.where, "a decoder-only model", config.model_type, remedy)
        decoder = config.get_text_config(decoder=True)
        shares = "reuse" in (getattr(decoder, "kv_sharing_modes", None) or ())
        shares = shares or bool(getattr(decoder, "num_kv_shared_layers", 0))
        require(not shares, self.where, "layers with keys and values of their own", decoder.model_type, remedy)
        types, arguments = get_layer_types_and_kwargs(decoder)
        unknown = sorted(set(types) - _UNCHANGED - {"full_attention"})
        require(
            not unknown, self.where, f"layers among full_attention, {', '.join(sorted(_UNCHANGED))}", unknown, remedy
        )
        contract, got = f"a layer of {' or '.join(sorted(kinds))}", f"only {sorted(set(types))}"
        slides = "Pass compress_sliding=True, or leave it to transformers' own caches."
        ways_out = slides if "sliding_attention" in types else remedy
        require(bool(kinds & set(types)), self.where, contract, got, ways_out)
        latent = getattr(decoder, "kv_lora_rank", None) is not None
        ours = "Leave it to transformers' own caches: what it stores is compressed already."
        require(not latent, self.where, "keys and values of heads", f"the latents of {decoder.model_type}", ours)
        head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        fits = head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM
        require(fits, self.where, f"a head_dim of 16, 32, ..., {MAX_HEAD_DIM}", head_dim, remedy)
        return types, arguments

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            contract, remedy = f"a model of {len(self.layers)} layers, as its config", "Pass the config of this model."
            raise ValueError(message(self.where, contract, f"layer {layer_idx}", remedy))
        self._undo.note(layer_idx, self.layers[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Total bytes held, including layers that are not compressed and space allocated for more tokens."""
        parts = [[x.inner.tensors(), x.pending] if isinstance(x, CompressedLayer) else vars(x) for x in self.layers]
        parts.append(self._fixed_tensors())
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
                require(short, f"{self.where}.crop", "layers that record their past", type(layer).__name__, remedy)
        super().crop(tokens_to_remove)

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything cached, for ``torch.save``. Layers must be full, sliding or chunked attention.

        Raises:
            ValueError: other layers.
        """
        return {"layers": [_save(self.where, layer) for layer in self.layers]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads the :meth:`state_dict` of a cache for the same model with the same options.

        Raises:
            ValueError: anything else. The cache is unchanged.
        """
        layers = saved.get("layers") if isinstance(saved, dict) else None
        fits = isinstance(layers, list) and len(layers) == len(self.layers)
        got = f"{len(layers)} layers" if isinstance(layers, list) else type(saved).__name__
        require(fits, f"{self.where}.load_state_dict", f"a saved cache of {len(self.layers)} layers", got, _FOREIGN)
        assert layers is not None
        self.layers = [_loaded(self.where, layer, its) for layer, its in zip(self.layers, layers, strict=True)]


def _save(where: str, layer: Any) -> dict[str, Any]:
    if isinstance(layer, CompressedLayer):
        layer.require_settled()
        return layer.inner.state_dict()
    known, contract = type(layer) is DynamicSlidingWindowLayer, "layers of full, sliding or chunked attention"
    require(known, f"{where}.state_dict", contract, layer, "Save the tokens instead, and run the model on them again.")
    return {name: _copied(getattr(layer, name)) for name in _SLIDING}


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _loaded(where: str, layer: Any, saved: Any) -> Any:
    """A layer like that one, with what was saved."""
    if isinstance(layer, CompressedLayer):
        compressed = layer.like()
        options = saved.get("options") if isinstance(saved, dict) else None
        if isinstance(options, dict):  # these came from the model, and will again
            scale, softcap = options.get("scale"), options.get("softcap", 0.0)
            check_logits(f"{where}.load_state_dict", scale, softcap)
            compressed.inner.scale, compressed.inner.softcap = scale, softcap
        compressed.inner.load_state_dict(saved)
        return compressed
    fits = type(layer) is DynamicSlidingWindowLayer and isinstance(saved, dict) and set(saved) == set(_SLIDING)
    require(fits, f"{where}.load_state_dict", f"{_SLIDING} of a sliding layer", type(saved).__name__, _FOREIGN)
    sliding = DynamicSlidingWindowLayer(layer.sliding_window)
    if saved["keys"] is not None:
        sliding.lazy_initialization(saved["keys"], saved["values"])
        for name in _SLIDING:
            setattr(sliding, name, _copied(saved[name]))
    return sliding
