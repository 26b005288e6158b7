# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from singlepass.bench import cli, registry, results, run
from singlepass.bench.floor import require_stream
from singlepass.bench.optim import cases as optim
from singlepass.bench.optim import models
from singlepass.bench.probe import Probe
from singlepass.bench.registry import Gate, Tier
from singlepass.bench.results import Row, Run

PROBE = Probe(copy_gbps=10.0, matrix_tflops=0.1, compile_s=2.0)


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch, small_buffers: None) -> None:
    """Lion on two small tensors alone."""
    try:
        require_stream(torch.device("cpu"))
    except ValueError as reason:
        pytest.skip(str(reason))
    model = models.Model("small", "two tensors", ((300, 20), (77,)))
    real = next(case for case in registry.cases(torch.device("cpu")) if case.op == "Lion")
    rule = next(rule for rule in optim.RULES if rule.name == "Lion")
    case = registry.Case(
        "optim",
        "Lion",
        model.name,
        real.dtype,
        rule.ops,
        rule.traffic(model.elements, real.dtype),
        1,
        model.elements,
        4 * model.elements,
        2,
        partial(optim.inputs, model, real.dtype),
        tuple(p for p in optim.providers(rule, model, real.dtype) if p.tier <= Tier.EAGER),
    )
    monkeypatch.setattr(run, "cases", lambda device: [case])
    monkeypatch.setattr(run, "quick_cases", lambda device, probe: [case])
    monkeypatch.setattr(run, "probe", lambda device: PROBE)


def test_a_variable_that_names_no_backend_stops_a_run(few_cases: None, wish: Callable[[str], None]) -> None:
    wish("fpga")
    with pytest.raises(SystemExit, match=r"SINGLEPASS_BACKEND: expected backend among .*; got 'fpga'"):
        cli.main(["run", "--device", "cpu", "--seconds", "0.01", "--no-save"])


