# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest


@pytest.mark.serial
def test_serial_tests_run_on_one_worker(request: pytest.FixtureRequest) -> None:
    """xdist names the group that it keeps together; a conftest that marks tests too late leaves it out."""
    shared = "PYTEST_XDIST_WORKER" in os.environ and request.config.getoption("loadgroup", False)
    assert request.node.nodeid.endswith("@serial") == shared
