# SPDX-License-Identifier: Apache-2.0
"""The locks, and how make sets an environment up from them: what is missing is said in one line."""

from __future__ import annotations

import json
import re
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from .tool import tool

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
VersionInfo = namedtuple("VersionInfo", "major minor micro releaselevel serial")

each_python = pytest.mark.parametrize("python", PYTHONS)


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "locks" / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert found
    assert all(found), "expected name==version on each line"
    return {match[1]: match[2] for match in found if match}


def needed(name: str, python: str) -> list[Requirement]:
    """What an extra or a group names, and the extras and groups in it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{name} = (\[.*?\]$)", text, re.M | re.S)
    assert listed is not None
    found = [r for group in re.findall(r'\{include-group = "([^"]+)"\}', listed[1]) for r in needed(group, python)]
    for item in map(Requirement, re.findall(r'"([^"]+)"', re.sub(r"\{.*?\}", "", listed[1]))):
        if item.marker is not None and not item.marker.evaluate({"python_version": python}):
            continue
        found += [r for e in item.extras for r in needed(e, python)] if item.name == "singlepass" else [item]
    return found


@each_python
@pytest.mark.parametrize("kind", ["dev", "bench", "docs"])
def test_locks_hold_what_is_named(python: str, kind: str) -> None:
    lock = pins(f"{'' if kind == 'dev' else f'{kind}-'}py{python.replace('.', '')}.txt")
    for requirement in [*needed(kind, python), *map(Requirement, ("setuptools>=77", "ninja", "numpy"))]:
        assert requirement.specifier.contains(lock[requirement.name]), requirement
    assert not [name for name in lock if re.match(r"torch$|nvidia-|cuda-|singlepass", name)]


@each_python
def test_bench_installs_a_part_of_what_tests_do(python: str) -> None:
    bench, dev = (pins(f"{kind}py{python.replace('.', '')}.txt") for kind in ("bench-", ""))
    assert bench.items() < dev.items()
    assert not set(bench) & {"pytest", "mypy", "ruff", "clang-format", "cmake", "hypothesis", "uv", "triton"}


@each_python
def test_documentation_is_built_beside_tests_and_not_for_them(python: str) -> None:
    docs, dev = (pins(f"{kind}py{python.replace('.', '')}.txt") for kind in ("docs-", ""))
    assert not [name for name in docs.keys() & dev.keys() if docs[name] != dev[name]]
    assert not {"furo", "myst-parser", "sphinx"} & dev.keys()


def test_what_users_can_choose_needs_no_group(root: Path) -> None:
    """Extras are published with the package, groups are not."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert re.findall(r"^(\w+) = ", extras, re.M) == ["bench", "examples", "fit", "kv", "smollm2"]


def test_newer_releases_of_what_tests_need_are_put_to_tests_that_are_there(root: Path) -> None:
    newest = tool("newest")
    assert newest.needed() == {r.name for python in PYTHONS for r in needed("test", python)}
    assert newest.needed() <= newest.TESTS.keys()
    assert not [test for tests in newest.TESTS.values() for test in tests if not (root / test).exists()]


@pytest.fixture
def environment() -> ModuleType:
    return tool("environment")


def test_every_python_that_is_let_in_has_locks(environment: ModuleType) -> None:
    (_, first), (_, last) = environment.PYTHONS
    assert tuple(f"3.{minor}" for minor in range(first, last + 1)) == PYTHONS


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0)])
def test_another_python_is_refused(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(sys, "version_info", VersionInfo(*version, "final", 0))
    got = ".".join(map(str, version))
    with pytest.raises(
        SystemExit, match=rf"make: expected Python 3\.10 to 3\.13; got {got} .* make PYTHON=python3\.11"
    ):
        environment.check("torch==2.13.0")


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_refused(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else object())
    with pytest.raises(SystemExit, match=rf"make: expected Python's module {module}; got none in .*apt install"):
        environment.check("torch==2.13.0")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("platform", "darwin", "expected Linux; got darwin. Use"),
        ("CXX", "no-such-compiler -O1", "expected a C++20 compiler; got no no-such-compiler. Install g++ 11"),
        ("TORCH", "torch==2.9.1", "expected a torch from 2.10 on; got TORCH=torch==2.9.1. Name"),
    ],
)
def test_a_machine_that_lacks_something(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    if name == "platform":
        monkeypatch.setattr(sys, "platform", value)
    if name == "CXX":
        monkeypatch.setenv("CXX", value)
    with pytest.raises(SystemExit, match=re.escape(message)):
        environment.check(value if name == "TORCH" else "torch==2.13.0")


def test_what_there_must_be_is_here(environment: ModuleType) -> None:
    environment.check("torch==2.13.0")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "  WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution",
            "make: expected an index of",
        ),
        (
            "  x did not run\n  singlepass: expected a compiler; got none. Set CXX.\n  note: pip",
            "singlepass: expected a c",
        ),
        ("ERROR: something else", "ERROR: something else\nmake: expected pip install x to succeed"),
    ],
)
def test_why_pip_failed(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, message: str) -> None:
    here = environment.Environment("nowhere")
    monkeypatch.setattr(here, "run", lambda *arguments: (1, output))
    with pytest.raises(SystemExit, match="^" + re.escape(message)):
        here.pip("install", "x")


