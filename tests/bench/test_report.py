# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from singlepass.bench import checks, counted, documents, registry, results, tables
from singlepass.bench.grid import number, times
from singlepass.bench.plot import draw
from singlepass.bench.probe import Probe
from singlepass.bench.results import Row, Run

MakeRow = Callable[..., Row]
MakeRun = Callable[..., Run]


@pytest.fixture
def good_run(make_row: MakeRow, make_run: MakeRun) -> Run:
    rows = [
        make_row("AdamW", "native", 82.0),
        make_row("AdamW", "torch-fused", 83.0),
        make_row("AdamW", "eager", 1000.0),
        make_row("Lion", "native", 60.0, floor=55.0),
        make_row("Lion", "eager", 900.0, floor=55.0, extra_bytes=300 << 20),
        make_row("Lion", "pytorch_optimizer-loop", 400.0, floor=55.0, column="peer"),
        make_row("Lion", "pytorch_optimizer-foreach", 200.0, floor=55.0, column="peer", differs="no decay"),
        make_row("Lion", "compile", 120.0, floor=55.0),
    ]
    return make_run(rows)


def verdicts(run: Run) -> dict[tuple[str, str], bool | None]:
    return {(c.bar, c.case.split()[0]): c.holds for c in checks.check(run)}


def replace_row(run: Run, new: Row) -> None:
    run.rows = [new if row.key == new.key else row for row in run.rows]


def test_all_bars_hold(good_run: Run) -> None:
    found = verdicts(good_run)
    assert set(found.values()) == {True}
    assert checks.exit_status(checks.check(good_run)) == 0
    assert {bar for bar, op in found if op == "Lion"} == {
        "times the floor",
        "times faster than eager",
        "time over pytorch_optimizer's best",
        "time over torch.compile",
        "extra memory over allowed",
    }


@pytest.mark.parametrize(
    ("op", "provider", "change", "bar"),
    [
        ("AdamW", "native", {"ms": 97.0}, "times the floor"),
        ("AdamW", "torch-fused", {"ms": 81.0}, "time over torch fused"),
        ("Lion", "eager", {"ms": 179.0}, "times faster than eager"),
        ("Lion", "pytorch_optimizer-loop", {"ms": 59.0}, "time over pytorch_optimizer's best"),
        ("Lion", "compile", {"ms": 59.0}, "time over torch.compile"),
        ("Lion", "native", {"ms": 60.0, "extra_bytes": 3 << 20}, "extra memory over allowed"),
    ],
)
def test_each_bar_can_fail(
    good_run: Run, make_row: MakeRow, op: str, provider: str, change: dict[str, float], bar: str
) -> None:
    floor = 80.0 if op == "AdamW" else 55.0
    replace_row(good_run, make_row(op, provider, **({"floor": floor} | change)))
    assert verdicts(good_run)[bar, op] is False
    assert checks.exit_status(checks.check(good_run)) == 1


def test_what_is_not_measured_neither_holds_nor_fails(good_run: Run, make_row: MakeRow) -> None:
    replace_row(good_run, make_row("Lion", "compile", None, reason="out of time"))
    assert verdicts(good_run)["time over torch.compile", "Lion"] is None
    assert checks.exit_status(checks.check(good_run)) == 2
    assert checks.exit_status([]) == 2


def test_a_rival_left_out_can_only_fail_a_bar(good_run: Run, make_row: MakeRow) -> None:
    skipped = make_row("Lion", "compile-whole", None, column="torch.compile", status="skipped", reason="out of time")
    good_run.rows.append(skipped)
    assert verdicts(good_run)["time over torch.compile", "Lion"] is None
    replace_row(good_run, make_row("Lion", "compile", 50.0))
    assert verdicts(good_run)["time over torch.compile", "Lion"] is False


def test_many_small_adamw_is_compared_with_torchs(make_row: MakeRow, make_run: MakeRun) -> None:
    rows = [
        make_row("AdamW", "native", 4.0, size="1000x1000"),
        make_row("AdamW", "torch-fused", 2.1, size="1000x1000"),
        make_row("Lion", "native", 4.0, size="1000x1000"),
        make_row("Lion", "torch-fused-adamw", 2.2, size="1000x1000", column="yardstick"),
    ]
    grid = tables.family_grid(make_run(rows), "optim", "float32", size="1000x1000")
    column = grid.head.index("torch fused AdamW")
    assert [line[column].split()[0] for line in grid.lines] == ["2.10", "2.20"]


def test_many_small_tensors(make_row: MakeRow, make_run: MakeRun) -> None:
    rows = [
        make_row("Lion", "native", 4.0, size="1000x1000"),
        make_row("Lion", "torch-fused-adamw", 2.1, size="1000x1000", column="yardstick"),
    ]
    assert verdicts(make_run(rows)) == {("time over torch fused AdamW", "Lion"): True}
    replace_row(run := make_run(rows), make_row("Lion", "native", 4.3, size="1000x1000"))
    assert verdicts(run) == {("time over torch fused AdamW", "Lion"): False}
    for ms, holds in ((1.2, True), (1.3, False)):  # AdamW has less to do than those
        rows = [
            make_row("AdamW", "native", ms, size="1000x1000"),
            make_row("AdamW", "torch-fused", 2.1, size="1000x1000"),
        ]
        assert verdicts(make_run(rows)) == {("time over torch fused AdamW", "AdamW"): holds}


