# SPDX-License-Identifier: Apache-2.0
"""Tests that run in several processes, the ranks of one group: started once, for all tests in a row that need them.

@on_ranks(2)
def test_something(name: str) -> None:
    ...  # runs on both ranks; fails where it fails on one of them
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import inspect
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60.0  # seconds for one test on a loaded machine; what waits for another rank waits for ever
START_LIMIT = 180.0


class Ranks:
    """Processes that run what they are told. Where one hangs or has ended, all are started anew."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, module: str, name: str, arguments: dict[str, Any], limit: float) -> None:
        """Runs the body of a test on all ranks, and fails with the tracebacks of all if it fails on one."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((module, name, arguments))
        self._collect(limit)

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path, key = Path(self.folder.name), secrets.token_bytes(16)
        environment = os.environ | {"RANKS_KEY": key.hex(), "OMP_NUM_THREADS": "1"}
        with Listener(str(path / "socket"), family="AF_UNIX", backlog=self.size, authkey=key) as listener:
            for rank in range(self.size):
                command = f"from tests.ranks import serve; serve({rank}, {self.size}, {str(path)!r})"
                with (path / f"log{rank}").open("wb") as log:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, "-c", command], cwd=ROOT, env=environment, stdout=log, stderr=log
                        )
                    )
            self.connections = [listener.accept() for _ in self.processes]
        self._collect(START_LIMIT)

    def _collect(self, limit: float) -> None:
        until = time.monotonic() + limit
        reports = [self._report(connection, until) for connection in self.connections]
        if any(report != "" for report in reports):
            logs = self.stop() if None in reports else [""] * self.size
            parts = (
                f"rank {rank}: {'passed' if report == '' else report or 'hangs, or has ended'}\n{logs[rank]}"
                for rank, report in enumerate(reports)
            )
            pytest.fail("\n".join(parts), pytrace=False)

    @staticmethod
    def _report(connection: Connection, until: float) -> str | None:
        """The traceback of a test that failed, "" of one that passed; None if there comes none."""
        try:
            return connection.recv() if connection.poll(max(until - time.monotonic(), 1.0)) else None
        except EOFError:
            return None

    def stop(self) -> list[str]:
        """Ends the processes; returns what they printed, and where those stood that were at work."""
        logs = []
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)  # which prints the stacks
        time.sleep(0.5 if self.processes else 0.0)
        for rank, process in enumerate(self.processes):
            process.kill()
            process.wait()
            assert self.folder is not None
            logs.append((Path(self.folder.name) / f"log{rank}").read_text(errors="replace"))
        for connection in self.connections:
            connection.close()
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.connections, self.folder = [], [], None
        return logs


def serve(rank: int, size: int, folder: str) -> None:
    """What each process does: runs tests until it is killed, or whoever started it has gone."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connection = Client(f"{folder}/socket", family="AF_UNIX", authkey=bytes.fromhex(os.environ["RANKS_KEY"]))
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    connection.send("")
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            return
        report = ""
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), name).body(**arguments)
        except BaseException:
            report = traceback.format_exc()
        connection.send(report)


def on_ranks(size: int, limit: float = LIMIT) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the body of a test run on this many ranks at the same time."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(request: pytest.FixtureRequest, **arguments: Any) -> None:
            request.getfixturevalue("ranks")(size).run(body.__module__, body.__name__, arguments, limit)

        signature = inspect.signature(body)
        mine = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = signature.replace(parameters=[mine, *signature.parameters.values()])  # type: ignore[attr-defined]
        test.body = body  # type: ignore[attr-defined]
        slow = pytest.mark.slow("the first one starts the processes")
        return pytest.mark.xdist_group(f"ranks{size}")(slow(test))

    return decorate
