# SPDX-License-Identifier: Apache-2.0
"""Compressed caches for unmodified models of Hugging Face Transformers.

Importing this module, as ``from singlepass.kv import ZipCache`` does, registers the attention implementation
"singlepass". It passes queries to the cache, which uses them to find salient tokens, and computes attention on what is
stored. With any other implementation these caches work too, but decompress all tokens at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._errors import require
from .._ops import check_backend
from ._codec import Codec
from ._hf_cache import CompressedCache, CompressedLayer, PreTrainedConfig, compressed_kinds
from ._layer import ZipCacheLayer
from ._matryoshka._bases import MatryoshkaBases, Ranks
from ._matryoshka._layer import MatryoshkaLayer

__all__ = ["MatryoshkaCache", "ZipCache"]


class ZipCache(CompressedCache):
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
        salient_bits, regular_bits, codec, window: see :class:`ZipCacheLayer`. Scale and softcap are the model's.
        recent_probes, random_probes, max_probes, normalization, seed, backend: see :class:`ZipCacheLayer`.
        compress_sliding: whether layers with sliding windows are compressed too, for models with large ones (Mistral,
            Phi-3: up to 4,096 tokens).
        max_tokens: reserves room for so many tokens of each sequence, and lets steps be :meth:`planned`, so that they
            can be compiled or captured; see :class:`ZipCacheLayer`. Not for layers with sliding windows.

    Shapes: as in Transformers, keys and values (batch, heads, tokens, channels), channels a multiple of 16 up to 512;
    float32, bfloat16 or float16.

    Raises:
        ValueError: options out of range, or unsupported models: encoder-decoders, layers that share keys and values,
            latent attention, a head dimension that is not a multiple of 16, unknown kinds of layers, no layer to
            compress. Later, when the model runs: a mask of another shape, or one that shows padding, which is not
            stored (the cache is unchanged, except for layers without attention); attention with a position bias or
            dropout; ``crop`` of more tokens than are uncompressed; gradients through the cache. After any other
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
        max_tokens: int | None = None,
        backend: str | None = None,
    ):
        options: dict[str, Any] = {
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
        check_backend("ZipCache", backend)

        def make(index: int, sliding_window: int | None) -> ZipCacheLayer:
            room = max_tokens if sliding_window is None else None
            return ZipCacheLayer(**options, sliding_window=sliding_window, max_tokens=room)

        super().__init__(config, compressed_kinds(compress_sliding), make)

    def __repr__(self) -> str:
        compressed: list[Any] = [layer.inner for layer in self.layers if isinstance(layer, CompressedLayer)]
        first = compressed[0]
        parts = [f"salient_ratio={first.salient_ratio}", f"bits=({first.salient_bits}, {first.regular_bits})"]
        parts += [f"layers={len(self.layers)}", f"compressed={len(compressed)}", f"tokens={first.length}"]
        return f"ZipCache({', '.join(parts)}, nbytes={self.nbytes})"


class MatryoshkaCache(CompressedCache):
    """Low-rank KV cache of a Transformers model: keys and values projected on trained orthogonal bases, of which each
    layer and head keeps as many directions as its ranks say, in 16 or in few bits.

    Full-attention layers are compressed, each by a :class:`MatryoshkaLayer`, and sliding-window layers if asked for;
    others keep Transformers' own cache. Call ``model.set_attn_implementation("singlepass")``: then attention is
    computed on projected vectors. With other implementations every step restores all keys and values. Batches, padding,
    masks, conversations, beams, and saving work as with a :class:`ZipCache`. Without ``bits`` any number of tokens can
    be removed again, unless sliding layers have forgotten others.

    Args:
        config: ``model.config`` itself: through it the cache sees which attention runs.
        bases: what :func:`fit_matryoshka` gave for this model.
        budget: fraction of the ranks of keys and values to keep, together. If :func:`search_ranks` searched for it,
            those ranks are used, else the same ones in all layers and heads.
        ranks: a dictionary, layer number to (ranks of keys, ranks of values), each a multiple of 16 for all heads or
            one for each head; overrides ``budget``.
        bits: None: projected vectors keep their dtype. 8, 4 or 2, or a pair such as (4, 2) for salient and regular
            tokens: they are quantised as by a :class:`ZipCache`.
        window: with ``bits``, maximum number of tokens that are not quantised yet. A call with more new tokens than
            this is treated as a prompt.
        salient_ratio: fraction of salient tokens, if ``bits`` is a pair.
        prefill: what a prompt attends to, its "full" keys and values, or "truncated" ones as in training; always "full"
            with other attention implementations and with masks that are more than padding.
        codec: how tokens are quantised; None: ``Codec.zipcache()``.
        seed: for drawing the random probes.
        compress_sliding: whether layers with sliding windows are compressed too. Ranks must then have been searched so.
        max_tokens: as for a :class:`ZipCache`.
        backend: "native", "triton" or "eager"; None selects one.

    Raises:
        ValueError: bases of another model, a budget out of (0, 1], ranks that are no multiples of 16, options out of
            range, unsupported models as for :class:`ZipCache`; later as there.
        ImportError: on import, without transformers 5.24 or newer. Tested with 5.24.0.

    Source: Lin et al., "MatryoshkaKV", arXiv 2410.14731; see :class:`MatryoshkaLayer` for what is different.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from singlepass.kv import MatryoshkaCache, fit_matryoshka
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=32, vocab_size=32)
        >>> model = LlamaForCausalLM(config)
        >>> bases = fit_matryoshka(model, [torch.arange(32)[None]], progress=False)
        >>> model.set_attn_implementation("singlepass")
        >>> cache = MatryoshkaCache(model.config, bases, budget=0.5)
        >>> tokens = model.generate(torch.arange(30)[None], cache=cache, max_new_tokens=5, do_sample=False,
        ...                         eos_token_id=None, pad_token_id=0)
        >>> tokens.shape, cache.get_seq_length()
        (torch.Size([1, 35]), 34)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bases: MatryoshkaBases,
        budget: float = 0.5,
        *,
        ranks: Mapping[int, Ranks | tuple[Any, Any]] | None = None,
        bits: int | tuple[int, int] | None = None,
        window: int = 128,
        salient_ratio: float = 0.6,
        prefill: str = "full",
        codec: Codec | None = None,
        seed: int = 0,
        compress_sliding: bool = False,
        max_tokens: int | None = None,
        backend: str | None = None,
    ):
        where = "MatryoshkaCache"
        check_backend(where, backend)
        is_bases = isinstance(bases, MatryoshkaBases)
        require(is_bases, where, "MatryoshkaBases", type(bases).__name__, "Call fit_matryoshka.")
        its = bases.ranks_of(budget) if ranks is None else ranks

        def make(index: int, sliding_window: int | None) -> MatryoshkaLayer:
            contract, remedy = f"bases and ranks of layer {index}", "Fit bases for this model."
            if sliding_window is not None:
                remedy = "Pass compress_sliding=True to search_ranks, too."
            known = index in bases.keys and isinstance(its, Mapping) and index in its
            require(known, where, contract, its, remedy)
            pair = its[index]
            fits = isinstance(pair, tuple) and len(pair) == 2
            require(fits, where, f"a pair of ranks for layer {index}", pair, "Pass (ranks of keys, ranks of values).")
            of_keys, of_values = pair
            return MatryoshkaLayer(
                bases.keys[index],
                bases.values[index],
                key_ranks=of_keys,
                value_ranks=of_values,
                bits=bits,
                salient_ratio=salient_ratio,
                codec=codec,
                window=window,
                prefill=prefill,
                seed=seed,
                sliding_window=sliding_window,
                max_tokens=max_tokens if sliding_window is None else None,
                backend=backend,
            )

        self._bases = bases
        super().__init__(config, compressed_kinds(compress_sliding), make)

    def _check_config(self, config: PreTrainedConfig, kinds: set[str]) -> tuple[list[str], list[dict[str, Any]]]:
        found = super()._check_config(config, kinds)
        self._bases.check_config(self.where, config)
        return found

    def __repr__(self) -> str:
        layers: list[Any] = [layer.inner for layer in self.layers if isinstance(layer, CompressedLayer)]
        kept = sum(layer.kept_channels for layer in layers) / sum(layer.all_channels for layer in layers)
        parts = [
            f"kept={kept:.3f}",
            f"bits={layers[0].bits}",
            f"layers={len(self.layers)}",
            f"compressed={len(layers)}",
        ]
        return f"MatryoshkaCache({', '.join(parts)}, tokens={layers[0].length}, nbytes={self.nbytes})"
