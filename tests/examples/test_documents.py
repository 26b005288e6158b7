# SPDX-License-Identifier: Apache-2.0
"""The README and the guides: their Python runs, and the table of errors is what its script prints."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
RATIONAL = ROOT / "docs" / "rational.md"
KV = ROOT / "docs" / "kv.md"
SPECTRAL = ROOT / "docs" / "spectral.md"
OTHERS = ("timm", "transformers")  # packages whose snippets run where they are installed


@pytest.mark.parametrize("document", [ROOT / "README.md", RATIONAL, KV, SPECTRAL], ids=lambda path: path.name)
def test_snippets_run(document: Path) -> None:
    """In the order of the page, in one namespace."""
    snippets = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert snippets
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for snippet in snippets:
            needed = [
                package for package in OTHERS if re.search(rf"^(?:import|from) {package}\b", snippet, re.MULTILINE)
            ]
            needed += ["transformers"] * ("ZipCache(" in snippet)
            if all(importlib.util.find_spec(package) for package in needed):
                exec(compile(snippet, document.name, "exec"), names)


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("matplotlib", reason="the examples need matplotlib: pip install 'singlepass[examples]'")
    return load_example("plot_rational_tables")


def test_the_table_of_errors(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """python examples/plot_rational_tables.py prints it."""
    assert set(example.FORMULAS) == set(example.TARGETS)
    example.main(["--out", str(tmp_path / "tables.svg")])
    table = capsys.readouterr().out
    assert "<svg" in (tmp_path / "tables.svg").read_text(encoding="utf-8")
    assert table == example.markdown()
    assert table in RATIONAL.read_text(encoding="utf-8")
    with contextlib.suppress(SystemExit):
        example.main(["--out", "tables.txt"])
    assert "--out: expected a name that ends in" in capsys.readouterr().err


@pytest.mark.parametrize("document", [RATIONAL, KV], ids=lambda path: path.name)
def test_pictures_and_links_of_the_page_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target
