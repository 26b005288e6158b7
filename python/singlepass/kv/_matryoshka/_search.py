# SPDX-License-Identifier: Apache-2.0
"""Which heads can do with fewer directions than others."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm  # comes with transformers
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.modeling_utils import PreTrainedModel

from ..._errors import require
from .._hf_cache import compressed_kinds
from ._bases import STEP, MatryoshkaBases, Ranks, check_budget, key_of, text_config
from ._hooks import Batch, check_head, checked_batches, evaluating, transformed
from ._train import divergence, truncate

_OP = "search_ranks"


class Entry(NamedTuple):
    """One head's keys (0) or values (1)."""

    layer: int
    kind: int
    head: int


def search_ranks(
    model: PreTrainedModel,
    bases: MatryoshkaBases,
    batches: Iterable[Tensor | dict[str, Tensor]],
    budget: float,
    *,
    per_round: int = 1,
    compress_sliding: bool = False,
    progress: bool = True,
) -> MatryoshkaBases:
    """Finds ranks for a budget, separate ones for each layer and head, and for keys and values.

    All start at full rank, or at the ranks of the next larger budget that the bases hold. Again and again 16 directions
    are taken from where that costs least: where the divergence from the uncompressed model, on some texts, grows least.
    What that is for one head changes as others shrink, so it is measured again before a head is chosen, but only for
    heads that come first by what is known.

    It costs a forward pass over all batches for each head's keys and values, and one or more for each 16 directions to
    be taken; how long that takes at least is shown first.

    Args:
        model: the model that ``bases`` were fitted for.
        bases: what :func:`fit_matryoshka` gave.
        batches: as for :func:`fit_matryoshka`; some hundred tokens are enough. Logits for all of them are kept.
        budget: fraction of the ranks of keys and values to keep, together.
        per_round: after how many removals the measured cost of a head is stale; 1, as in the paper, is slowest and most
            careful.
        compress_sliding: whether layers with sliding windows get ranks too, as a :class:`MatryoshkaCache` with this
            option needs. Otherwise the budget is that of the full-attention layers.
        progress: whether to show costs, and a progress bar.

    Returns:
        MatryoshkaBases: the same bases, which hold the ranks for this budget too.

    Raises:
        ValueError: bases of another model, a budget out of (0, 1] or too small, wrong batches.

    Source: Lin et al., "MatryoshkaKV", arXiv 2410.14731, algorithm 1, where every head is measured again each time.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from singlepass.kv import fit_matryoshka, search_ranks
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        ...                      num_key_value_heads=1, head_dim=32, vocab_size=32)
        >>> model, texts = LlamaForCausalLM(config), [torch.arange(32)[None]]
        >>> bases = fit_matryoshka(model, texts, progress=False)
        >>> ranks = search_ranks(model, bases, texts, budget=0.75, progress=False).ranks_of(0.75)
        >>> sum(int(r.sum()) for r in ranks[0])  # of 32 for keys and 32 for values
        48
    """
    found = checked_batches(_OP, batches)
    check_budget(_OP, budget)
    fits = isinstance(per_round, int) and per_round >= 1
    require(fits, _OP, "per_round as a whole number, 1 or more", repr(per_round), "1 measures most.")
    check_head(_OP, model)
    bases.check_model(_OP, model)
    larger = [other for other in bases.ranks if other > key_of(budget)]
    with evaluating(model):
        kinds = compressed_kinds(compress_sliding)
        search = _Search(model, bases, found, kinds, bases.ranks[min(larger)] if larger else None)
        least = STEP * search.entries / search.total
        contract = f"a budget of {least} or more, which leaves each head 16 directions"
        require(budget >= least, _OP, contract, budget, "Pass a larger one.")
        ranks = search.run(int(budget * search.total + 1e-6), per_round, progress)
    return replace(bases, ranks=dict(sorted({**bases.ranks, key_of(budget): ranks}.items())))