@pytest.mark.slow("draws with matplotlib, whose first picture looks for fonts")
def test_run_saves_rows_pictures_and_a_report(
    few_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["run", "--device", "cpu", "--seconds", "0.01", "--results", str(tmp_path)])
    assert status == 0
    (path,) = tmp_path.glob("*/*.json")
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["native"]["status"] == rows["eager"]["status"] == "ok"
    assert rows["native"]["gate_error"] <= 1.0
    assert path.with_name(f"{path.stem}-optim.svg").exists()
    shown = capsys.readouterr().out
    assert "small, one optimizer step, float32" in shown
    assert "Lion" in shown
    assert "Summary" in shown
    assert (
        max(len(line) for line in shown.splitlines() if not line.startswith(("results:", "picture:", "report:"))) <= 100
    )
    page = path.with_suffix(".html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "Lion" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "it loads nothing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_was_measured(
    number: signal.Signals, few_cases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = run.cases(torch.device("cpu"))

    def stop(device: torch.device) -> Gate:
        os.kill(os.getpid(), number)
        return Gate(0.0)

    later = dataclasses.replace(case, op="Later", providers=(dataclasses.replace(case.providers[0], gate=stop),))
    monkeypatch.setattr(run, "quick_cases", lambda device, probe: [case, later])
    # What a shell starts in the background may have SIGINT ignored.
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)
    try:
        assert cli.main(["run", "--device=cpu", "--seconds=0.01", f"--results={tmp_path}"]) == 130
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    (path,) = tmp_path.glob("*/*.json")
    saved = cli.results.load(path)
    assert saved.interrupted
    assert {row.op for row in saved.rows} == {"Lion"}
    assert path.with_suffix(".html").exists()


def test_what_is_left_out_is_counted(
    few_cases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = run.cases(torch.device("cpu"))
    others = [dataclasses.replace(case, op=op) for op in ("A", "B")]
    monkeypatch.setattr(run, "cases", lambda device: [case, *others])
    assert cli.main(["run", "--device=cpu", "--seconds=0.01", f"--results={tmp_path}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out: 2 cases, and what compiles for minutes. All of it: singlepass bench run --full" in printed


def test_published_results_are_copied(few_cases: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="expected a result file in bench-results; got none"):
        cli.main(["publish"])
    cli.main(["run", "--device=cpu", "--seconds=0.01"])
    assert not Path("bench").exists(), "a run alone leaves published results as they are"
    assert cli.main(["publish"]) == 0
    assert {path.suffix for path in Path("bench/results").glob("*/*")} == {".json", ".svg"}


def test_run_of_chosen_providers(few_cases: None, tmp_path: Path) -> None:
    arguments = ["run", "--device=cpu", "--seconds=0.01", "--provider=nat*,eager", f"--results={tmp_path}"]
    cli.main(arguments)
    (path,) = tmp_path.glob("*/*.json")
    assert {row["provider"] for row in json.loads(path.read_text())["rows"]} == {"native", "eager"}


def test_nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "probe", lambda device: PROBE)
    with pytest.raises(SystemExit, match="expected a choice that fits some case"):
        cli.main(["run", "--device", "cpu", "--op", "nothing"])


def test_list_names_cases_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--device", "cpu", "--op", "adan", "--size", "vit*"]) == 0
    shown = capsys.readouterr().out
    assert "optim/Adan/vit-b16/float32" in shown
    assert "triton (" in shown
    assert "Lion" not in shown


@pytest.mark.parametrize(("ms", "status"), [(103.0, 0), (108.0, 0), (125.0, 1), (50.0, 0)])
def test_compare(
    make_row: Callable[..., Row],
    make_run: Callable[..., Run],
    tmp_path: Path,
    ms: float,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slower means by more than 5 % and beyond the spread of the earlier run, whose q80 is 110 ms."""
    before = make_run([make_row("Lion", "native", 100.0)]).save(tmp_path / "a")
    after = make_run([make_row("Lion", "native", ms), make_row("Lion", "new", 1.0)]).save(tmp_path / "b")
    assert cli.main(["compare", str(before), str(after)]) == status
    assert ("SLOWER" in capsys.readouterr().out) == bool(status)


def test_compare_of_two_machines_is_by_multiples_of_the_floor(
    make_row: Callable[..., Row], make_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = make_run([make_row("Lion", "native", 100.0, floor=80.0), make_row("Adan", "native", 100.0, floor=80.0)])
    after = make_run([make_row("Lion", "native", 300.0, floor=240.0), make_row("Adan", "native", 200.0, floor=80.0)])
    after.machine["device"] = "Other Processor"
    paths = [str(run.save(tmp_path / name)) for name, run in (("a", before), ("b", after))]
    assert cli.main(["compare", *paths]) == 1
    shown = capsys.readouterr().out
    lion, adan = (next(line for line in shown.splitlines() if name in line) for name in ("Lion", "Adan"))
    assert "1.25x" in lion
    assert "+0.0 %" in lion
    assert "SLOWER" in adan
    assert "Other Processor" in shown


def test_compare_says_that_only_one_kept_freed_memory(
    make_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = make_run([]), make_run([])
    runs[1].machine["keeps_freed_memory"] = True
    paths = [str(run.save(tmp_path / name)) for run, name in zip(runs, "ab", strict=True)]
    for second, said in ((paths[1], True), (paths[0], False)):
        assert cli.main(["compare", paths[0], second]) == 0
        assert ("kept freed memory" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name : AMD EPYC\ncpu family : 25\nmodel : 17\n" * 2, "AMD EPYC (family 25, model 17)"),
        ("model name : Some Processor\n", "Some Processor"),
        ("BogoMIPS : 50\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_name_of_the_processor(
    text: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert results.cpu_model() == name


def test_compare_refuses_another_kind_of_device(make_run: Callable[..., Run], tmp_path: Path) -> None:
    runs = (("a", make_run([])), ("b", make_run([], kind="cuda")))
    paths = [str(run.save(tmp_path / name)) for name, run in runs]
    with pytest.raises(SystemExit, match="expected runs on one kind of device"):
        cli.main(["compare", *paths])
    with pytest.raises(SystemExit, match="expected a result file; got no file"):
        cli.main(["compare", paths[0], str(tmp_path / "none.json")])


def test_documents_that_are_not_there(make_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected the document .*; got none\. Run it in a clone"):
        cli.main(["table", "--write", str(tmp_path / "README.md")])


def test_table_fills_documents(
    make_row: Callable[..., Row],
    make_run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    document = Path("docs/page.md")
    document.parent.mkdir()
    document.write_text(
        "<!-- bench:plot path=images/p.svg -->\n<!-- /bench -->\n<!-- bench:checks -->\n<!-- /bench -->\n"
    )
    result = make_run([make_row("Lion", "native", 60.0, floor=55.0)]).save(Path("out"))
    assert cli.main(["table", str(result)]) == 0
    assert "Lion" in capsys.readouterr().out
    assert cli.main(["table", str(result), "--write", str(document)]) == 0
    text = document.read_text()
    assert "(../images/p.svg)" in text
    assert "| times the floor | Lion gpt2-small float32 | 1.09 | <= 1.2 | holds |" in text
    assert Path("images/p.svg").exists()


def test_help_names_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("family", "op", "size", "dtype", "provider"):
        assert f"--{option} {option.upper()} choose by {option}: patterns such as 'a*', with commas" in shown


@pytest.mark.parametrize(("package", "arguments"), [("rich", ["list"]), ("matplotlib", ["plot"])])
def test_a_package_that_is_missing_is_named(
    package: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "installed", lambda name: name != package)
    with pytest.raises(SystemExit, match=rf"expected the package {package}; got none\. Install it"):
        cli.main(arguments)


def test_without_matplotlib_results_are_kept(few_cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "installed", lambda name: name != "matplotlib")
    assert cli.main(["run", "--device=cpu", "--seconds=0.01", "--provider=native", f"--results={tmp_path}"]) == 0
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".html", ".json"]