def test_an_environment_of_another_python_is_not_overwritten(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment.Environment(".venv")
    monkeypatch.setattr(here, "exists", lambda: True)
    monkeypatch.setattr(here, "run", lambda *arguments: (0, "3 9\n"))
    with pytest.raises(
        SystemExit, match=r"expected Python 3\.\d+ in \.venv; got 3\.9\. Remove \.venv, or name another"
    ):
        here.create()


def test_what_torch_pins_is_left_to_it(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    here, ran = environment.Environment("nowhere"), []
    requires = json.dumps(["triton==3.8.0; platform_system == 'Linux'", "sympy>=1.13"])
    monkeypatch.setattr(here, "run", lambda *arguments: ran.append(arguments) or (0, requires))
    here.install("torch==2.14.1", "dev")
    assert ran[0][-1] == "torch==2.14.1"
    installed = {pin.split("==")[0] for pin in ran[-1] if "==" in pin}
    assert "triton" not in installed
    assert {"numpy", "pytest"} <= installed


@pytest.mark.parametrize(
    ("cpus", "gibibytes", "memberships", "files", "jobs"),
    [
        (64, 512, "", {}, 64),
        (8, 4, "", {}, 2),
        (2, 1, "", {}, 1),
        (64, 512, "0::/outer/inner", {"outer/inner/cpu.max": "max 100000", "outer/memory.max": "max"}, 64),
        (64, 512, "0::/outer/inner", {"outer/cpu.max": "200000 100000"}, 2),
        (64, 512, "0::/outer/inner", {"outer/cpu.max": "400000 100000", "outer/inner/cpu.max": "50000 100000"}, 1),
        (8, 64, "0::/outer/inner", {"outer/inner/memory.max": str(4 << 30)}, 2),
        (8, 64, "0::/not/seen/here", {"memory.max": str(4 << 30)}, 2),
        (
            64,
            512,
            "9:cpu,cpuacct:/outer/inner\n4:memory:/outer/inner\n0::/",
            {
                "cpu/outer/inner/cpu.cfs_quota_us": "-1",
                "cpu/outer/inner/cpu.cfs_period_us": "100000",
                "memory/outer/memory.limit_in_bytes": "9223372036854771712",
            },
            64,
        ),
        (
            64,
            512,
            "9:cpu,cpuacct:/outer/inner",
            {"cpu/outer/cpu.cfs_quota_us": "300000", "cpu/outer/cpu.cfs_period_us": "100000"},
            3,
        ),
        (8, 64, "4:memory:/outer/inner", {"memory/outer/inner/memory.limit_in_bytes": str(4 << 30)}, 2),
        (8, 64, "4:memory:/not/seen/here", {"memory/memory.limit_in_bytes": str(4 << 30)}, 2),
        (8, 64, "4:memory:/outer", {"cpu/outer/memory.limit_in_bytes": str(4 << 30)}, 8),
    ],
)
def test_as_many_jobs_as_the_machine_allows(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cpus: int,
    gibibytes: int,
    memberships: str,
    files: dict[str, str],
    jobs: int,
) -> None:
    monkeypatch.setattr(environment, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(environment, "MEMBERSHIPS", tmp_path / "memberships")
    (tmp_path / "memberships").write_text(memberships)
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cpus))
    monkeypatch.setattr(
        "os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (gibibytes << 30) // 4096}[name]
    )
    assert environment.jobs() == jobs
