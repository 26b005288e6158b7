# SPDX-License-Identifier: Apache-2.0
"""`make release` stops at each door behind which something is missing, and says so in one line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from .tool import tool

TORCH = "torch==2.13.0"
CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2026-11-30\n\n- Something.\n\n## 1.1.0 - 2026-10-01\n\n- Older.\n"
)

Ran = list[tuple[str, ...]]


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/release.py in a tree of its own, where everything that it looks at is in order."""
    module = tool("release")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in module.CHANGE_WHEELS:
        monkeypatch.delenv(name, raising=False)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "a test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@localhost")
    (tmp_path / "python" / "singlepass").mkdir(parents=True)
    (tmp_path / "python" / "singlepass" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "README.md").write_text("pip install singlepass\n")
    (tmp_path / ".gitignore").write_text("build/\ndist/\n")
    module.git("init", "-q")
    commit(module)
    return module


@pytest.fixture
def ran(release: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The commands that it would run. `make wheels` leaves what a release has."""
    commands: Ran = []

    def succeeds(*command: str | Path) -> None:
        commands.append(tuple(map(str, command)))
        if command == ("make", "wheels"):
            (release.ROOT / "dist").mkdir()
            for path in release.files():
                path.write_text(path.name)

    monkeypatch.setattr(release, "succeeds", succeeds)
    return commands


def commit(module: ModuleType) -> None:
    module.git("add", "-A")
    module.git("commit", "-q", "--allow-empty", "-m", "A change")


def says(module: ModuleType, door: Callable[[str], None]) -> str:
    """The one line with which it stops."""
    with pytest.raises(SystemExit) as stopped:
        door(TORCH)
    line = str(stopped.value)
    assert re.fullmatch(r"release: expected [^\n]+; got [^\n]+\. [A-Z][^\n]+\.", line)
    return line


def test_through_all_doors(release: ModuleType, ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    release.main(TORCH)
    *doors, last = capsys.readouterr().out.splitlines()
    assert doors == [f"release: {door.__name__}" for door in release.DOORS]
    assert last == "1.2.0 is ready in dist/. To publish it: git tag v1.2.0 && git push origin v1.2.0"
    tests, packages, audits = ran[1:3], ran[3], ran[4:]
    assert tests == [(".ci/run",), ("make", "test-release")]
    assert packages == ("make", "wheels")
    audited = [command[-1] for command in audits if release.AUDIT_OF_A_WHEEL in command]
    assert audited == [str(path) for path in release.files() if path.suffix == ".whl"]
    assert {command[0] for command in audits} == {"uvx", release.sys.executable}
    subprocess.run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=release.ROOT / "dist", check=True)


def test_again_it_repeats_neither_tests_nor_builds_of_the_same_commit(release: ModuleType, ran: Ran) -> None:
    release.main(TORCH)
    ran.clear()
    release.main(TORCH)
    assert {command[0] for command in ran} == {release.sys.executable, "uvx"}
    ran.clear()
    commit(release)
    release.main(TORCH)
    assert (".ci/run",) in ran
    assert ("make", "wheels") in ran


def test_doors_can_be_left_out_by_name(release: ModuleType, ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    release.main(TORCH, "tests", "locks")
    assert "1.2.0 is ready in dist/, tests, locks left out. " in capsys.readouterr().out
    assert ("make", "wheels") in ran
    assert not [command for command in ran if {".ci/run", "tools/locks.py"} & {*command}]
    assert "got test. Name one of them" in says(release, lambda torch: release.main(torch, "test"))


def test_a_tree_that_is_not_clean(release: ModuleType) -> None:
    (release.ROOT / "new.py").touch()
    assert "got 1 changed or new files, such as new.py" in says(release, release.tree)


@pytest.mark.parametrize("number", ["1.2.0.dev0", "1.2", "1.2.0rc1"])
def test_a_version_that_is_none_of_a_release(release: ModuleType, number: str) -> None:
    (release.ROOT / "python/singlepass/__init__.py").write_text(f'__version__ = "{number}"\n')
    assert f"got {number}. Write" in says(release, release.version)


def test_a_version_that_was_released(release: ModuleType) -> None:
    release.git("tag", "-a", "v1.2.0", "-m", "1.2.0")
    release.version(TORCH)  # as in CI, which the tag started
    commit(release)
    assert "got 1.2.0, whose tag is on another commit. Raise it" in says(release, release.version)


def test_a_tag_of_another_version(release: ModuleType) -> None:
    release.git("tag", "v1.3.0")
    assert "expected the tag v1.2.0 or none; got v1.3.0. Remove" in says(release, release.version)


@pytest.mark.parametrize(
    ("old", "new", "got"),
    [
        ("## 1.2.0 - 2026-11-30", "## 1.2.1 - 2026-11-30", "no such section"),
        ("## 1.2.0 - 2026-11-30", "## 1.2.0", "no such section"),
        ("- Something.\n", "", "or an empty one"),
        (
            "## Unreleased\n",
            "## Unreleased\n\n### Added\n\n- More.\n",
            "got changes. Move them",
        ),
    ],
)
def test_a_changelog_that_does_not_speak_of_this_release(release: ModuleType, old: str, new: str, got: str) -> None:
    release.changelog(TORCH)
    (release.ROOT / "CHANGELOG.md").write_text(CHANGELOG.replace(old, new))
    assert got in says(release, release.changelog)


@pytest.mark.parametrize("name", ["README.md", "docs/install.md"])
def test_a_document_that_installs_nothing_from_an_index(release: ModuleType, name: str) -> None:
    release.documents(TORCH)
    (release.ROOT / "docs").mkdir()
    (release.ROOT / name).write_text("There is no wheel on a package index yet, so install from a clone:\n")
    assert f"got 'no wheel on a package index yet' in {name}. Write" in says(release, release.documents)


def test_a_command_that_fails(release: ModuleType) -> None:
    assert "expected false to succeed" in says(release, lambda torch: release.succeeds("false"))


@pytest.mark.parametrize("surplus", [True, False])
def test_other_files_than_a_release_has(release: ModuleType, ran: Ran, surplus: bool) -> None:
    release.packages(TORCH)
    name = "singlepass-1.1.0.tar.gz" if surplus else release.files()[0].name
    if surplus:
        (release.ROOT / "dist" / name).touch()
        assert f"got {name} too many or too few" in says(release, release.packages)
    else:
        (release.ROOT / "dist" / name).unlink()
        ran.clear()
        release.packages(TORCH)  # builds again
        assert ("make", "wheels") in ran


@pytest.mark.parametrize("name", ["TORCH_CUDA_ARCH_LIST", "SINGLEPASS_BUILD_TYPE", "SINGLEPASS_NAMESPACE"])
def test_a_shell_whose_settings_change_the_wheels(
    release: ModuleType, ran: Ran, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    release.packages(TORCH)
    monkeypatch.setenv(name, "9.0")
    assert f"got {name}=9.0. Unset {name}." in says(release, release.packages)


def test_files_that_changed_after_their_checksums(release: ModuleType, ran: Ran) -> None:
    release.packages(TORCH)
    release.checksums(TORCH)
    release.checksums(TORCH)
    release.files()[1].write_text("other bytes")
    assert "got other bytes. Remove dist/" in says(release, release.checksums)
