# SPDX-License-Identifier: Apache-2.0
"""Options, tiers and fixtures that the tests of all families share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from singlepass._ops import op

from .ranks import Ranks
from .report import UNCOLLECTED, Report
from .simt.build import sample
from .simt.ops import in_place_of_native

# Drawing tensors is slow by hypothesis's standards, and the time of an example says nothing on a shared machine.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("short", _PATIENT, max_examples=25, derandomize=True, database=None)
settings.register_profile("long", _PATIENT, max_examples=1000)  # make test-deep
settings.load_profile("short")

TESTS = Path(__file__).parent
REASONED = ("deep", "release", "slow")  # markers that say why


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wheel", type=Path, help="a wheel for tests/packaging, which else build one of the tree")
    parser.addoption("--require-gpu", action="store_true", help="tests that need a GPU fail where there is none")


class Doctests:
    """Those of modules whose package is missing are left out, as the tests of these modules are; and what tests share
    has none: looking for them would import in every worker what one test imports in a process of its own. Not a hook of
    this file itself, which would be asked about tests/ alone."""

    @staticmethod
    def pytest_ignore_collect(collection_path: Path) -> bool | None:
        if collection_path.suffix == ".py" and collection_path.is_relative_to(TESTS):
            return True if not collection_path.name.startswith("test_") else None
        parts = collection_path.parts[-3:]
        needs_transformers = parts[:2] == ("singlepass", "kv") and parts[-1].startswith("_hf")
        needs_timm = parts == ("singlepass", "optim", "_timm.py")
        needed = "transformers" if needs_transformers else "timm" if needs_timm else ""
        return True if needed and find_spec(needed) is None else None


class Sample:
    """Leaves out cases where the environment asks for that."""

    @staticmethod
    @pytest.hookimpl(trylast=True)  # what -k leaves
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        items[:] = sample(items)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[UNCOLLECTED] = 0
    config.pluginmanager.register(Report(config))
    config.pluginmanager.register(Doctests())
    config.pluginmanager.register(Sample())
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers share the cores already


def _gpu_cases_wanted(config: pytest.Config) -> bool:
    return torch.cuda.is_available() or config.getoption("--require-gpu") or "gpu" in config.getoption("markexpr")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parameters that need a GPU are left out, and the cases that they would make counted, where there is none."""
    if _gpu_cases_wanted(metafunc.config):
        return
    parametrize, cases, kept = metafunc.parametrize, 1, 1

    def without_gpu(names: Any, values: Any, *args: Any, **options: Any) -> None:
        nonlocal cases, kept
        values = list(values)
        others = [v for v in values if all(mark.name != "gpu" for mark in getattr(v, "marks", ()))] or values
        metafunc.config.stash[UNCOLLECTED] += (cases * len(values) - kept * len(others)) - (cases - kept)
        cases, kept = cases * len(values), kept * len(others)
        parametrize(names, others, *args, **options)

    metafunc.parametrize = without_gpu


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers():
            if mark.name in REASONED and not mark.args:
                raise pytest.UsageError(f"{item.nodeid}: expected a reason in @pytest.mark.{mark.name}; got none.")
        if item.get_closest_marker("inductor") and " " in torch.__file__:
            item.add_marker(pytest.mark.skip("torch.compile cannot compile C++ where the path to torch has a space"))
        # What is made once a process, what measures the process, and what fills the memory, stays together.
        alone = item.get_closest_marker("serial") or item.get_closest_marker("large")
        if alone or "wheel" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("serial"))
    if not _gpu_cases_wanted(config):
        on_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.stash[UNCOLLECTED] += len(on_gpu)
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("--require-gpu: torch sees no NVIDIA GPU", pytrace=False)
    pytest.skip("torch sees no NVIDIA GPU")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Each test draws the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _automatic_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests choose backends by argument; what the shell has set must not choose for them."""
    monkeypatch.setattr(op, "WISH", None)


@pytest.fixture
def wish(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses a backend, as the environment variable does that is read at the import."""
    return lambda backend: monkeypatch.setattr(op, "WISH", backend)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile knows nothing of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _simt_places(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a test's place says so, native kernels are those of GPUs, run on the CPU."""
    place = getattr(request.node, "callspec", None) and request.node.callspec.params.get("place")
    with in_place_of_native() if getattr(place, "simt", False) else nullcontext():
        yield


_started: dict[int, Ranks] = {}


@pytest.fixture(scope="session")
def ranks() -> Callable[[int], Ranks]:
    """The processes of tests on several ranks, by their number."""
    return lambda size: _started.setdefault(size, Ranks(size))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends processes after the last test in a row that needs them: the threads of their groups never sleep."""
    if nextitem is None or nextitem.get_closest_marker("xdist_group") != item.get_closest_marker("xdist_group"):
        for some in _started.values():
            some.stop()
