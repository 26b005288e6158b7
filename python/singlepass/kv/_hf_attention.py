# SPDX-License-Identifier: Apache-2.0
"""The attention implementation "singlepass" of transformers, which importing this module registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .._errors import message, require
from ._prompt import explicit_attention

if TYPE_CHECKING:
    from ._hf_layer import CompressedLayer

NAME = "singlepass"


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
    """The attention implementation "singlepass": of a :class:`ZipCache`, or transformers' "sdpa" without one, to which
    logit softcapping and sinks are added."""
    layer: CompressedLayer | None = getattr(key, "singlepass_layer", None)
    softcap, sinks, bias, local = map(kwargs.get, ("softcap", "s_aux", "position_bias", "sliding_window"))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if layer is None and softcap is None and sinks is None:
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    where, remedy = f'attention "{NAME}"', "Choose another attention for this model."
    require(bias is None, where, "no position bias with this cache, softcap or sinks", "a tensor", remedy)
    if layer is None:
        if attention_mask is None and causal and query.shape[2] > 1:
            shape = (1, 1, query.shape[2], key.shape[2])
            attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        out = explicit_attention(query, key, value, attention_mask, scaling, softcap or 0.0, sinks, dropout)
        return out.transpose(1, 2).contiguous(), None
    k, v = layer.take()
    require(local is None, where, "full attention, as in the config", f"a sliding window {local}", remedy)
    require(not dropout, where, "no dropout with a cache", dropout, "Call model.eval().")
    known = causal or attention_mask is not None or k.shape[2] == 1
    require(known, where, "causal attention with a cache", "attention in both directions", remedy)
    layer.inner.scale, layer.inner.softcap = scaling, softcap or 0.0
    with torch.no_grad():
        out = layer.extend(query, k, v, attention_mask, None if sinks is None else sinks.flatten().float())
    return cut(out, query, k, v).transpose(1, 2).contiguous(), None


class _Cut(torch.autograd.Function):
    """A result without its gradient. To drop it silently would train a model wrongly."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        contract, got = "no gradient through compressed tokens", "a backward pass"
        raise ValueError(message("ZipCache", contract, got, "Train without the cache."))


def cut(out: Tensor, *sources: Tensor) -> Tensor:
    """``out``, of which asking for a gradient raises if it came of tensors that need one."""
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in sources)
    return _Cut.apply(out, *sources) if needed else out


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
