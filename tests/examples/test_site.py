# SPDX-License-Identifier: Apache-2.0
"""The documentation site: every page and public name is in it, it builds without a warning, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FACES = ("functional", "kv", "nn", "optim", "spectral")
GUIDES = ("kv.md", "low-rank-kv.md", "optim.md", "rational.md", "spectral.md")
ORDER = [
    "When to use it",
    "Quick start",
    "What it costs and saves",
    "How it works",
    "Where paper and code differ",
    "Limits",
]


def test_the_front_page_lists_every_page() -> None:
    """The sidebar of the site is made from that list."""
    listed = (DOCS / "index.md").read_text(encoding="utf-8").partition("\n## All pages\n")[2]
    targets = [(DOCS / target).resolve() for target in re.findall(r"^\* \[.*?\]\((\S+)\)", listed, re.MULTILINE)]
    pages = {*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), ROOT / "csrc" / "README.md", *ROOT.glob("*.md")}
    assert sorted(targets) == sorted(pages - {DOCS / "index.md", ROOT / "README.md"})


@pytest.mark.parametrize("face", FACES)
def test_the_reference_has_every_public_name(face: str) -> None:
    text = (DOCS / "api" / f"{face}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`(\w+)`|\[`(\w+)`\]\((\w+)\.md\)) \|", text, re.MULTILINE)
    public = {*importlib.import_module(f"singlepass.{face}").__all__} | ({"ZipCache"} if face == "kv" else set())
    assert {here or there for here, there, _ in rows} >= public
    for _, there, page in rows:
        if there:  # where it is documented once, for all who show it
            assert f"| `{there}` |" in (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_have_one_order(guide: str) -> None:
    heads = re.findall(r"^## (.*)$", (DOCS / guide).read_text(encoding="utf-8"), re.MULTILINE)
    assert [head for head in heads if head in ORDER] == ORDER


def test_the_papers_of_all_methods_can_be_cited() -> None:
    cited = set(re.findall(r"arXiv:([\d.]+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8")))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "python").rglob("*.py")]
    assert cited == {number for text in sources for number in re.findall(r"arXiv (\d{4}\.\d{5})", text)}


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name == "id":
                self.anchors.add(value)


@pytest.mark.deep("Sphinx renders every page, and imports every public name")
def test_the_site_is_complete(tmp_path: Path) -> None:
    """As `make docs` builds it."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, ".", tmp_path / "html"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

    pages = {path: Page(path) for path in (tmp_path / "html").rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchored = target not in pages or not parts.fragment or unquote(parts.fragment) in pages[target].anchors
            if not target.exists() or not anchored:
                lost.append(f"{path.name}: {link}")
    assert not lost

    for face in FACES:
        anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "api"))
        text = (DOCS / "api" / f"{face}.md").read_text(encoding="utf-8")
        assert {f"singlepass.{face}.{name}" for name in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)} <= anchors
