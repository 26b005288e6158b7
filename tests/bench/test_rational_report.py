# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from singlepass.bench import checks, cli, documents, registry, tables
from singlepass.bench import run as bench_run
from singlepass.bench.floor import require_stream
from singlepass.bench.plot import draw
from singlepass.bench.probe import Probe
from singlepass.bench.rational import cases as rational
from singlepass.bench.rational.activations import BACKWARD, FORWARD, Activation
from singlepass.bench.results import Row, Run

MakeRow = Callable[..., Row]
MakeRun = Callable[..., Run]
SIZE = "16x197x768"
ELEMENTS = 16 * 197 * 768


@pytest.fixture
def row(make_row: MakeRow) -> MakeRow:
    def make(op: str, provider: str, ms: float | None, **values: object) -> Row:
        trips = 5 if op == BACKWARD else 2
        facts: dict[str, object] = {
            "family": "rational",
            "size": SIZE,
            "elements": ELEMENTS,
            "input_bytes": 4 * ELEMENTS,
            "bytes": 4 * trips * ELEMENTS,
            "floor": float(trips),
            "extra_bytes": 3 << 20,
        }
        return make_row(op, provider, ms, **(facts | values))

    return make


@pytest.fixture
def good_run(row: MakeRow, make_run: MakeRun) -> Run:
    times = {
        FORWARD: {"native": 1.9, "gelu": 2.0, "eager": 50.0, "compile": 4.0},
        BACKWARD: {"native": 9.9, "gelu": 10.0, "eager": 200.0, "compile": 40.0},
    }
    return make_run([row(op, name, ms) for op, providers in times.items() for name, ms in providers.items()])


def verdicts(run: Run) -> dict[tuple[str, str], bool | None]:
    return {(c.bar, c.case.split(",")[0]): c.holds for c in checks.check(run)}


def replace_row(run: Run, new: Row) -> None:
    run.rows = [new if old.key == new.key else old for old in run.rows]


def test_all_bars_hold(good_run: Run) -> None:
    assert verdicts(good_run) == dict.fromkeys(
        [
            ("time over gelu", "forward"),
            ("time over gelu", "forward + backward"),
            ("times faster than eager", "forward + backward"),
            ("times faster than torch.compile", "forward + backward"),
        ],
        True,
    )


@pytest.mark.parametrize(
    ("op", "provider", "ms", "bar"),
    [
        (FORWARD, "native", 2.1, "time over gelu"),
        (BACKWARD, "native", 10.2, "time over gelu"),
        (BACKWARD, "eager", 190.0, "times faster than eager"),
        (BACKWARD, "compile", 39.0, "times faster than torch.compile"),
    ],
)
def test_each_bar_can_fail(good_run: Run, row: MakeRow, op: str, provider: str, ms: float, bar: str) -> None:
    replace_row(good_run, row(op, provider, ms))
    assert verdicts(good_run)[bar, "forward + backward" if op == BACKWARD else "forward"] is False


@pytest.mark.parametrize("provider", ["native", "gelu", "eager", "compile"])
def test_what_is_not_measured_neither_holds_nor_fails(good_run: Run, row: MakeRow, provider: str) -> None:
    replace_row(good_run, row(BACKWARD, provider, None, reason="out of time"))
    found = verdicts(good_run).values()
    assert None in found
    assert False not in found


def test_gpu_bars(row: MakeRow, make_run: MakeRun) -> None:
    elements = 20_000_000

    def found(forward: float, both: float, peer: float | None = 90.0, size: int = elements) -> dict[str, bool | None]:
        facts = {"elements": size, "size": "large"}
        rows = [row(FORWARD, "native", forward, bytes=8 * elements, **facts)]
        rows += [row(BACKWARD, "native", both, bytes=20 * elements, **facts)]
        rows += [row(BACKWARD, name, peer, **facts) for name in ("kat_rational", "flashkat")]
        run = make_run(rows, kind="cuda")
        return {
            f"{c.bar}, {c.case.split(',')[0]}": c.holds
            for c in checks.check(run)
            if c.bar != "time over the best peer" or "backward" in c.case
        }

    # At the copy bandwidth of 40 GB/s, the floor bytes take 4 ms forward and 6 ms backward.
    assert found(4.5, 11.5) == dict.fromkeys(
        [
            "share of copy bandwidth, forward",
            "share of copy bandwidth, forward + backward",
            "share of copy bandwidth, backward alone",
            "time over the best peer, forward + backward",
        ],
        True,
    )
    assert found(4.8, 11.5)["share of copy bandwidth, forward"] is False
    assert found(4.5, 12.1)["share of copy bandwidth, forward + backward"] is False
    assert found(4.1, 11.5)["share of copy bandwidth, backward alone"] is False
    assert found(4.5, 11.5, peer=11.0)["time over the best peer, forward + backward"] is False
    assert found(4.5, 11.5, peer=None)["time over the best peer, forward + backward"] is None
    assert set(found(4.5, 11.5, size=1_000_000)) == {"time over the best peer, forward + backward"}


def test_bars_of_one_family(good_run: Run, make_row: MakeRow) -> None:
    good_run.rows.append(make_row("AdamW", "native", 82.0))
    assert len(checks.check(good_run, "rational")) == 4
    assert len(checks.check(good_run)) > 4
    assert {c.case for c in checks.check(good_run, "optim")} == {"AdamW gpt2-small float32"}


