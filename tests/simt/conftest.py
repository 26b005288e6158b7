# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from .build import MODULE_FOLDER, build, module_path, sample


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "core" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow("the first one waits until the kernels are compiled for the CPU"))
    if MODULE_FOLDER in os.environ:  # then the project's settings, which do this, are not there
        items[:] = sample(items)


@pytest.fixture(scope="session")
def core() -> ModuleType:
    """The module singlepass_core: the CPU engine, and the CUDA launchers on the CPU."""
    folder = Path(os.environ[MODULE_FOLDER]) if MODULE_FOLDER in os.environ else build(sanitize=False)
    spec = importlib.util.spec_from_file_location("singlepass_core", module_path(folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
