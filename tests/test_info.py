# SPDX-License-Identifier: Apache-2.0
"""The command line: `singlepass info --check` fails for whatever does not run as this installation should run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from singlepass import _check, _cli, _info, _native, kv, nn, optim, spectral
from singlepass._ops import OPS, requested

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _cpu_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(_info, "_devices", lambda: ["cpu"])


def without_library(monkeypatch: pytest.MonkeyPatch, remedy: str) -> None:
    """As if the CPU library had not been loaded, and, with a remedy, should have been."""
    status = _native.LibraryStatus(False, Path("_C_cpu.so"), "_C_cpu.so is missing from here", remedy)
    monkeypatch.setitem(_native._statuses, "cpu", status)
    for op in OPS.values():
        monkeypatch.setitem(op._obstacles, ("native", "cpu"), status.reason)
        monkeypatch.setattr(op, "_chosen", {})


def checked(output: Output, *options: str) -> tuple[int, dict[str, str], list[str]]:
    """Exit status, the outcome of each line, and the lines below."""
    status = _cli.main(["info", "--check", *options])
    lines = output.readouterr().out.partition("\ncheck: ")[2].splitlines()[1:]
    results = {line[2:42].strip(): line[43:] for line in lines if " on cpu (" in line}
    return status, results, lines[len(results) :]


def test_kernels_are_checked_and_named(capsys: Output) -> None:
    status, results, rest = checked(capsys)
    assert status == 0
    assert results == {f"{name} on cpu (native)": "ok" for name in _check.CASES}
    assert not rest


@pytest.mark.gpu
def test_kernels_are_checked_on_a_gpu() -> None:
    results = _info.check()
    assert {(r["name"], r["device"]) for r in results} == {(n, d) for n in _check.CASES for d in ("cpu", "cuda")}
    assert {r["outcome"] for r in results} == {"ok"}
    assert "eager" not in {r["backend"] for r in results}


def test_the_check_runs_every_op_and_class() -> None:
    with _check.recorded() as ran:
        for case in _check.CASES.values():
            case(torch.float32, "cpu")
    assert ran == {(op, "native") for op in OPS if op != "stream_"}  # of the bench alone
    public = {
        *optim._OPTIMIZERS,
        "clip_grad_norm_",
        "GroupRational",
        "quantize, dequantize",
        "probe_saliency",
        "ZipCacheLayer",
        "MatryoshkaLayer",
    }
    assert set(_check.CASES) == public | {"SSTLinear", "LorentzLinear", "SST"}
    assert all(any(hasattr(m, name.split(",")[0]) for m in (optim, nn, kv, spectral)) for name in _check.CASES)


def test_a_library_that_should_be_there_fails(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    without_library(monkeypatch, "Install or build singlepass again.")
    status, results, rest = checked(capsys)
    assert status == 1
    assert results.pop("native library on cpu (none)") == (
        "not loaded: _C_cpu.so is missing from here. Install or build singlepass again."
    )
    assert results == {f"{name} on cpu (eager)": "ok" for name in _check.CASES}
    assert rest == ["  On cpu there are no kernels: everything ran in eager PyTorch, which is many times slower."]
    assert _cli.main(["info"]) == 0
    assert "native cpu: not loaded: _C_cpu.so is missing from here. Install or build" in capsys.readouterr().out


def test_without_a_library_eager_is_checked_and_named(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    without_library(monkeypatch, "")
    status, results, rest = checked(capsys)
    assert status == 0
    assert results == {f"{name} on cpu (eager)": "ok" for name in _check.CASES}
    assert rest == ["  On cpu there are no kernels: everything ran in eager PyTorch, which is many times slower."]


def test_a_kernel_that_the_library_lacks_fails(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(OPS["grad_norm"]._obstacles, ("native", "cpu"), "no kernel for this op")
    monkeypatch.setattr(OPS["grad_norm"], "_chosen", {})
    status, results, _ = checked(capsys)
    assert status == 1
    assert results.pop("LAMB on cpu (native, eager)") == "grad_norm ran on eager: no kernel for this op"
    assert set(results.values()) == {"ok"}


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(OPS["lion_step_"]._functions, "native", lambda *_, **__: None)
    monkeypatch.setitem(OPS["rational"]._functions, "native", lambda *_, **__: 1 / 0)
    backward = OPS["lorentz_backward"].on("native")
    nan = lambda *args, **options: [t.mul(float("nan")) for t in backward(*args, **options)]  # noqa: E731
    monkeypatch.setitem(OPS["lorentz_backward"]._functions, "native", nan)
    status, results, _ = checked(capsys)
    assert status == 1
    assert results["LorentzLinear on cpu (native)"] == "differs from float64 by nan"
    assert results["Lion on cpu (native)"].startswith("differs from float64 by ")
    assert results["GroupRational on cpu (native)"] == "ZeroDivisionError: division by zero"
    assert results["Adan on cpu (native)"] == "ok"


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_the_backend_asked_for_is_checked(wish: Callable[[str], None], capsys: Output, backend: str) -> None:
    wish(backend)
    status, results, rest = checked(capsys)
    assert (status, rest) == (0, [])
    assert results == {f"{name} on cpu ({backend})": "ok" for name in _check.CASES}
    assert requested(None) == backend


def test_a_backend_that_cannot_run_fails(wish: Callable[[str], None], capsys: Output) -> None:
    wish("triton")
    status, results, _ = checked(capsys)
    assert status == 1
    assert results["AdamW on cpu (none)"].startswith(
        "RuntimeError: adamw_step_: expected backend 'triton' to be usable"
    )
    wish("fpga")
    assert _cli.main(["info", "--check"]) == 2
    found = "SINGLEPASS_BACKEND: expected backend among native, triton, eager; got 'fpga'. "
    assert capsys.readouterr().err.startswith(found)


def test_json_has_the_same(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    without_library(monkeypatch, "Build singlepass on this machine.")
    assert _cli.main(["info", "--check", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["libraries"]["cpu"]["remedy"] == "Build singlepass on this machine."
    assert data["check"] == _info.check()
    assert data["check"][0] == {"name": "LAMB", "device": "cpu", "backend": "eager", "outcome": "ok"}
    assert data["check"][-1]["name"] == "native library"


def test_a_reader_that_stops_reading_ends_the_command() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "singlepass", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + 13, "")


def test_unknown_commands_are_named(capsys: Output) -> None:
    assert _cli.main(["bnech"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "singlepass: expected a command among info, bench; got 'bnech'. See singlepass --help.\n"


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_usage(capsys: Output, argv: list[str], status: int) -> None:
    assert _cli.main(argv) == status
    assert "info     show which backend runs each op here" in capsys.readouterr().out
