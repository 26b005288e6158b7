# SPDX-License-Identifier: Apache-2.0
"""A report in one file: what the run showed, and its pictures."""

from __future__ import annotations

import base64
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from .registry import FAMILIES

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>singlepass bench</title>
<style>
{stylesheet}
body {{ color: {foreground}; background-color: {background}; font-family: sans-serif; margin: 2rem; }}
pre {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; line-height: 1.25; }}
pre {{ overflow-x: auto; }}
img {{ max-width: 100%; display: block; margin: 1.5rem 0; }}
</style>
</head>
<body>
<h1>singlepass bench</h1>
PICTURES
<pre><code>{code}</code></pre>
</body>
</html>
"""


def write_report(console: Console, result: Path) -> Path:
    """Writes what a recording console has shown, and the pictures of a result file, as a page without other files."""
    pictures = []
    for family in FAMILIES:
        path = result.with_name(f"{result.stem}-{family}.svg")
        if not path.exists():
            continue
        data = base64.b64encode(path.read_bytes()).decode()
        words = f"Time of each provider in multiples of the floor: {family}"
        pictures.append(f'<img alt="{words}" src="data:image/svg+xml;base64,{data}">')
    page = console.export_html(theme=DEFAULT_TERMINAL_THEME, code_format=PAGE, clear=False)
    path = result.with_suffix(".html")
    path.write_text(page.replace("PICTURES", "\n".join(pictures), 1), encoding="utf-8")
    return path
