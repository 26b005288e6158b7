# SPDX-License-Identifier: Apache-2.0
"""What makes the interpreter quick enough: small chunks, and Triton's language patched once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..interpreter import patched_once


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tiles then make several chunks."""
    from singlepass.triton_kernels import _table
    from singlepass.triton_kernels.optim import grad_norm
    from singlepass.triton_kernels.optim import launchers as optim

    monkeypatch.setattr(_table, "CHUNK", 2 * _table.BLOCK)
    monkeypatch.setattr(optim._plans, "_entries", OrderedDict())
    monkeypatch.setattr(grad_norm._plans, "_entries", OrderedDict())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):  # NumPy warns of what masked lanes divide by
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> Iterator[None]:
    with patched_once():
        yield