def test_a_step_of_one_element_is_compared_with_an_op_in_python(make_row: MakeRow, make_run: MakeRun) -> None:
    def run(ms: float) -> Run:
        rows = [
            make_row("AdamW", "native", ms, size="300x1"),
            make_row("AdamW", "torch-fused", 9.0, size="300x1"),
            make_row("AdamW", "python-op", 1.0, size="300x1", column="yardstick"),
        ]
        return make_run(rows)

    assert verdicts(run(2.0)) == {("time over an op in Python", "AdamW"): True}
    assert verdicts(run(2.02)) == {("time over an op in Python", "AdamW"): False}
    grid = tables.family_grid(run(2.0), "optim", "float32", size="300x1")
    assert grid.head[1:] == ["**singlepass**", "torch", "op in Python"]
    assert [value.split()[0] for value in grid.lines[0][1:]] == ["2.00", "9.00", "1.00"]


def test_gpu_bars(make_row: MakeRow, make_run: MakeRun) -> None:
    def found(ms: float, **values: float) -> dict[str, bool | None]:
        facts = {"launches": 1, "host_us": 60.0} | values
        row = make_row("AdamW", "native", ms, size="300-tensors", **facts)
        return {bar: holds for (bar, _), holds in verdicts(make_run([row], kind="cuda")).items()}

    # 28 bytes for each of 124M parameters at the copy bandwidth of 40 GB/s take 86.8 ms.
    assert set(found(100.0).values()) == {True}
    assert found(105.0)["share of copy bandwidth"] is False
    assert found(100.0, launches=2)["launches"] is False
    assert found(100.0, host_us=120.0)["host microseconds"] is False


def test_table_shows_best_peer_and_how_it_differs(good_run: Run) -> None:
    (grid,) = tables.grids(good_run)
    adamw, lion = (dict(zip(grid.head, line, strict=True)) for line in grid.lines)
    assert grid.title == "gpt2-small, one optimizer step, float32: ms (multiple of the floor)"
    assert list(lion) == ["optimizer", "**singlepass**", "torch", "best peer", "torch.compile", "eager"]
    assert lion["**singlepass**"] == "60.0 (1.09x)"
    assert lion["best peer"] == "200 (3.64x) [1]"
    assert lion["eager"] == "900 (16.4x)"
    assert grid.notes == ["[1] pytorch_optimizer-foreach; computes something else: no decay."]
    assert adamw["torch"] == "83.0 (1.04x)"
    assert (adamw["best peer"], lion["torch"]) == ("none", "none")


def test_each_provider_has_its_own_floor(make_row: MakeRow, make_run: MakeRun) -> None:
    """Those of another group were timed beside the floor of other minutes: multiples compare, milliseconds don't."""
    rows = [make_row("Lion", "native", 60.0, floor=55.0), make_row("Lion", "compile", 50.0, floor=40.0)]
    run = make_run(rows)
    (line,) = tables.grids(run)[0].lines
    assert line[1:] == ["60.0 (1.09x)", "50.0 (1.25x)"]
    (summary,) = tables.summary_grid(lambda family: run).lines
    assert summary == ["optim", "–", "1.15x", "1.09x", "none"]


def test_table_says_why_nothing_is_there(good_run: Run, make_row: MakeRow) -> None:
    replace_row(good_run, make_row("Lion", "compile", None, reason="RuntimeError: no compiler"))
    replace_row(good_run, make_row("AdamW", "torch-fused", None, reason="not installed"))
    (grid,) = tables.grids(good_run)
    adamw, lion = (dict(zip(grid.head, line, strict=True)) for line in grid.lines)
    assert lion["torch.compile"] == "none [2]"
    assert grid.notes[1] == "[2] RuntimeError: no compiler"
    assert adamw["torch"] == "none"


def test_summary_says_where_we_lose(good_run: Run, make_row: MakeRow) -> None:
    assert tables.summary_grid(lambda family: good_run).lines == [
        ["optim", "1.01x", "1.51x (1.01x-2.00x)", "1.06x (1.02x-1.09x)", "none"]
    ]
    replace_row(good_run, make_row("Lion", "compile", 50.0, floor=55.0))
    (line,) = tables.summary_grid(lambda family: good_run).lines
    assert line[-1] == "Lion: 0.83x of compile"


