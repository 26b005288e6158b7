# SPDX-License-Identifier: Apache-2.0
"""What makes the interpreter quick enough: small chunks, and Triton's language patched once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tiles then make several chunks."""
    from singlepass.triton_kernels import _table, grad_norm, optim

    monkeypatch.setattr(_table, "CHUNK", 2 * _table.BLOCK)
    monkeypatch.setattr(optim._buckets, "_entries", OrderedDict())
    monkeypatch.setattr(grad_norm._plans, "_entries", OrderedDict())


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """Calling a device function patches the language again, although its launch has: that takes most of the time."""
    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
