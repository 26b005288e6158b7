# SPDX-License-Identifier: Apache-2.0
"""An ordinary model run with other keys and values in its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..._errors import message, require
from .._hf_cache import NAME, TRANSFORM

Transform = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Batch:
    """Texts.

    Attributes:
        ids: int64 (batch, tokens).
        shown: bool (batch, tokens), false for padding.
    """

    ids: Tensor
    shown: Tensor

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a model is called with."""
        device = next(model.parameters()).device
        mask = None if bool(self.shown.all()) else self.shown.long().to(device)
        return {"input_ids": self.ids.to(device), "attention_mask": mask}


def checked_batches(where: str, batches: Iterable[Tensor | dict[str, Tensor]]) -> list[Batch]:
    """Batches of texts, if they are."""
    remedy = "Pass tensors of token ids, or what a tokenizer returns."
    is_text = isinstance(batches, (str, bytes, dict, Tensor)) or not isinstance(batches, Iterable)
    require(not is_text, where, "a list or another iterable of batches", type(batches).__name__, remedy)
    found = []
    for batch in batches:
        given: Any = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        ids = given.get("input_ids") if hasattr(given, "get") else None
        if not isinstance(ids, Tensor):
            contract = "token ids, or a dictionary with input_ids"
            raise ValueError(message(where, contract, type(batch).__name__, remedy))
        fits = ids.dim() == 2 and not ids.is_floating_point() and ids.dtype != torch.bool
        require(fits, where, "token ids (batch, tokens)", f"{tuple(ids.shape)} of {ids.dtype}", remedy)
        mask = given.get("attention_mask")
        shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
        require(shown.shape == ids.shape, where, f"an attention_mask {tuple(ids.shape)}", tuple(shown.shape), remedy)
        require(bool(shown.any()), where, "tokens in every batch", f"{tuple(ids.shape)}, all padding", remedy)
        found.append(Batch(ids.long().cpu(), shown.cpu()))
    require(bool(found), where, "at least one batch", "none", remedy)
    return found


def check_head(where: str, model: PreTrainedModel) -> None:
    """Raises unless a model has logits."""
    fits = model.get_output_embeddings() is not None
    require(fits, where, "a model with a head for language modelling", type(model).__name__, "Pass the whole model.")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; afterwards the model is what it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True


@contextmanager
def transformed(model: PreTrainedModel, transform: Transform) -> Iterator[None]:
    """Attention by "singlepass", which attends to what ``transform`` makes of the number of a layer, its keys and its
    values; afterwards the model is what it was."""
    configs: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]  # parts have their own
    before = {id(c): (c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")}
    hooked = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    model.set_attn_implementation(NAME)
    try:
        for module in hooked:
            setattr(module, TRANSFORM, partial(transform, int(module.layer_idx)))
        yield
    finally:
        for module in hooked:
            delattr(module, TRANSFORM)
        for config, implementation in before.values():
            config._attn_implementation = implementation
