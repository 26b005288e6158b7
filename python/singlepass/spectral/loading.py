# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .._errors import require
from ..optim._loading import Loading
from .schedule import Progress

if TYPE_CHECKING:
    from .optimizer import SST


class SSTLoading(Loading):
    """Takes along where training stands, and checks that it stands there with the same active vectors."""

    optimizer: SST
    progress: Progress

    def before(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        progress = dict(state_dict.get("sst", {}))
        active = progress.pop("active", None)
        fits = active is not None and set(progress) == set(self.optimizer.progress.as_dict())
        require(fits, "SST", "a state dict of SST", f"one with {', '.join(state_dict)}", "Load SST's own.")
        self.progress = Progress(**progress)
        self.optimizer._refresh()
        now = self.optimizer._signature()
        same = len(now) == len(active) and all(
            math.isclose(a, b, rel_tol=1e-5) for a, b in zip(now, active, strict=True)
        )
        remedy = "Make the optimizer, which draws vectors, then load the model's state dict, then this."
        require(same, "SST", "a model with the same active vectors as the saved one", "others", remedy)
        return super().before(optimizer, state_dict)

    def after(self, optimizer: Any) -> None:
        super().after(optimizer)
        self.optimizer.progress = self.progress
