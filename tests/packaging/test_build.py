# SPDX-License-Identifier: Apache-2.0
"""What setup.py decides and how it says so, without compiling anything."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable
from email import message_from_string
from email.message import Message
from pathlib import Path
from unittest import mock

import pytest
import torch

Announce = Callable[..., list[str]]


@pytest.fixture
def setup_py(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Announce:
    """Runs setup.py with arguments under settings, and returns the lines that it prints."""
    monkeypatch.chdir(root)

    def run(*arguments: str, **settings: str) -> list[str]:
        cleared = ("SINGLEPASS", "CUDA_", "TORCH_CUDA")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(cleared)} | settings
        monkeypatch.setattr(sys, "argv", ["setup.py", *arguments])
        with mock.patch.dict(os.environ, environment, clear=True):
            runpy.run_path("setup.py")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def announced(setup_py: Announce) -> Announce:
    """What a build says before it compiles: asked for its help, build_ext does everything up to there."""

    def lines(**settings: str) -> list[str]:
        return [line for line in setup_py("build_ext", "--help", **settings) if line.startswith("singlepass: ")]

    return lines


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """What setup.py looks at in a CUDA 13.0 toolkit before it compiles."""
    toolkit = tmp_path / "cuda"
    for name in ("include/cuda_runtime.h", "lib64/libcudart.so", "bin/nvcc"):
        (toolkit / name).parent.mkdir(parents=True)
        (toolkit / name).touch()
    answers = f"'#$ TOP={toolkit}' 'release 13.0,' compute_80 compute_90 compute_103 compute_120"
    (toolkit / "bin" / "nvcc").write_text(f"#!/bin/sh\nprintf '%s\\n' {answers}\n")
    (toolkit / "bin" / "nvcc").chmod(0o755)
    return toolkit


def test_local_version(setup_py: Announce) -> None:
    (plain,) = setup_py("--version")
    assert setup_py("--version", SINGLEPASS_LOCAL_VERSION="cu130") == [f"{plain}+cu130"]


def metadata(setup_py: Announce, folder: Path, **settings: str) -> Message:
    """What an index would show of the package."""
    setup_py("-q", "egg_info", "--egg-base", str(folder), **settings)
    return message_from_string((folder / "singlepass.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))


def test_an_index_shows_links_and_pictures_of_the_release(setup_py: Announce, root: Path, tmp_path: Path) -> None:
    repository = "https://forge.example/someone/singlepass"
    shown = metadata(setup_py, tmp_path, SINGLEPASS_REPOSITORY=repository + "/")
    tag = f"v{shown['Version']}"
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", str(shown.get_payload()))
    assert targets
    for picture, target in targets:
        place = f"{repository}/{'raw' if picture else 'blob'}/{tag}/"
        assert target.startswith(("https://", "#"))
        if target.startswith(repository):
            assert (root / target.removeprefix(place).partition("#")[0]).is_file(), target
    addresses = dict(line.split(", ") for line in shown.get_all("Project-URL", []))
    assert addresses.pop("Source") == repository
    assert addresses.pop("Issues") == f"{repository}/issues"
    assert addresses.keys() == {"Documentation", "Changelog"}
    assert all((root / address.removeprefix(f"{repository}/blob/{tag}/")).is_file() for address in addresses.values())


def test_without_an_address_the_description_is_the_readme(setup_py: Announce, root: Path, tmp_path: Path) -> None:
    shown = metadata(setup_py, tmp_path)
    assert str(shown.get_payload()).strip() == (root / "README.md").read_text(encoding="utf-8").strip()
    assert shown["Description-Content-Type"] == "text/markdown"
    assert shown.get_all("Project-URL", []) == []


def test_only_building_needs_torch(setup_py: Announce, announced: Announce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup_py("--version")
    with pytest.raises(SystemExit, match="expected torch"):
        announced()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"SINGLEPASS_WITH_CUDA": "0"}, "SINGLEPASS_WITH_CUDA=0"),
        ({"CUDA_HOME": "/nonexistent"}, "no nvcc (CUDA_HOME=/nonexistent searched)"),
    ],
)
def test_one_line_says_why_there_is_no_cuda(announced: Announce, settings: dict[str, str], reason: str) -> None:
    assert announced(**settings) == [f"singlepass: building the CPU library only: {reason}"]


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [
        (None, f"torch {torch.__version__} is built without CUDA"),
        ("12.6", f"nvcc is of CUDA 13.0, torch {torch.__version__} of CUDA 12.6"),
    ],
)
def test_a_torch_that_does_not_fit_is_a_reason(
    announced: Announce, toolkit: Path, monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert announced(CUDA_HOME=str(toolkit)) == [f"singlepass: building the CPU library only: {reason}"]


@pytest.mark.parametrize(("wish", "archs"), [("", "8.0;9.0;12.0+PTX"), ("9.0", "9.0")])
def test_archs_are_those_asked_for_or_all_that_nvcc_knows(
    announced: Announce, toolkit: Path, monkeypatch: pytest.MonkeyPatch, wish: str, archs: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(toolkit))
    lines = announced(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=wish)
    assert lines == [f"singlepass: building the CPU library, and the CUDA library with CUDA 13.0 for {archs}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SINGLEPASS_WITH_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "expected 1 to be possible; got: no nvcc"),
        ({"SINGLEPASS_WITH_CUDA": "maybe"}, "SINGLEPASS_WITH_CUDA: expected one of 0, 1, auto; got 'maybe'"),
        (
            {"SINGLEPASS_BUILD_TYPE": "Fast"},
            "SINGLEPASS_BUILD_TYPE: expected one of Release, RelWithDebInfo; got",
        ),
    ],
)
def test_a_wish_that_cannot_be_met_fails(announced: Announce, settings: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        announced(**settings)