def test_memory_table(good_run: Run) -> None:
    (grid,) = tables.memory_grids(good_run)
    assert grid.lines[1] == ["Lion", "0.0 MiB", "–", "300.0 MiB"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.50x"), (9.994, "9.99x"), (9.996, "10.0x"), (99.96, "100x"), (1234.5, "1,234x")],
)
def test_ratios(value: float | None, text: str) -> None:
    assert times(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.25, "0.25"), (1.0, "1.00"), (81.94, "81.9"), (1234.5, "1,234")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_marked_blocks_are_rewritten(good_run: Run, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(
        "before\n<!-- bench:optim size=gpt2-small -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench:optim device=cuda -->\n<!-- /bench -->\n<!-- bench:plot path=p.svg -->\n<!-- /bench -->\nafter\n"
    )
    drawn = []

    def find(kind: str, family: str) -> Run | None:
        assert family == "optim"
        return good_run if kind == "cpu" else None

    def picture(path: Path, run: Run, options: dict[str, str]) -> str:
        drawn.append(options)
        return "![a plot](p.svg)"

    assert documents.inject(document, find, picture) == 3
    once = document.read_text()
    assert "old" not in once
    assert "| AdamW |" in once
    assert "<!-- bench:optim device=cuda -->\nnot measured\n<!-- /bench -->" in once
    assert "![a plot](p.svg)" in once
    assert drawn == [{"path": "p.svg", "family": "optim"}]
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    documents.inject(document, find, picture)
    assert document.read_text() == once


def test_unknown_marker(good_run: Run, tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("<!-- bench:optin -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match=r"expected a marker machine, .* kv or spectral; got 'optin'"):
        documents.inject(document, lambda *_: good_run, lambda *_: "")


def test_traffic_table() -> None:
    text = counted.traffic_grid().markdown()
    assert "| AdamW | g / p m v | 28 | 22 |" in text
    assert "| LAMB | g / –; g p / m v; m v / p | 44 | 34 |" in text


def test_results_come_back_as_saved(good_run: Run, tmp_path: Path) -> None:
    path = good_run.save(tmp_path)
    assert path == tmp_path / "some-processor-2-threads" / "2030-01-02T0304-abc1234.json"
    assert results.load(path) == good_run


def test_a_summary_takes_each_family_from_its_own_run(good_run: Run, make_row: MakeRow, make_run: MakeRun) -> None:
    row = dataclasses.replace(make_row("x", "native", 60.0, floor=55.0), family="spectral", op="spectral_step_")
    runs = {"optim": good_run, "spectral": make_run([row])}
    assert [line[0] for line in tables.summary_grid(runs.get).lines] == ["optim", "spectral"]
    text = documents.block("summary", {"family": "optim"}, runs.get, lambda run, options: "")
    assert "| optim |" in text
    assert "| spectral |" in text
    assert f"optim: {tables.machine_line(good_run)}" in text


def test_files_of_older_runs_can_be_read() -> None:
    """Those that documents quote: written before a run knew its compiler's speed and what it left out."""
    for path in results.files(results.RESULTS):
        run = results.load(path)
        assert run.rows
        assert tables.grids(run)
        assert tables.summary_grid(dict.fromkeys(registry.FAMILIES, run).get).lines


def test_newest_of_a_kind(make_run: MakeRun, tmp_path: Path) -> None:
    assert results.newest("cpu", tmp_path) is None
    for date in ("2030-01-03", "2030-01-04", "2030-01-02"):
        make_run([], date=f"{date}T00:00:00+00:00").save(tmp_path)
    make_run([], kind="cuda", date="2030-01-09T00:00:00+00:00").save(tmp_path)
    found = results.newest("cpu", tmp_path)
    assert found is not None
    assert found.date.startswith("2030-01-04")


def test_newest_of_a_family(make_row: MakeRow, make_run: MakeRun, tmp_path: Path) -> None:
    """A later run of something else alone does not take the place of one that a table can be made of."""
    for date, family in (("2030-01-02", "optim"), ("2030-01-03", "rational")):
        make_run([make_row("a", "native", 1.0, family=family)], date=f"{date}T00:00:00+00:00").save(tmp_path)
    found = {family: results.newest("cpu", tmp_path, family) for family in ("optim", "rational", "none")}
    assert {family: run and run.date[:10] for family, run in found.items()} == {
        "optim": "2030-01-02",
        "rational": "2030-01-03",
        "none": None,
    }


def test_other_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="expected a result file of schema 1"):
        results.load(path)


def test_facts_of_this_machine() -> None:
    run = results.start(torch.device("cpu"), Probe(1.0, 2.0, 3.0), None)
    assert (run.copy_gbps, run.matrix_tflops, run.compile_s) == (1.0, 2.0, 3.0)
    assert run.machine["device"]
    assert run.machine["torch_cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert run.machine["vector_extensions"] or platform.machine() != "x86_64"
    assert run.machine["threads"] == torch.get_num_threads()
    assert run.versions["torch"]


def test_plot_names_device_and_optimizers(good_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    draw(good_run, path)
    text = path.read_text()
    for words in ("GPT-2 small", "Some Processor, 2 threads", "AdamW", "Lion", "singlepass", "1.09x"):
        assert words in text
    draw(good_run, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing(good_run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected rows of vit-b16"):
        draw(good_run, tmp_path / "plot.svg", size="vit-b16")
