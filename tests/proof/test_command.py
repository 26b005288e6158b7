# SPDX-License-Identifier: Apache-2.0
"""A proof from its command to its file, and what travels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from proof import __main__ as command
from proof import bundle, place
from proof.__main__ import exit_status, main
from proof.stage import NOT_MEASURED, PROVED, REFUTED
from singlepass.bench import results

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow("a stage of the proof imports torch in a process of its own")
def test_a_rehearsal_writes_one_file_and_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--device", "cpu", "--stage", "import", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    assert files(tmp_path) == {str(path.relative_to(tmp_path)), str(path.relative_to(tmp_path).with_suffix(".log"))}
    assert path.parent.name == "proof"
    proof = json.loads(path.read_text())
    assert proof["machine"]["kind"] == "cpu"
    (stage,) = proof["stages"]
    assert (stage["name"], stage["status"]) == ("import", PROVED)
    assert stage["facts"]["torch"] == torch.__version__
    assert "import      proved" in capsys.readouterr().out


def test_verdicts_and_exit_status() -> None:
    assert [exit_status(v) for v in ([PROVED], [PROVED, NOT_MEASURED], [REFUTED, NOT_MEASURED])] == [0, 2, 1]


def test_without_a_gpu_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"expected an NVIDIA GPU; torch sees none\. Rehearse with --device cpu"):
        main(["run", "--results", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_torch_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"expected a Python with torch; got .*\. Name another"):
        main(["run", "--results", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected stages among build, import, .*; got bnech"):
        main(["run", "--device", "cpu", "--stage", "bnech", "--results", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_quick_mode_is_what_was_predicted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    monkeypatch.setattr(command, "_prove", lambda here, wanted: ran.extend(stage.name for stage in wanted) or 0)
    assert main(["run", "--device", "cpu", "--quick", "--results", str(tmp_path)]) == 0
    assert ran == ["import", "predictions"]


@pytest.mark.slow("a process imports torch and Triton from a copy, which nothing has compiled yet")
def test_a_stage_sees_the_copied_package_and_keeps_its_caches_inside(tmp_path: Path) -> None:
    here = place.make("cpu", tmp_path)
    code = "import singlepass, singlepass.bench, singlepass.triton_kernels as t; print(singlepass.__file__, t.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=here.environment, cwd=here.tree, capture_output=True, text=True, check=True
    )
    assert all(str(here.scratch) in str(Path(name)) for name in done.stdout.split())
    own = here.environment.items() - os.environ.items()
    written = {name: value for name, value in own if re.search("CACHE|TMP|CONFIG", name)}
    assert written
    assert all(value.startswith(str(here.scratch)) for value in written.values())


def test_wheels_are_unpacked_only_where_the_package_is_missing(tmp_path: Path) -> None:
    for name, module in (("here", "pytest"), ("gone", "no_such_module")):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            archive.writestr(f"{module}/__init__.py", "")
            archive.writestr(f"{name}-1.0.dist-info/METADATA", "")
        place.unpack(tmp_path / f"{name}.whl", tmp_path / "tools")
    assert files(tmp_path / "tools") == {"no_such_module/__init__.py", "gone-1.0.dist-info/METADATA"}


def test_a_tree_without_history_says_what_it_was_taken_from(tmp_path: Path) -> None:
    place.copy_tree(ROOT, tmp_path)
    assert place.commit_of(tmp_path) == place.commit_of(ROOT)
    assert not list(tmp_path.rglob("__pycache__"))
    assert results.newest_model(tmp_path / "bench" / "results") == results.newest_model(ROOT / "bench" / "results")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with the folders of this one, a library for CUDA, and nothing to download."""
    root = tmp_path / "root"
    place.copy_tree(ROOT, root)
    (root / "python" / "singlepass" / "_C_cuda13.so").write_bytes(b"\0GLIBC_2.14\0GLIBC_2.2.5\0GLIBCXX_3.4.21\0")
    monkeypatch.setattr(bundle, "ROOT", root)
    monkeypatch.setattr(bundle, "download", lambda folder: folder.mkdir())
    return root


def test_a_bundle_holds_the_tree_its_libraries_and_peers(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "peers" / "rival").mkdir(parents=True)
    (tmp_path / "peers" / "rival" / "__init__.py").touch()
    lines = bundle.make(tmp_path / "out" / "b.tar.gz", tmp_path / "peers")
    with tarfile.open(tmp_path / "out" / "b.tar.gz") as archive:
        names = set(archive.getnames())
    wanted = {"Makefile", "COMMIT", "python/singlepass/_C_cuda13.so", "tests/conftest.py", "peers/rival/__init__.py"}
    assert {f"{bundle.NAME}/{name}" for name in wanted} <= names
    assert "_C_cuda13.so asks for GLIBC 2.14, GLIBCXX 3.4.21" in lines


def test_bundles_that_would_not_do_are_refused(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "b.tar.gz"
    with pytest.raises(ValueError, match="expected a folder of peers"):
        bundle.make(output, tmp_path / "none")
    monkeypatch.setattr(bundle, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"expected at most 1,000 bytes; got [\d,]+\. Build for fewer"):
        bundle.make(output)
    (tree / "python" / "singlepass" / "_C_cuda13.so").unlink()
    with pytest.raises(ValueError, match=r"got none\. Build it with a CUDA torch"):
        bundle.make(output)
    assert not output.exists()


def test_versions_that_a_library_asks_for() -> None:
    library = ROOT / "python" / "singlepass" / "_C_cpu.so"
    with library.open("rb") as file:
        sections = [s for s in ELFFile(file).iter_sections() if isinstance(s, GNUVerNeedSection)]
        needed = {aux.name for s in sections for _, entries in s.iter_versions() for aux in entries}
    said = {name.replace(" ", "_") for name in bundle.asked(library)}
    assert said
    assert said <= needed
