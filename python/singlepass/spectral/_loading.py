# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._errors import require
from ..optim._loading import Loading
from ._schedule import Progress

if TYPE_CHECKING:
    from ._optimizer import SST


class SSTLoading(Loading):
    """Takes along where training stands, and checks that it stands there with the same active vectors."""

    optimizer: SST
    progress: Progress

    def before(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        progress = state_dict.get("sst")
        progress = dict(progress) if isinstance(progress, Mapping) else {}
        active = progress.pop("active", None)
        fits = isinstance(active, (list, tuple)) and set(progress) == set(self.optimizer.progress.as_dict())
        got = f"one with {', '.join(key for key in state_dict if fits or key != 'sst')}"
        require(fits, "SST", "a state dict of SST", got, "Load SST's own.")
        self.progress = Progress(**progress)
        self.optimizer._refresh()
        now = self.optimizer._signature()
        same = len(now) == len(active) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(now, active, strict=True)
        )
        remedy = "Make the optimizer, which draws vectors, then load the model's state dict, then this."
        require(same, "SST", "a model with the same active vectors as the saved one", "others", remedy)
        return super().before(state_dict)

    def after(self) -> None:
        super().after()
        self.optimizer.progress = self.progress
