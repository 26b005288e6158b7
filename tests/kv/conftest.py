# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the KV cache's tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from ..triton.interpreter import patched_once
from .inputs import INTERPRETED

if importlib.util.find_spec("transformers") is None:
    collect_ignore = ["models.py"]  # which doctest would import


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small here, and threads that wait for each other are slow on a machine that others use. Tests of
    threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def each_thread_count() -> tuple[int, ...]:
    """Numbers of threads to set; the one before comes back after the test."""
    return (1, 2, 3)


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> Iterator[None]:
    with patched_once() if INTERPRETED else nullcontext():
        yield
