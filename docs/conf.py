# SPDX-License-Identifier: Apache-2.0
"""The documentation site: Sphinx over the Markdown that a forge shows too. `make docs` builds it in build/docs.

Pages hold no directives, so that they read the same on a forge. The sidebar is what the front page lists under "All
pages". A page of docs/api/ lists the names of a module; here the reference of each, its docstring, is added below.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import singlepass

project = "singlepass"
author = copyright = "The singlepass authors"
version = release = singlepass.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The sources start at the root of the repository, so that pages link to each other as they do on a forge.
root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/api/*.md", "csrc/README.md", "*.md"]
exclude_patterns = ["README.md"]  # the forge's front page, in place of docs/index.md
myst_heading_anchors = 4
nitpicky = True
# Building needs no network, so signatures link to no page of another package; nor to types that only hints use.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|collections|os|typing)\..*"),
    ("py:class", r"Tensor|Module|PreTrained(Config|Model)|.*\b(Init|Model|Ranks)"),
]

autodoc_inherit_docstrings = False
autodoc_mock_imports = [name for name in ("transformers",) if find_spec(name) is None]
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

highlight_language = "none"  # of blocks that name no language
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"singlepass {release}"
html_static_path = ["site/style.css"]
html_css_files = ["style.css"]
html_extra_path = ["site/index.html"]  # leads to the front page
html_copy_source = False
html_math_renderer = "mathml"

# Of methods, those with a docstring of ours.
CLASS_OPTIONS = [
    "   :members:",
    "   :inherited-members: Cache, FusedOptimizer, Module, Optimizer, SSTLinear",
    "   :exclude-members: rule",
]
LINK = re.compile(r"\[(.+?)\]\((\S+?)\.md\)")
FILE_NAME = re.compile(r"\[[\w/.-]+\.md\]\(([\w/.-]+\.md)")  # as the text of a link


def with_titles(page: str, folder: Path) -> str:
    """Links whose text is a file's name, as on a forge, show the title of that page."""

    def link(match: re.Match[str]) -> str:
        title = (folder / match[1]).read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]
        return f"[{title}]({match[1]}"

    return FILE_NAME.sub(link, page)


def sidebar(front_page: str) -> str:
    """The lists of the front page's last section, as tables of contents: each with the bold line above as caption."""
    _, _, listed = front_page.partition("\n## All pages\n")
    trees = []
    for caption, items in re.findall(r"^\*\*(.+)\*\*\n\n((?:[*].*\n(?:  .*\n)*)+)", listed, re.MULTILINE):
        entries = [f"{title} <{page}>" for title, page in LINK.findall(items)]
        trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""]))
    return "\n".join(trees)


def reference(page: str, face: str) -> str:
    """Directives for the names in the first column of a page's tables, in their order; linked ones stand elsewhere."""
    module = import_module(f"singlepass.{face}")
    lines = ["```{eval-rst}", f".. py:module:: singlepass.{face}", ""]
    for name in re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE):
        value = getattr(module, name)
        kind = "class" if isinstance(value, type) else "function" if callable(value) else "data"
        lines += [f".. auto{kind}:: singlepass.{face}.{name}"]
        lines += CLASS_OPTIONS * (kind == "class") + [""]
    return "\n".join([*lines, "```", ""])


def add_directives(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = with_titles(source[0], app.env.doc2path(docname).parent)
    if docname == root_doc:
        source[0] += "\n" + sidebar(source[0])
    elif docname.startswith("docs/api/"):
        source[0] += "\n" + reference(source[0], docname.rpartition("/")[2])


def visit_inline_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_block_math(self: HTML5Translator, node: nodes.math_block) -> None:
    """MathML, which browsers show without a script from elsewhere."""
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_directives)
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_block_math, None))
