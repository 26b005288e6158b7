# SPDX-License-Identifier: Apache-2.0
"""What a run says to a person: how far it is, which rooms passed, what was skipped and why, and what is slow."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import PurePath

import pytest

UNCOLLECTED = pytest.StashKey[int]()  # cases that only a GPU can run, where there is none
SLOW = 5.0  # seconds above which a test says why it is as slow as that
REASONS = frozenset({"deep", "inductor", "large", "release", "slow"})
STEPS = 10  # of progress


def room(nodeid: str) -> str:
    """The folder of a test: ``optim`` for ``tests/optim/test_rules.py::test``."""
    parts = PurePath(nodeid.partition("::")[0]).parts
    if parts[0] != "tests":
        return "docstrings"
    return parts[1] if len(parts) > 2 else "common"


def listing(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


class Report:
    """A few lines in place of a dot for each test, where workers share the tests (``-n``) and nobody asks for more."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.calm = bool(config.getoption("numprocesses", None)) and config.get_verbosity() == 0
        self.watch = not config.getoption("hypothesis_profile", None)  # a longer one makes property tests slow
        self.began = time.monotonic()
        self.session: pytest.Session | None = None
        self.ended = 0
        self.slow: dict[str, float] = {}

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        counts = (report.passed and report.when == "call") or report.skipped
        return (report.outcome, "", "") if self.calm and counts and not hasattr(report, "wasxfail") else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.watch and report.duration > SLOW and REASONS.isdisjoint(report.keywords):
            self.slow[report.nodeid] = report.duration
        if report.when != "teardown":
            return
        self.ended += 1
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        total = self.session.testscollected if self.session else 0
        if self.calm and terminal and total and self.ended * STEPS // total > (self.ended - 1) * STEPS // total:
            seconds = time.monotonic() - self.began
            terminal.write_line(f"{self.ended / total:4.0%} of {total:,} tests, {seconds:.0f} s")

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["uncollected"] = self.config.stash[UNCOLLECTED]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """Every worker collects the same."""
        output = getattr(node, "workeroutput", {})
        self.config.stash[UNCOLLECTED] = output.get("uncollected", self.config.stash[UNCOLLECTED])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        stats, line = terminalreporter.stats, terminalreporter.write_line
        terminalreporter.section("rooms")
        for outcome in ("passed", "failed", "error"):
            if counts := Counter(room(report.nodeid) for report in stats.get(outcome, ())):
                line(f"{outcome:8} {listing(counts)}")
        if uncollected := self.config.stash[UNCOLLECTED]:
            line(f"left out {uncollected:,} cases that only a GPU can run: torch sees none (docs/gpu-proof.md)")
        reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", ()))
        for reason, count in sorted(reasons.items()):
            line(f"skipped  {count:,}: {reason}")
        for nodeid, seconds in sorted(self.slow.items(), key=lambda pair: -pair[1]):
            line(f"slow     {seconds:.0f} s without a reason in @pytest.mark.slow: {nodeid}")