def test_table(good_run: Run) -> None:
    (grid,) = tables.grids(good_run)
    assert grid.title == "rational activation, float32: ms (multiple of the floor)"
    forward, both = (dict(zip(grid.head, line, strict=True)) for line in grid.lines)
    assert forward["x, pass"] == f"{SIZE}, forward"
    assert both == {
        "x, pass": f"{SIZE}, forward + backward",
        "**singlepass**": "9.90 (1.98x)",
        "torch GELU": "10.0 (2.00x)",
        "torch.compile": "40.0 (8.00x)",
        "eager": "200 (40.0x)",
    }


def test_table_of_the_gpu(row: MakeRow, make_run: MakeRun) -> None:
    rows = [row(FORWARD, name, ms) for name, ms in (("triton", 2.2), ("kat_rational", 9.0), ("flashkat", 8.0))]
    rows.append(row(FORWARD, "native", 2.1, launches=1, host_us=12.0))
    (grid,) = tables.grids(make_run(rows, kind="cuda"))
    (line,) = (dict(zip(grid.head, line, strict=True)) for line in grid.lines)
    assert line["Triton"].startswith("2.20 (")
    assert line["best peer"].startswith("8.00 (")
    assert grid.notes == ["[1] flashkat."]
    assert (line["launches"], line["host us"]) == ("1.00", "12.0")


def test_tables_of_both_families(good_run: Run, make_row: MakeRow) -> None:
    good_run.rows.append(make_row("AdamW", "native", 82.0))
    assert [grid.title.split(",")[0] for grid in tables.grids(good_run)] == ["gpt2-small", "rational activation"]
    assert [grid.title.split(",")[0] for grid in tables.grids(good_run, family="rational")] == ["rational activation"]


def test_marked_blocks_come_from_runs_of_the_family(good_run: Run, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    names = ("rational", "rational device=cuda", "checks family=rational", "machine family=rational", "optim")
    document.write_text("".join(f"<!-- bench:{name} -->\nold\n<!-- /bench -->\n" for name in names))
    runs = {("cpu", "rational"): good_run}
    assert documents.inject(document, lambda *key: runs.get(key), lambda *_: "") == len(names)
    texts = [match["old"] for match in documents.MARKER.finditer(document.read_text())]
    assert f"| {SIZE}, forward + backward | 9.90 (1.98x) |" in texts[0]
    assert texts[1] == "not measured\n"
    assert "| time over gelu |" in texts[2]
    assert "Some Processor" in texts[3]
    assert texts[4] == "not measured\n"


def test_plot(good_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    draw(good_run, path, SIZE, family="rational")
    text = path.read_text()
    for words in (
        "Rational activation, (16, 197, 768), float32",
        "forward + backward",
        "gelu of torch",
        "1.98x",
        "a call",
    ):
        assert words in text


def test_plot_command_finds_a_size(good_run: Run, tmp_path: Path) -> None:
    result = good_run.save(tmp_path)
    output = tmp_path / "plot.svg"
    assert cli.main(["plot", str(result), "--family", "rational", "--output", str(output)]) == 0
    assert output.exists()
    with pytest.raises(SystemExit, match="expected rows of family optim"):
        cli.main(["plot", str(result), "--output", str(output)])


def test_table_command_draws_the_family(good_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = Path("docs/page.md")
    document.parent.mkdir()
    document.write_text("<!-- bench:plot family=rational -->\n<!-- /bench -->\n")
    assert cli.main(["table", str(good_run.save(Path("out"))), "--write", str(document)]) == 0
    assert "![Rational activation, time relative" in document.read_text()
    assert Path(f"docs/images/rational-cpu-{SIZE}-float32.svg").exists()


def test_list_names_both_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--device", "cpu", "--family", "rational", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert f"rational/rational/{SIZE}/float32" in shown
    assert f"rational/rational_backward/{SIZE}/float32" in shown
    assert "optim/" not in shown


@pytest.mark.slow("a run of the benchmark")
def test_run_end_to_end(
    small_buffers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = torch.device("cpu")
    try:
        require_stream(cpu)
    except ValueError as reason:
        pytest.skip(str(reason))
    make = partial(rational.case, cpu, activation=Activation((2, 5, 64)), dtype=torch.bfloat16)
    small = [make(op=op) for op in (FORWARD, BACKWARD)]
    assert {p.column for case in small for p in case.providers} <= set(registry.COLUMNS)
    monkeypatch.setattr(bench_run, "cases", lambda device: small)
    monkeypatch.setattr(bench_run, "quick_cases", lambda device, probe: [])
    monkeypatch.setattr(bench_run, "probe", lambda device: Probe(10.0, 0.1, 2.0))
    arguments = ["--device=cpu", "--seconds=0.01", "--provider=native,gelu,eager", f"--results={tmp_path}"]
    assert cli.main(["run", *arguments]) == 0
    (path,) = tmp_path.glob("*/*.json")
    assert path.with_name(f"{path.stem}-rational.svg").exists()
    rows = cli.results.load(path).rows
    assert {row.status for row in rows} == {"ok"}
    assert {row.op for row in rows} == {FORWARD, BACKWARD}
    assert all(row.gate_error <= 1.0 for row in rows if row.gate_error is not None)
    assert "2x5x64, forward + backward" in capsys.readouterr().out
