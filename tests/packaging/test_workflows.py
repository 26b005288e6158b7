# SPDX-License-Identifier: Apache-2.0
"""The workflows of a forge: what they run is there, and what they may do is little. They run on the forge alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .tool import tool

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github" / "workflows").iterdir())
ELSEWHERE = {"git", "gh", "rm"}  # on every machine on which workflows run

Table = dict[str, Any]


def read(file: Path) -> Table:
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def steps(workflow: Table) -> Iterator[Table]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", ())


each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def test_there_is_one_for_tests_and_one_for_releases() -> None:
    assert [file.name for file in FILES] == ["ci.yml", "release.yml"]


@each_file
def test_what_it_runs_is_there(file: Path) -> None:
    rules = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in (step["run"] for step in steps(read(file)) if "run" in step):
        program, *arguments = shlex.split(command)
        if program == "make":
            target, *settings = arguments
            assert target in rules
            doors = [door.__name__ for door in tool("release").DOORS]
            assert all(setting.removeprefix("WITHOUT=") in doors for setting in settings)
        elif program not in ELSEWHERE:
            assert os.access(ROOT / program, os.X_OK), command


@each_file
def test_actions_of_others_are_pinned_to_a_commit_and_name_its_version(file: Path) -> None:
    used = re.findall(r"uses: (.*)", file.read_text(encoding="utf-8"))
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action).is_file()
            assert "workflow_call" in read(ROOT / action)[True]  # YAML 1.1 takes `on` for a truth value
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action)
    assert len(set(used)) == len({action.partition("@")[0] for action in used}), "expected one version of each action"


def test_nothing_is_published_that_was_not_tested_and_built_before() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    before = {name: job.get("needs") for name, job in workflow["jobs"].items()}
    assert before == {"test": None, "build": "test", "index": "build", "forge": "index"}


@each_file
def test_what_builds_may_write_nothing(file: Path) -> None:
    workflow, text = read(file), file.read_text(encoding="utf-8")
    assert workflow["permissions"] == {"contents": "read"}
    writing = {name for name, job in workflow["jobs"].items() if "write" in job.get("permissions", {}).values()}
    assert writing == ({"index", "forge"} if file.name == "release.yml" else set())
    for name in writing:
        assert not [step for step in workflow["jobs"][name]["steps"] if "checkout" in step.get("uses", "")]
    assert "secrets." not in text


def test_a_release_on_the_forge_leads_to_what_is_new_in_it() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "release.yml")
    *_, step = workflow["jobs"]["forge"]["steps"]
    assert '--notes "$NEW"' in step["run"]
    assert step["env"]["NEW"].endswith("/blob/${{ github.ref_name }}/CHANGELOG.md")


def test_an_index_gets_what_it_takes_of_a_release() -> None:
    """The shell's pattern leaves the wheel without a local version and the sources."""
    workflow = read(ROOT / ".github" / "workflows" / "release.yml")
    (removal,) = (step["run"] for step in workflow["jobs"]["index"]["steps"] if "run" in step)
    release = tool("release")
    names = {f"dist/{path.name}" for path in release.files()} | {f"dist/{release.SUMS}"}
    _, *patterns = shlex.split(removal)
    left = {name for name in names if not any(Path(name).match(pattern) for pattern in patterns)}
    assert {Path(name).suffix for name in left} == {".whl", ".gz"}
    assert not [name for name in left if "+" in name]
    assert all(any(Path(name).match(pattern) for name in names) for pattern in patterns)