class _Search:
    """The ranks so far, and what they cost."""

    def __init__(
        self,
        model: PreTrainedModel,
        bases: MatryoshkaBases,
        batches: list[Batch],
        compressed: set[str],
        start: Mapping[int, Ranks] | None = None,
    ):
        device = next(model.parameters()).device
        self._model, self._batches = model, batches
        kinds, _ = get_layer_types_and_kwargs(text_config(model))
        layers = [layer for layer in bases.keys if kinds[layer] in compressed]
        contract, got = f"a layer of {' or '.join(sorted(compressed))}", f"only {sorted(set(kinds))}"
        require(bool(layers), _OP, contract, got, "Pass compress_sliding=True, or choose another model.")
        pairs = {layer: (bases.keys[layer], bases.values[layer]) for layer in layers}
        self._bases = {layer: [u.to(device) for u in pair] for layer, pair in pairs.items()}
        self.ranks = {
            layer: [torch.full((len(u),), u.shape[1], device="cpu") for u in pair] for layer, pair in pairs.items()
        }
        self.entries = sum(len(u) for pair in pairs.values() for u in pair)
        self.total = self.kept
        if start is not None and set(pairs) <= set(start):
            self.ranks = {layer: [its.clone() for its in start[layer]] for layer in pairs}
        with torch.no_grad():
            self._want = [self._logits(batch) for batch in batches]

    @property
    def kept(self) -> int:
        """Directions, of all heads together."""
        return sum(int(its.sum()) for pair in self.ranks.values() for its in pair)

    def _logits(self, batch: Batch) -> Tensor:
        logits = self._model(**batch.inputs(self._model), use_cache=False).logits
        return logits[batch.shown.to(logits.device)]

    def _truncate(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.ranks:
            return k, v
        out = []
        for x, u, ranks in zip((k, v), self._bases[layer], self.ranks[layer], strict=True):
            whole = bool((ranks == u.shape[1]).all())
            mask = torch.arange(u.shape[1], device="cpu") < ranks[:, None]
            out.append(x if whole else truncate(x, u, mask))
        return out[0], out[1]

    @torch.no_grad()
    def divergence(self) -> float:
        """From the uncompressed model, the mean over all tokens."""
        total, tokens = 0.0, 0
        with transformed(self._model, self._truncate):
            for batch, want in zip(self._batches, self._want, strict=True):
                total += float(divergence(want, self._logits(batch))) * len(want)
                tokens += len(want)
        return total / tokens

    def _cost(self, entry: Entry, now: float) -> float:
        """What it costs to take 16 directions from a head, where the divergence is ``now``."""
        self.ranks[entry.layer][entry.kind][entry.head] -= STEP
        cost = self.divergence() - now
        self.ranks[entry.layer][entry.kind][entry.head] += STEP
        return cost

    def run(self, target: int, per_round: int, progress: bool) -> dict[int, Ranks]:
        """Takes directions until no more than ``target`` are kept."""
        begin, now = time.monotonic(), self.divergence()
        seconds = time.monotonic() - begin
        entries = [
            Entry(layer, kind, head)
            for layer, pair in self.ranks.items()
            for kind, its in enumerate(pair)
            for head in range(len(its))
        ]
        to_take = max(-(-(self.kept - target) // STEP), 0)
        passes = len(entries) + to_take
        if progress:
            tqdm.write(
                f"{_OP}: {passes} passes or more of {seconds:.2g} s: {passes * seconds / 60:.2g} minutes or more"
            )
        known: list[tuple[float, int, Entry]] = []
        for entry in tqdm(entries, "what heads cost", disable=not progress, unit="head"):
            if self._can_give(entry):
                heapq.heappush(known, (self._cost(entry, now), 0, entry))
        for taken in tqdm(range(to_take), "taking directions", disable=not progress, unit="step"):
            while True:
                cost, measured, entry = heapq.heappop(known)
                if taken - measured < per_round:
                    break
                heapq.heappush(known, (self._cost(entry, now), taken, entry))
            self.ranks[entry.layer][entry.kind][entry.head] -= STEP
            now = self.divergence() if taken - measured else now + cost
            if self._can_give(entry):
                heapq.heappush(known, (self._cost(entry, now), taken + 1, entry))
        return {layer: Ranks(*pair) for layer, pair in self.ranks.items()}

    def _can_give(self, entry: Entry) -> bool:
        return int(self.ranks[entry.layer][entry.kind][entry.head]) > STEP
