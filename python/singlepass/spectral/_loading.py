# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .._errors import require
from ..optim._loading import Loading
from ._schedule import PROGRESS, Progress

if TYPE_CHECKING:
    from ._optimizer import SST


class SSTLoading(Loading):
    """Takes along where training stands."""

    optimizer: SST
    progress: Progress

    def before(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        found = [group.get(PROGRESS) for group in state_dict["param_groups"]]
        counts: Any = found[0] if found else None
        fits = isinstance(counts, (list, tuple)) and len(counts) == len(fields(Progress))
        fits = fits and all(isinstance(count, int) and count >= 0 for count in counts)
        require(fits, "SST", f"a state dict of SST, with {PROGRESS} in its groups", repr(counts), "Load SST's own.")
        self.progress = Progress(*counts)
        self.optimizer._refresh()
        return super().before(state_dict)

    def after(self) -> None:
        super().after()
        self.optimizer._take_up(self.progress)
