# SPDX-License-Identifier: Apache-2.0
"""How much attention tokens receive from probes, a few of the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._errors import require
from .._ops import kv as ops
from ._checks import check_exact, check_logits, check_needs_no_gradient, check_queries, check_tokens, dense
from ._functional import last_dense

__all__ = ["probe_saliency"]

NORMALIZATIONS = ("probe_nnz", "causal_nnz")


def probe_saliency(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    normalization: str = "probe_nnz",
    backend: str | None = None,
) -> Tensor:
    """Saliency of tokens: the mean attention that a token receives from the probe queries that can see it. No attention
    matrix is stored.

    Args:
        q: (batch, query heads, probes, channels), the probes' queries.
        k: (batch, heads, tokens, channels); heads divides query heads.
        positions: int64 (probes,), the index in k of each probe's own token; a probe sees the tokens up to it.
        mask: bool (batch, tokens), false for padding, or None.
        lse: float32 (batch, query heads, probes), the log-sum-exp of the logits of everything that a probe sees, if
            that is more than k; None: it sees only k.
        scale: of q @ k^T; None: channels^-0.5.
        softcap: logits s become softcap * tanh(s / softcap); 0: no soft-capping.
        normalization: "probe_nnz" divides by how many probes see a token (eq. 8 of the paper over the probes),
            "causal_nnz" by how many tokens of the whole sequence would see it (as the paper's code does).
        backend: "native", "triton" or "eager"; None selects one.

    Returns:
        Tensor: float32 (batch, heads, tokens), the mean over a head's query heads. Infinity for a token that no probe
        sees, of which nothing is known; 0 for padding.

    Raises:
        ValueError: invalid shapes, dtypes or options, or a tensor that requires gradients.

    Source: He et al., "ZipCache", arXiv 2405.14256, eq. 8 and section 4.3.

    Example:
        >>> import torch
        >>> from singlepass.kv import probe_saliency
        >>> q, k = torch.randn(1, 8, 2, 64), torch.randn(1, 2, 100, 64)
        >>> saliency = probe_saliency(q, k, torch.tensor([50, 99]))  # the queries of tokens 50 and 99
        >>> saliency.shape, bool((saliency.sort().values[..., -60:] > 0).all())
        (torch.Size([1, 2, 100]), True)
    """
    op = "probe_saliency"
    check_tokens(op, "k", k)
    check_queries(op, q, k)
    check_exact(op, "positions", positions, torch.int64, (q.shape[2],), k)
    if mask is not None:
        shape = (k.shape[0], k.shape[2])
        fits = mask.shape == shape and mask.dtype == torch.bool
        require(fits, op, f"a bool mask of shape {shape}", tuple(mask.shape), "True marks tokens.")
    check_exact(op, "lse", lse, torch.float32, tuple(q.shape[:3]), k)
    check_needs_no_gradient(op, q=q, k=k)
    check_logits(op, scale, softcap)
    known = normalization in NORMALIZATIONS
    require(known, op, " or ".join(NORMALIZATIONS), repr(normalization), "Choose one of them.")
    options: dict[str, Any] = {"mask": mask, "lse": lse, "scale": scale, "softcap": softcap, "backend": backend}
    return mean_attention(attention_sums(q, k, positions, **options), positions, mask, normalization)


def attention_sums(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The attention that tokens get from all probes together, float32 (batch, heads, tokens), the mean over the query
    heads of a head. Arguments are those of :func:`probe_saliency`, and were checked."""
    scale = k.shape[3] ** -0.5 if scale is None else scale
    tensors = last_dense(q), last_dense(k), positions.contiguous(), dense(mask), dense(lse)
    sums = ops.saliency(*tensors, scale=scale, softcap=float(softcap), backend=backend)
    return sums / (q.shape[1] // k.shape[1])


def mean_attention(sums: Tensor, positions: Tensor, mask: Tensor | None, normalization: str) -> Tensor:
    """What :func:`attention_sums` gave, over how many probes see a token or how many tokens of the sequence would."""
    length = sums.shape[2]
    valid = torch.ones(1, length, dtype=torch.int64, device=sums.device) if mask is None else mask.long()
    probes = torch.zeros_like(valid).index_add_(1, positions, valid[:, positions])
    seen = _from_here_on(probes)
    divisor = seen if normalization == "probe_nnz" else _from_here_on(valid)
    mean = torch.where(seen[:, None] > 0, sums / divisor[:, None], torch.inf)  # no evidence is not zero evidence
    return mean if mask is None else mean.masked_fill(~mask[:, None], 0.0)


def _from_here_on(counts: Tensor) -> Tensor:
    """The sum of each count (rows, tokens) and those after it."""
    return counts.flip(1).cumsum(1).flip(1)


def prompt_saliency(
    q: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    seen: Tensor | None,
    draw: Callable[[Iterable[int]], dict[int, Tensor]],
    normalization: str,
    **options: Any,
) -> Tensor:
    """Saliency of a prompt's tokens, (batch, heads, tokens), by probes among each sequence's own.

    Args:
        q: (batch, query heads, tokens, channels).
        keys: (batch, heads, all tokens, channels), the prompt's last.
        mask: bool (batch, tokens), false for the prompt's padding, or None.
        seen: bool (batch, all tokens) likewise.
        draw: gives for numbers of tokens where among them probes stand.
        normalization, **options: of :func:`probe_saliency`.
    """

    def saliency_of(q: Tensor, k: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        sums = attention_sums(q, k, positions, mask=seen, **options)
        return mean_attention(sums, positions, seen, normalization)[:, :, before:]

    (batch, _, tokens, _), before = q.shape, keys.shape[2] - q.shape[2]
    if mask is None:
        positions = draw([tokens])[tokens].to(q.device)
        return saliency_of(q[:, :, positions], keys, positions + before, seen)
    assert seen is not None
    saliency = torch.zeros((batch, keys.shape[1], tokens), dtype=torch.float32, device=q.device)
    paddings, of_sequence = mask.unique(dim=0, return_inverse=True)
    drawn = draw(paddings.sum(1).tolist())
    for i, padding in enumerate(paddings):
        own = padding.nonzero()[:, 0]
        if len(own) == 0:
            continue
        positions = own[drawn[len(own)].to(own.device)]
        rows = of_sequence.eq(i).nonzero()[:, 0]
        first, last = int(rows[0]), int(rows[-1])
        part = slice(first, last + 1) if last - first + 1 == len(rows) else rows  # neighbours are not copied
        saliency[part] = saliency_of(q[:, :, positions][part], keys[part], positions + before, seen[part])
    return saliency
