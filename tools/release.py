# SPDX-License-Identifier: Apache-2.0
"""Makes a release ready in dist/, and publishes nothing. `make release` runs it.

    release.py TORCH [DOOR ...]         without the doors that are named

It goes through the doors of DOORS in their order, and stops at the first behind which something is missing, with one
line that says what and how to mend it. Started again, it does not repeat tests and builds of the same commit.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
TESTS = ((".ci/run",), ("make", "test-release"))
AUDITS = (("twine==7.0.0", "check", "--strict"), ("check-wheel-contents==0.6.3",))
AUDIT_OF_A_WHEEL = "tests/packaging/test_wheel.py"
SUMS = "SHA256SUMS"
CHANGE_WHEELS = ("SINGLEPASS_BUILD_TYPE", "SINGLEPASS_NAMESPACE", "TORCH_CUDA_ARCH_LIST")
UNPUBLISHED = "no wheel on a package index yet"


def stop(expected: str, got: str, remedy: str) -> NoReturn:
    raise SystemExit(f"release: expected {expected}; got {got}. {remedy}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def succeeds(*command: str | Path) -> None:
    """Runs a command, whose output comes through."""
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}).returncode:
        stop(f"{' '.join(map(str, command))} to succeed", "the above", "Mend it, commit, and run make release again.")


def passed(door: str) -> Path:
    """The file that says that this commit has passed a door."""
    folder = ROOT / "build" / "release" / git("rev-parse", "HEAD")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / door


def written_version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "python/singlepass/__init__.py").read_text(), re.M)
    return found[1] if found else "none"


def tree(torch: str) -> None:
    """What is released is a commit."""
    if changed := git("status", "--porcelain").splitlines():
        stop("a clean tree", f"{len(changed)} changed or new files, such as {changed[0].split()[-1]}", "Commit them.")


def version(torch: str) -> None:
    """One that no release has had."""
    where, number = "python/singlepass/__init__.py", written_version()
    if not re.fullmatch(r"\d+\.\d+\.\d+", number):
        stop(f"a version such as 1.2.3 in {where}", number, "Write the number of this release there.")
    here = git("tag", "--points-at", "HEAD", "v*").split()
    if git("tag", "--list", f"v{number}") not in ("", *here):
        stop("a version without a release", f"{number}, whose tag is on another commit", f"Raise it in {where}.")
    if others := [tag for tag in here if tag != f"v{number}"]:
        stop(f"the tag v{number} or none", others[0], f"Remove the tag, or write its version in {where}.")


def changelog(torch: str) -> None:
    """It says what is new in this version, and when that was released."""
    text, number = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), written_version()
    sections = re.split(r"^## +(.*)$", text, flags=re.M)
    said = {heading: body.strip() for heading, body in zip(sections[1::2], sections[2::2], strict=True)}
    heading = next((h for h in said if re.fullmatch(rf"{re.escape(number)} - \d{{4}}-\d\d-\d\d", h)), "")
    if not said.get(heading):
        found = "no such section, or an empty one"
        stop(f"a section '## {number} - <date>' in CHANGELOG.md", found, "Move what is under Unreleased there.")
    if said.get("Unreleased"):
        stop("nothing under Unreleased in CHANGELOG.md", "changes", f"Move them to the section of {number}.")


def documents(torch: str) -> None:
    """They say how what is about to be published is installed. An index shows README.md."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if stale := [page for page in pages if UNPUBLISHED in page.read_text(encoding="utf-8")]:
        got = f"'{UNPUBLISHED}' in {stale[0].relative_to(ROOT)}"
        stop("documents that install from a package index", got, "Write 'pip install singlepass' there.")


def locks(torch: str) -> None:
    """What is tested is what pyproject.toml asks for."""
    succeeds(sys.executable, "tools/locks.py", torch, "check")


def tests(torch: str) -> None:
    """Those of CI, and those of a release: together hours."""
    if not passed("tests").exists():
        for command in TESTS:
            succeeds(*command)
        passed("tests").touch()


def files() -> list[Path]:
    """What a release has in dist/."""
    number, tag = written_version(), f"py3-none-manylinux_2_28_{os.uname().machine}.whl"
    names = (f"singlepass-{number}+cpu-{tag}", f"singlepass-{number}-{tag}", f"singlepass-{number}.tar.gz")
    return [ROOT / "dist" / name for name in names]


def packages(torch: str) -> None:
    """Wheels and sources, with nothing else beside them, as indexes accept them and systems load them."""
    if changed := [name for name in CHANGE_WHEELS if os.environ.get(name)]:
        got = f"{changed[0]}={os.environ[changed[0]]}"
        stop("wheels with all architectures and the settings of every release", got, f"Unset {changed[0]}.")
    dist = ROOT / "dist"
    if not (passed("packages").exists() and all(path.exists() for path in files())):
        shutil.rmtree(dist, ignore_errors=True)
        succeeds("make", "wheels")
    if strange := ({path.name for path in dist.iterdir()} - {SUMS}) ^ {path.name for path in files()}:
        got = f"{', '.join(sorted(strange))} too many or too few"
        stop("the wheels and the sources of this version in dist/", got, "Remove dist/, and run make release again.")
    wheels = [path for path in files() if path.suffix == ".whl"]
    for (tool, *options), audited in zip(AUDITS, (files(), wheels), strict=True):
        succeeds("uvx", "-q", tool, *options, *audited)
    for wheel in wheels:
        succeeds(sys.executable, "-m", "pytest", "-q", AUDIT_OF_A_WHEEL, "--wheel", wheel)
    passed("packages").touch()


def checksums(torch: str) -> None:
    """Written once; from then on the files stay what they are."""
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files())
    written = ROOT / "dist" / SUMS
    if written.exists() and written.read_text() != sums:
        stop(f"the files that dist/{SUMS} lists", "other bytes", "Remove dist/, and run make release again.")
    written.write_text(sums)


DOORS: tuple[Callable[[str], None], ...] = (tree, version, changelog, documents, locks, tests, packages, checksums)


def main(torch: str, *without: str) -> None:
    names = [door.__name__ for door in DOORS]
    if unknown := [name for name in without if name not in names]:
        stop(f"doors among {', '.join(names)}", unknown[0], "Name one of them: make release WITHOUT=tests.")
    for door in DOORS:
        if door.__name__ not in without:
            print(f"release: {door.__name__}", flush=True)
            door(torch)
    number, left_out = written_version(), f", {', '.join(without)} left out" if without else ""
    print(f"{number} is ready in dist/{left_out}. To publish it: git tag v{number} && git push origin v{number}")


if __name__ == "__main__":
    main(*sys.argv[1:])
