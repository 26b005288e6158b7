# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from singlepass.bench import cli, models, registry
from singlepass.bench.cases import optim
from singlepass.bench.floor import require_stream
from singlepass.bench.registry import Tier
from singlepass.bench.results import Row, Run


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
    monkeypatch.setattr(cli, "cases", lambda device: [case])


def test_run_saves_rows_and_a_plot(few_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["run", "--device", "cpu", "--seconds", "0.01", "--results", str(tmp_path)])
    assert status == 0
    (path,) = tmp_path.glob("*/*.json")
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["native"]["status"] == rows["eager"]["status"] == "ok"
    assert rows["native"]["gate_error"] <= 1.0
    assert path.with_suffix(".svg").exists()
    shown = capsys.readouterr().out
    assert "small, float32" in shown
    assert "Lion" in shown


def test_run_of_chosen_providers(few_cases: None, tmp_path: Path) -> None:
    arguments = ["run", "--device=cpu", "--seconds=0.01", "--provider=nat*,eager", f"--results={tmp_path}"]
    cli.main(arguments)
    (path,) = tmp_path.glob("*/*.json")
    assert {row["provider"] for row in json.loads(path.read_text())["rows"]} == {"native", "eager"}


def test_nothing_chosen() -> None:
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


def test_compare_refuses_other_devices(make_run: Callable[..., Run], tmp_path: Path) -> None:
    before, after = make_run([]), make_run([])
    after.machine["device"] = "Other Processor"
    paths = [str(run.save(tmp_path / name)) for name, run in (("a", before), ("b", after))]
    with pytest.raises(SystemExit, match="expected runs of one device"):
        cli.main(["compare", *paths])


def test_table_fills_documents(
    make_row: Callable[..., Row], make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = Path("docs/page.md")
    document.parent.mkdir()
    document.write_text(
        "<!-- bench:plot path=images/p.svg -->\n<!-- /bench -->\n<!-- bench:checks -->\n<!-- /bench -->\n"
    )
    result = make_run([make_row("Lion", "native", 60.0, floor=55.0)]).save(Path("out"))
    assert cli.main(["table", str(result), "--write", str(document)]) == 0
    text = document.read_text()
    assert "(../images/p.svg)" in text
    assert "| times the floor | Lion gpt2-small float32 | 1.09 | <= 1.25 | holds |" in text
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
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".json"]
