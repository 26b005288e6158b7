# SPDX-License-Identifier: Apache-2.0
"""Triton decides when it is imported whether it compiles kernels or interprets them: ``interpreted/`` has a process of
its own, which ``test_interpreter.py`` starts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from .recorded import Recorded

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["interpreted", "test_[!i]*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore_glob = ["interpreted"]


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    """Launches on CPU tensors, which nothing runs."""
    from counting.triton.recorder import recording

    with recording() as launches:
        yield Recorded(launches)
