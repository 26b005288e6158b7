# SPDX-License-Identifier: Apache-2.0
"""Attention over what a low-rank layer holds."""

from __future__ import annotations

from torch import Tensor

from ..._errors import message, require
from .._checks import check_needs_no_gradient, check_queries, check_sinks
from .._modes import lasting
from .._steps import check_step
from ._groups import Rotary, check_rotary
from ._tokens import GroupedTokens

_OP = "MatryoshkaLayer"


class GroupedAttention(GroupedTokens):
    """The attention of a :class:`MatryoshkaLayer`."""

    @lasting
    def attend(self, q: Tensor, *, sinks: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        """Attention of the newest tokens' queries over all cached tokens, computed on projected vectors.

        Args:
            q: (batch, query heads, queries, channels). The last query belongs to the last token; with ``bits``, the
                tokens of all queries must not be quantised yet.
            sinks: float32 (query heads,), the logit of an attention sink for each head, or None.
            rotary: as for :meth:`append`, of the queries' tokens.

        Returns:
            Tensor: (batch, query heads, queries, value channels), q's dtype.

        Raises:
            ValueError: an empty cache, invalid shapes or options, or a tensor that requires gradients.
        """
        k, _ = self._check_held()
        sinks = self._check_queries(q, k, sinks)
        if self._planned:
            check_step(_OP, q.shape[2], self._planned, None)
        elif q.shape[2] > 1:
            most = max(self.window_length, 1)
            remedy = "Pass longer pieces to prefill, which adds and attends by itself."
            require(q.shape[2] <= most, _OP, f"at most {most} queries, of the newest tokens", q.shape[2], remedy)
        return self._attend(q, sinks, check_rotary(_OP, rotary, q))

    def _check_queries(self, q: Tensor, k: Tensor, sinks: Tensor | None) -> Tensor | None:
        """The sinks, as kernels take them. Raises unless they and the queries go with such keys."""
        check_queries(_OP, q, k)
        check_needs_no_gradient(_OP, q=q)
        if q.dtype != k.dtype:
            raise ValueError(message(_OP, f"q of {k.dtype}, as the keys", q.dtype, "Convert it."))
        return check_sinks(_OP, sinks, q)

    def _attend(self, q: Tensor, sinks: Tensor | None, rotary: Rotary | None) -> Tensor:
        """The same, of queries that were checked."""
        k, v = self._check_held()
        outs = []
        for group, its in zip(self._groups_for(k, v), self._project_queries(q, rotary), strict=True):
            its_sinks = None if sinks is None else group.queries_of(sinks, k.shape[1])
            outs.append(group.inner.attend_checked(its, sinks=its_sinks, own=True))
        return self._projections[1].back(outs, self.backend)
