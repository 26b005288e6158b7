# SPDX-License-Identifier: Apache-2.0
"""The README and the guides: each Python block runs alone, links lead somewhere, tables are what scripts print."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ENVS.md", "csrc/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RATIONAL = ROOT / "docs" / "rational.md"
OPTIONAL = ("accelerate", "pytorch_lightning", "scipy", "timm", "transformers")  # blocks that need one are skipped


def _blocks() -> Iterator[object]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 2
            yield pytest.param(page.name, line, match[1], id=f"{page.name}:{line}")


def _needed(block: str) -> set[str]:
    """Packages beside torch and singlepass that a block imports, or that what it calls imports."""
    needed = set(re.findall(r"^ *(?:import|from) (\w+)", block, re.MULTILINE)) & set(OPTIONAL)
    needed |= {"transformers"} if "ZipCache(" in block else set()
    needed |= {"accelerate"} if "Trainer(" in block and "transformers" in needed else set()
    return needed | ({"scipy"} if "fit_rational(" in block else set())


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # of DataLoaders, on a machine without a GPU
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")  # which proposes workers, a logger and more
@pytest.mark.parametrize(("page", "line", "block"), _blocks())
def test_block_runs_alone(page: str, line: int, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a namespace of its own, as it is when it is copied."""
    for package in sorted(_needed(block)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the block needs {package}, which is not installed")
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (line - 1) + block, page, "exec")
    logger = logging.getLogger("singlepass")
    level = logger.level
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            exec(code, {"__name__": "__main__"})
    finally:
        logger.setLevel(level)


def test_every_guide_of_a_family_has_blocks() -> None:
    pages = {param.values[0] for param in _blocks()}  # type: ignore[attr-defined]
    assert pages >= {"README.md", "kv.md", "optim.md", "rational.md", "spectral.md", "training.md"}


def _anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pictures_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.fixture
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("matplotlib", reason="the examples need matplotlib: pip install '.[examples]'")
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
