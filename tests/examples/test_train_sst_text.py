# SPDX-License-Identifier: Apache-2.0
"""examples/train_sst_text.py: it runs, all methods start alike, and docs/spectral.md says what its result file does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

for _package in ("matplotlib", "rich"):
    pytest.importorskip(_package, reason=f"the example needs {_package}: pip install '.[examples]'")


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("train_sst_text")


@pytest.mark.slow("trains four models twice")
def test_a_quick_run(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    arguments = ["--quick", "--sweep", "--seeds", "1", "--out", str(path)]
    result = example.main(arguments)
    printed = capsys.readouterr().out

    assert json.loads(path.read_text()) == result
    assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")
    assert [row["method"] for row in result["rows"]] == list(example.METHODS)
    assert all(math.isfinite(row["loss"]) for row in result["rows"] + result["sweep"])
    assert all(method in printed for method in example.METHODS)
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["SST"]["trained"] <= rows["LoRA"]["trained"] == rows["ReLoRA"]["trained"]
    assert all(bool(row["drifts"]) == (method == "SST") for method, row in rows.items())

    again = example.main(arguments)
    for old, new in zip(result["rows"], again["rows"], strict=True):
        assert {**old, "step_ms": 0} == {**new, "step_ms": 0}


def test_all_methods_start_as_one_function(example: ModuleType) -> None:
    import _from_scratch as scratch

    settings = scratch.Settings(dim=32, depth=1)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        first, *others = (scratch.Trainer(m, settings, 1e-3, seed=3).model(tokens) for m in example.METHODS)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_a_restart_changes_nothing_but_the_moments(load_example: Callable[[str], ModuleType]) -> None:
    lora = load_example("_lora")
    linear = nn.Linear(6, 5, bias=False)
    layer = lora.LoRALinear(linear, 2, 2.0)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), linear(x))
    assert not layer.weight.requires_grad
    optimizer = torch.optim.AdamW([layer.a, layer.b], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    before, a = layer(x).detach(), layer.a.detach().clone()
    assert not torch.allclose(before, linear(x))
    torch.testing.assert_close(before, x @ (layer.weight + 2.0 * layer.b @ layer.a).mT)
    lora.merge_and_restart(layer, optimizer)
    torch.testing.assert_close(layer(x), before)
    assert not optimizer.state
    assert not torch.equal(layer.a, a)
    assert not layer.b.any()


def test_the_rates_that_did_best(example: ModuleType) -> None:
    losses = {"full rank": (2.0, 1.0), "SST": (1.0, 2.0), "LoRA": (1.0, math.inf), "ReLoRA": (3.0, 2.0)}
    sweep = [{"method": m, "lr": lr, "loss": loss[i]} for i, lr in enumerate((0.1, 0.2)) for m, loss in losses.items()]
    assert example.best_rates(sweep) == {"full rank": 0.2, "SST": 0.1, "LoRA": 0.1, "ReLoRA": 0.2}


def test_the_page_says_what_the_result_file_does(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(example.KEPT.read_text(encoding="utf-8"))
    page = example.DOCUMENT.read_text(encoding="utf-8")
    assert example.markdown(result) in page
    assert example.PICTURE.exists()
    assert {row["method"]: row["lr"] for row in result["rows"]} == example.best_rates(result["sweep"])
    copy = tmp_path / "spectral.md"
    copy.write_text(page.replace(example.markdown(result), "old\n"), encoding="utf-8")
    monkeypatch.setattr(example, "DOCUMENT", copy)
    monkeypatch.setattr(example, "PICTURE", tmp_path / "picture.svg")
    kept, copied = example.KEPT, tmp_path / "results" / "kept.json"
    monkeypatch.setattr(example, "KEPT", copied)
    assert example.main(["--docs", "--out", str(kept)]) == result
    assert copied.read_bytes() == kept.read_bytes()
    assert copy.read_text(encoding="utf-8") == page
    assert "<svg" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "result.txt"], "--out: expected a name that ends in .json; got result.txt"),
        (["--steps", "0"], "--steps: expected at least 1; got 0"),
        (["--seeds", "0"], "--seeds: expected at least 1; got 0"),
        (["--out", "none.json", "--docs"], "--docs: expected none.json; got no such file"),
    ],
)
def test_bad_arguments_are_refused(
    example: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
