# SPDX-License-Identifier: Apache-2.0
"""Arguments of ops. Each family's ``samples.py`` gives some for each of its ops, and tests/test_ops.py uses them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from singlepass._ops import Op


@dataclass(frozen=True)
class Sample:
    op: Op
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> Sample:
        return replace(self, arguments=tree_map_only(Tensor, lambda t: t.to(device), self.arguments))
