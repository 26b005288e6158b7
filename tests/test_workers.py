# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest


@pytest.mark.parametrize("mark", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("serial", "large")])
def test_serial_and_huge_tests_run_on_one_worker(request: pytest.FixtureRequest, mark: str) -> None:
    """xdist names the group that it keeps together; a conftest that marks tests too late leaves it out."""
    shared = "PYTEST_XDIST_WORKER" in os.environ and request.config.getoption("loadgroup", False)
    assert request.node.nodeid.endswith("@serial") == shared
