# SPDX-License-Identifier: Apache-2.0
"""examples/compress_kv_text.py: it runs, is deterministic, and docs/kv.md says what its result file does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _package in ("matplotlib", "rich", "transformers"):
    pytest.importorskip(_package, reason=f"the example needs {_package}: pip install '.[examples,kv]'")


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("compress_kv_text")


@pytest.mark.slow("trains a model, and compresses its cache in every way twice")
def test_a_quick_run(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "result.json"
    result = example.main(["--quick", "--out", str(path)])
    printed = capsys.readouterr().out

    assert json.loads(path.read_text()) == result
    assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")
    assert example.PAPER in printed
    rows = example.rows_of(result)
    assert [row.name for row in rows] == [scheme.name for scheme in example.schemes()]
    for row in rows:
        assert len(row.losses) == len(row.found) == 2
        assert all(math.isfinite(x) for x in row.losses)
        assert (row.bits is None) == (row.family == "quanto")
    bits = [row.bits for row in rows if row.family == "zipcache"]
    assert bits == sorted(bits, reverse=True)
    eight = rows[1]
    assert eight.losses == pytest.approx(rows[0].losses, abs=0.01)

    again = example.main(["--quick", "--reuse", "--out", str(path)])
    assert again["training"] == result["training"]
    for old, new in zip(result["rows"], again["rows"], strict=True):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}


def test_the_page_says_what_the_result_file_does(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(example.KEPT.read_text(encoding="utf-8"))
    page = example.DOCUMENT.read_text(encoding="utf-8")
    assert example.markdown(result) in page
    assert example.PICTURE.exists()
    copy = tmp_path / "kv.md"
    copy.write_text(page.replace(example.markdown(result), "old\n"), encoding="utf-8")
    monkeypatch.setattr(example, "DOCUMENT", copy)
    monkeypatch.setattr(example, "PICTURE", tmp_path / "picture.svg")
    kept, copied = example.KEPT, tmp_path / "results" / "kept.json"
    monkeypatch.setattr(example, "KEPT", copied)
    assert example.main(["--docs", "--out", str(kept)]) == result
    assert copied.read_bytes() == kept.read_bytes()
    assert copy.read_text(encoding="utf-8") == page
    assert "<svg" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


def test_noise_is_two_standard_errors(example: ModuleType) -> None:
    import _kv_rows as rows

    assert rows.noise((-0.2, 0.1)) == rows.noise((0.1, 0.1)) == "within noise"
    assert rows.noise((0.21, 0.1)) == rows.noise((-0.21, 0.1)) == "more than noise"


@pytest.mark.parametrize(("paper", "word"), [(88, "holds"), (70, "fails"), (42, "fails")])
def test_the_verdict(example: ModuleType, paper: int, word: str) -> None:
    """Of 100 values 40 are found in 2 bits, and 90 in 4."""
    import _kv_rows as rows

    found = {rows.INT2: 40, rows.INT4: 90, rows.PAPER: paper}
    made = [rows.Row(name, "", None, None, found=[1] * n + [0] * (100 - n)) for name, n in found.items()]
    assert rows.verdict(made).endswith(word)


def test_lists_can_be_looked_up(example: ModuleType) -> None:
    """A question ends each prompt, and its answer stands in the list; values that training counts were said before."""
    import _text as text

    generator = torch.Generator().manual_seed(0)
    prompts, asked = text.needles(3, 20, 4, generator)
    for prompt, line in zip(prompts, asked, strict=True):
        whole, answer = bytes(prompt.tolist()), bytes(line.tolist())
        assert len({whole[i] for i in range(0, 20 * text.LINE, text.LINE)}) == 20
        assert answer in whole
        assert whole[20 * text.LINE :] == b"?" + answer[:1] + b"\n"
    asking = set()
    for length in (65, 129) * 8:
        tokens, known = text.lookups(length, generator)
        assert tokens.shape == known.shape == (length,)
        assert 0.04 < known.float().mean() <= 0.5
        whole = bytes(tokens.tolist())
        asking.add(b"?" in whole)
        for i in known.nonzero().flatten().tolist():
            line = whole.rindex(b"\n", 0, i) + 1
            assert whole[line : i + 1] in whole[:line]
            assert chr(whole[i]).isupper()
    assert asking == {False, True}


def test_the_same_weights_twice(example: ModuleType) -> None:
    import _text as text

    torch.set_num_threads(1)
    settings, corpus = text.Training(steps=2, tokens=256, hidden=64, layers=2), text.read_corpus()
    assert 0.02 < len(corpus.held_out) / len(corpus.train) < 0.3
    (_, first), (_, again) = (text.train(settings, corpus, lambda curves: None) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "result.txt"], "--out: expected a name that ends in .json; got result.txt"),
        (["--steps", "0"], "--steps: expected at least 1; got 0"),
        (["--out", "none.json", "--docs"], "--docs: expected none.json; got no such file"),
        (["--out", "none.json", "--reuse"], "--reuse: expected none.pt; got no such file"),
    ],
)
def test_bad_arguments_are_refused(
    example: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err
