# SPDX-License-Identifier: Apache-2.0
"""Options and fixtures that the tests of all families share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# Drawing tensors is slow by hypothesis's standards, and the time of an example says nothing on a shared machine.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("short", _PATIENT, max_examples=25, derandomize=True, database=None)
settings.register_profile("long", _PATIENT, max_examples=2000)  # pytest --hypothesis-profile=long
settings.load_profile("short")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="tests that need a GPU fail where there is none")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("--require-gpu: torch sees no NVIDIA GPU", pytrace=False)
    pytest.skip("torch sees no NVIDIA GPU")


@pytest.fixture(autouse=True)
def _automatic_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests choose backends by argument; what the shell has set must not choose for them."""
    monkeypatch.delenv("SINGLEPASS_BACKEND", raising=False)
