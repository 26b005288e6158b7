# SPDX-License-Identifier: Apache-2.0
"""The command ``singlepass``."""

from __future__ import annotations

import importlib
import sys

from . import __version__

_COMMANDS = {
    "info": ("info", "which backend runs each op here, and why the others don't"),
    "bench": ("bench.cli", "measure the ops on this machine"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one of the subcommands and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"singlepass {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in _COMMANDS:
        print("usage: singlepass COMMAND [options]\n       singlepass --version\n")
        for name, (_, text) in _COMMANDS.items():
            print(f"  {name:8} {text}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    module = importlib.import_module(f"{__package__}.{_COMMANDS[argv[0]][0]}")
    return int(module.main(argv[1:]))
