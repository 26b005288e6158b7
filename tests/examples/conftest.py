# SPDX-License-Identifier: Apache-2.0
"""Examples as modules, imported as Python runs them: with their own folder on the path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load_example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    loaded = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield load
    torch.set_num_threads(threads)
    for name in (*loaded, *(path.stem for path in FOLDER.glob("_*.py"))):
        sys.modules.pop(name, None)
