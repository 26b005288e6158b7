# SPDX-License-Identifier: Apache-2.0
"""Bases of a model's keys and values: principal components, which training can improve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm  # comes with transformers
from transformers.modeling_utils import PreTrainedModel

from ..._errors import require
from .._modes import lasting
from ._bases import MARK, STEP, MatryoshkaBases, describe, sample_of, text_config
from ._hooks import Batch, check_head, checked_batches, evaluating, transformed
from ._train import check_checkpoint, train

_OP = "fit_matryoshka"


@lasting
def fit_matryoshka(
    model: PreTrainedModel,
    batches: Iterable[Tensor | dict[str, Tensor]],
    steps: int = 0,
    *,
    lr: float = 2e-3,
    distill: float = 0.25,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    gradient_checkpointing: bool = False,
    progress: bool = True,
) -> MatryoshkaBases:
    """Finds bases of a model's keys and values for a :class:`MatryoshkaCache`.

    With ``steps=0`` they are principal components of what the model computes for some texts, for each layer and KV
    head, keys after rotary embedding. Second moments are summed in float64, batch by batch; nothing else is kept. No
    mean is subtracted: attention to keys without their mean would need it back under softcap and sinks, and a model
    with an attention sink loses more if it is subtracted.

    More steps train them from there: in each, every head keeps a random number of its directions, and the bases learn
    to lose little by that. The model's weights stay.

    Args:
        model: a decoder-only model of Transformers.
        batches: token ids (batch, tokens), or dictionaries with ``input_ids`` and ``attention_mask``, whose padding is
            not counted. Some thousand tokens of the texts that the model will see are enough for principal components,
            if the texts are as long as contexts will be: later keys are rotated into other directions.
            Each step of training takes one batch, in their order, again and again.
        steps: of training.
        lr: learning rate, which rises in the first twentieth of the steps, and falls to a tenth in the end.
        distill: weight of the divergence from the uncompressed model; the rest is that of the loss of language
            modelling.
        optimizer: makes an optimizer for a list of parameters; None: :class:`singlepass.optim.AdamW`.
        seed: of the random ranks.
        checkpoint: a file in which training is saved every 20 steps, and from which it goes on if it is there.
        gradient_checkpointing: whether layers are computed again for the backward pass, which saves memory.
        progress: whether to show progress bars.

    Returns:
        MatryoshkaBases: of float32, on the CPU.

    Raises:
        ValueError: no batches, fewer tokens than channels of a head, NaN in keys or values or in the loss, options out
            of range, a checkpoint of another training, a model whose attention implementation can't be replaced. The
            model is unchanged.

    Source: Lin et al., "MatryoshkaKV", arXiv 2410.14731. Bases belong to KV heads, not to query heads.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from singlepass.kv import fit_matryoshka
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=32, vocab_size=32)
        >>> texts = [torch.randint(0, 32, (2, 50)) for _ in range(4)]
        >>> fit_matryoshka(LlamaForCausalLM(config), texts, steps=2, progress=False).keys[0].shape
        torch.Size([2, 32, 32])
    """
    found = checked_batches(_OP, batches)
    fits = isinstance(steps, int) and steps >= 0
    require(fits, _OP, "steps as a whole number, 0 or more", repr(steps), "0: principal components.")
    fits = isinstance(lr, (int, float)) and 0.0 < lr < float("inf")
    require(fits, _OP, "an lr over 0", repr(lr), "Leave it out for the default.")
    fits = isinstance(distill, (int, float)) and 0.0 <= distill <= 1.0
    require(fits, _OP, "distill from 0 to 1", repr(distill), "It is a weight.")
    if steps:
        check_head(_OP, model)
    folded = getattr(text_config(model), MARK, None) is not None
    require(not folded, _OP, "a model whose values are not folded", "a folded one", "Fit before you fold.")
    check_checkpoint(checkpoint)
    moments = _moments(model, found, progress)
    bases = {layer: [_principal(x) for x in pair] for layer, pair in moments.items()}
    if steps:
        options: dict[str, Any] = {"lr": lr, "distill": distill, "optimizer": optimizer, "seed": seed}
        options |= {"path": checkpoint, "gradient_checkpointing": gradient_checkpointing, "progress": progress}
        bases = train(model, bases, found, steps, **options)
    keys, values = ({layer: pair[i] for layer, pair in bases.items()} for i in (0, 1))
    return MatryoshkaBases(keys, values, describe(model.config), sample_of(model))


def _moments(model: PreTrainedModel, batches: list[Batch], progress: bool) -> dict[int, list[Tensor]]:
    """Sums of x x^T over all tokens, float64 (heads, channels, channels), of keys and values x of each layer."""
    sums: dict[int, list[Tensor]] = {}
    tokens = 0

    def record(shown: Tensor, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for i, x in enumerate((k, v)):
            rows = x.detach().transpose(0, 1)[:, shown.to(x.device)].double()  # (heads, tokens, channels)
            square = rows.mT @ rows
            its = sums.setdefault(layer, [])
            if len(its) == i:
                its.append(square)
            else:
                its[i] += square
        return k, v

    with torch.no_grad(), evaluating(model):
        for batch in tqdm(batches, "moments of keys and values", disable=not progress, unit="batch"):
            shown = batch.shown
            with transformed(model, partial(record, shown)):
                model.base_model(**batch.inputs(model), use_cache=False)
            tokens += int(shown.sum())
    remedy = "Choose another model." if tokens else "Pass some."
    require(bool(sums), _OP, "a model whose attention can be exchanged", type(model).__name__, remedy)
    most = max(x.shape[1] for its in sums.values() for x in its)
    require(tokens >= most, _OP, f"at least {most} tokens, as channels of a head", tokens, "Pass more texts.")
    for layer, its in sums.items():
        for name, x in zip(("keys", "values"), its, strict=True):
            whole = bool(x.isfinite().all())
            require(whole, _OP, f"finite {name} in layer {layer}", "others", "Check the model's dtype and weights.")
            fits = x.shape[1] % STEP == 0
            contract = f"{name} of 16, 32, ... channels in layer {layer}"
            require(fits, _OP, contract, x.shape[1], "Leave this model to transformers' own caches.")
    return dict(sorted(sums.items()))


def _principal(moments: Tensor) -> Tensor:
    """Orthonormal directions in the columns, those of most energy first, float32 on the CPU."""
    return torch.linalg.eigh(moments.cpu()).eigenvectors.flip(-1).float().contiguous()
