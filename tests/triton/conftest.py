# SPDX-License-Identifier: Apache-2.0
"""Triton decides when it is imported whether it compiles kernels or interprets them: ``interpreted/`` has a process of
its own, which ``test_interpreter.py`` starts."""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["interpreted", "test_[!i]*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore_glob = ["interpreted"]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """Launches of steps, norms and tables on CPU tensors, which nothing runs."""
    from singlepass.triton_kernels import _launch, _table
    from singlepass.triton_kernels.optim import grad_norm
    from singlepass.triton_kernels.optim import launchers as optim

    from .recorder import Recorder

    monkeypatch.setattr(_launch, "is_interpreted", lambda: True)
    monkeypatch.setattr(optim._plans, "_entries", OrderedDict())
    monkeypatch.setattr(grad_norm._plans, "_entries", OrderedDict())
    recorders = {}
    for module, name in ((optim, "step_kernel"), (grad_norm, "grad_norm_kernel"), (_table, "list_chunks_kernel")):
        recorders[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorders[name])
    return {name: recorder.launches for name, recorder in recorders.items()}
