# SPDX-License-Identifier: Apache-2.0
"""Recorded launches by the names of their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recorded:
    launches: list[Any]

    def __getitem__(self, name: str) -> list[Any]:
        return self.by_kernel().get(name, [])

    def by_kernel(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for launch in self.launches:
            found.setdefault(launch.kernel.__name__, []).append(launch)
        return found
