# SPDX-License-Identifier: Apache-2.0
"""How the ends of a proof's stages are read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from proof import kernels, place, profile, small, stages
from proof.stage import NOT_MEASURED, PROVED, REFUTED, Outcome, Stage, call, first_object, run
from singlepass._ops import OPS
from singlepass.bench import results

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest

@pytest.mark.parametrize("place", ["native", "triton"])
def test_graphs(place):
    assert place == "native"

def test_the_same_bits_ten_times(): pass

def test_a_graph_that_needs_the_old_values_notices_a_step():
    pytest.skip("none here")

@pytest.fixture
def broken():
    raise RuntimeError

def test_values(broken): pass
"""


@pytest.fixture
def here(tmp_path: Path) -> place.Place:
    scratch = tmp_path / "scratch"
    (scratch / "tree").mkdir(parents=True)
    return place.Place("cuda", tmp_path, scratch)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def stage(name: str, code: str, phase: str = "one", limit: float = 60.0) -> Stage:
    def read(here: place.Place, status: int | None, text: str) -> Outcome:
        return Outcome(PROVED if status == 0 else REFUTED, text.strip(), {"status": status})

    return Stage(name, name, phase, lambda here: python(code), read, limit)


def test_stages_of_a_phase_run_side_by_side(here: place.Place, tmp_path: Path) -> None:
    """Each waits for what the other writes."""
    code = (
        "import pathlib, sys, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    pair = [stage("first", code.format(a, b)), stage("second", code.format(b, a))]
    log = tmp_path / "log"
    outcomes = [outcome.status for _, outcome in run([*pair, stage("third", "print('done')", "two")], here, log)]
    assert outcomes == [PROVED] * 3
    assert "==== third: proved: done" in log.read_text()


def test_a_stage_that_cannot_run_says_why(here: place.Place, tmp_path: Path) -> None:
    absent = dataclasses.replace(stage("absent", ""), command=lambda here: "no tool here")
    ((_, outcome),) = run([absent], here, tmp_path / "log")
    assert (outcome.status, outcome.said) == (NOT_MEASURED, "no tool here")


@pytest.mark.slow("waits for what must not come")
def test_what_runs_out_of_time_is_stopped_with_its_children(here: place.Place, tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(7); pathlib.Path({str(late)!r}).touch()"
    code = (
        f"import subprocess, sys, time; print('begun', flush=True); subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    status, text = call(python(code + "; time.sleep(60)"), here, 5.0, tmp_path / "output")
    assert status is None
    assert text.strip() == "begun"
    time.sleep(4)
    assert not late.exists()


def test_an_object_is_found_among_warnings() -> None:
    printed = 'a warning {of: braces}\n{\n "a": {"b": 1}\n}\nanother one\n'
    assert first_object(printed) == {"a": {"b": 1}}
    assert first_object("{}\n") == {}
    with pytest.raises(ValueError, match="no object"):
        first_object("Traceback")


def test_tests_are_counted_by_what_they_show(here: place.Place, tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "rational"
    folder.mkdir(parents=True)
    (folder / "test_gpu.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    command += [f"--junitxml={here.scratch / 'tests.xml'}", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    outcome = stages.tests_read(here, done.returncode, done.stdout)
    assert outcome.status == REFUTED
    assert outcome.facts["counts"] == {
        "rational/native/determinism": {"passed": 1},
        "rational/native/graphs": {"passed": 1},
        "rational/native/numerics": {"skipped": 1, "failed": 1},
        "rational/triton/graphs": {"failed": 1},
    }
    assert sorted(name.rsplit(".", 1)[1] for name in outcome.facts["failed"]) == ["test_graphs[triton]", "test_values"]


def test_tests_that_all_skip_prove_nothing(here: place.Place) -> None:
    (here.scratch / "tests.xml").write_text(
        '<testsuite><testcase classname="tests.kv.test_gpu" name="test_graphs"><skipped/></testcase></testsuite>'
    )
    assert stages.tests_read(here, 0, "").status == NOT_MEASURED


@pytest.mark.parametrize("what", stages.SHOWN)
@pytest.mark.parametrize("family", stages.FAMILIES)
def test_every_family_shows_everything(family: str, what: str) -> None:
    """By tests of its own that need a GPU, or whose places include one."""
    texts = [path.read_text() for path in (ROOT / "tests" / family).glob("test_*.py")]
    text = "".join(text for text in texts if "gpu" in text or "each_place" in text)
    names = [line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def test_")]
    assert [name for name in names if stages.shown_by(name) == what]


def said(*lines: str) -> str:
    return "\n".join(("optim/Lion/float32/native: ok", "kv/kv_decode/float32/triton: not run: no triton", *lines))


SUMMARY = "========= ERROR SUMMARY: 0 errors"
OURS = """========= Invalid __global__ read of size 4 bytes
=========     at void singlepass::optim::step_kernel<float>(Table)+0x250
=========     by thread (0,0,0) in block (0,0,0)"""
TRITONS = OURS.replace("Invalid __global__ read", "Uninitialized __global__ memory read").replace(
    "void singlepass::optim::step_kernel<float>(Table)", "codec_kernel"
)
TORCHS = OURS.replace("singlepass::optim::step_kernel<float>(Table)", "at::native::reduce_kernel<512>(Op)")


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (0, said(SUMMARY), PROVED),
        (0, said(TORCHS, SUMMARY), PROVED),
        (0, said(OURS, SUMMARY), REFUTED),
        (0, said(TRITONS, SUMMARY), REFUTED),
        (1, said("kv/kv_decode/float32/native: WRONG: 3 times the allowed error", SUMMARY), REFUTED),
        (None, said(), REFUTED),
        (0, "", REFUTED),
        (0, said(), NOT_MEASURED),
    ],
    ids=["clean", "torch's", "ours", "Triton's", "wrong", "late", "silent", "no summary"],
)
def test_sanitizers(here: place.Place, status: int | None, text: str, expected: str) -> None:
    assert stages.sanitizer_read("memcheck", here, status, text).status == expected


def test_kernels_of_triton_are_known() -> None:
    assert {"codec_kernel", "decode_kernel", "grad_norm_kernel", "step_kernel"} <= stages.triton_kernels()


def test_small_runs_cover_every_op() -> None:
    """By the cases of both kinds of devices; beside them the benchmarks' own op, and grad_norm's kernel by itself."""
    import torch

    covered = {op for _, case, provider in small.checks(torch.device("cpu")) for op in case.ops}
    assert covered | {"stream_", "grad_squares"} == set(OPS)


PROFILE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Description"
"0","7","step_kernel","GPU Speed Of Light Throughput","Duration","us","12.5","",""
"0","7","step_kernel","Launch Statistics","Registers Per Thread","register/thread","40","",""
"0","7","step_kernel","Occupancy","","","","Occupancy","Limited by the number of
required registers."
"1","7","merge_kernel","Occupancy","Achieved Occupancy","%","51.2","",""
"""


def test_profiles_are_read() -> None:
    step, merge = kernels.parse_profile(PROFILE)
    assert step["numbers"] == {"time": "12.5 us", "registers": "40 register/thread"}
    assert step["reasons"] == ["Limited by the number of required registers."]
    assert merge == {"kernel": "merge_kernel", "numbers": {"occupancy": "51.2 %"}, "reasons": []}
    assert kernels.parse_profile("==ERROR== no permission") == []


def test_calls_below_a_bar_are_profiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The furthest first, of a result in the tree."""
    path = max(results.files(ROOT / "bench" / "results"))
    below = profile.checks.below(results.load(path))
    limits = {case: max(check.missed_by for check in missed) for case, missed in below.items()}
    monkeypatch.setattr(profile, "profile", lambda case: {"kernels": []})
    profile.main(str(path), "1")
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == sorted(limits, key=limits.__getitem__, reverse=True)[:1]


@pytest.fixture
def measured(here: place.Place) -> Callable[[str], Outcome]:
    """The bench's outcome with the newest result in the tree."""
    path = max(results.files(ROOT / "bench" / "results"))
    folder = here.scratch / "bench" / "device"
    folder.mkdir(parents=True)
    data = json.loads(path.read_text()) | {"matrix_tflops": 1.0}

    def read(device: str, **changes: str) -> Outcome:
        data["rows"][0] |= changes
        (folder / path.name).write_text(json.dumps(data))
        return stages.bench_read(dataclasses.replace(here, device=device), 0, "")

    return read


def test_a_bench_that_broke_is_not_judged_by_an_older_file(here: place.Place) -> None:
    """An exception's exit status is that of bars that fail."""
    older = max(results.files(ROOT / "bench" / "results"))
    (here.results / "device").mkdir()
    (here.results / "device" / older.name).write_text(older.read_text())
    outcome = stages.bench_read(here, 1, "Traceback\nRuntimeError: CUDA error")
    assert (outcome.status, outcome.said) == (REFUTED, "RuntimeError: CUDA error")
    assert stages.profile_command(here) == "nothing was measured"


def test_a_measured_run_tells_ceilings_and_bars(here: place.Place, measured: Callable[..., Outcome]) -> None:
    outcome = measured("cpu")
    assert outcome.status == NOT_MEASURED, "a rehearsal on the CPU"
    assert "TFLOP/s" in outcome.said
    assert len(list(here.results.glob("device/*.json"))) == 1, "the file is kept"
    assert measured("cuda", status="wrong").status == REFUTED
