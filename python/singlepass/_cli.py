# SPDX-License-Identifier: Apache-2.0
"""The command ``singlepass``."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from . import __version__
from ._errors import message

_COMMANDS = {
    "info": ("_info", "show which backend runs each op here, and why the others do not"),
    "bench": ("bench.cli", "measure the ops on this machine and compare with other packages"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one of the subcommands and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `singlepass info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 128 + signal.SIGPIPE
    return status


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"singlepass {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: singlepass COMMAND [options]\n       singlepass --version\n")
        for name, (_, text) in _COMMANDS.items():
            print(f"  {name:8} {text}")
        return 0 if argv else 2
    if argv[0] not in _COMMANDS:
        known = f"a command among {', '.join(_COMMANDS)}"
        print(message("singlepass", known, repr(argv[0]), "See singlepass --help."), file=sys.stderr)
        return 2
    module = importlib.import_module(f"{__package__}.{_COMMANDS[argv[0]][0]}")
    return int(module.main(argv[1:]))
