# SPDX-License-Identifier: Apache-2.0
"""What a stage of a proof is, and how stages are run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from .place import Place

PROVED, REFUTED, NOT_MEASURED = "proved", "refuted", "not measured"


@dataclass
class Outcome:
    """Of a stage. status: proved, refuted or not measured. said: one line. facts: what a file of results keeps."""

    status: str
    said: str
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One program and how its end is read.

    title: what is proved. phase: stages of one run side by side. command: the program with its arguments, or the reason
    why it cannot run in a place. read: makes an outcome of the place, the exit status (None: out of time) and what was
    printed. limit: seconds.
    """

    name: str
    title: str
    phase: str
    command: Callable[[Place], list[str] | str]
    read: Callable[[Place, int | None, str], Outcome]
    limit: float


def run(stages: Sequence[Stage], place: Place, log: Path, slower: float = 1.0) -> Iterator[tuple[Stage, Outcome]]:
    """Runs each in a process of its own, phase after phase; what they print goes into one file. ``slower`` multiplies
    the limits."""
    for _, phase in groupby(stages, key=lambda stage: stage.phase):
        together = list(phase)
        with ThreadPoolExecutor(len(together)) as pool:
            running = [pool.submit(run_one, stage, place, stage.limit * slower) for stage in together]
            for stage, future in zip(together, running, strict=True):
                outcome, text = future.result()
                with log.open("a") as file:
                    file.write(f"==== {stage.name}: {outcome.status}: {outcome.said}\n{text}\n\n")
                yield stage, outcome


def run_one(stage: Stage, place: Place, limit: float) -> tuple[Outcome, str]:
    begin = time.perf_counter()
    command = stage.command(place)
    if isinstance(command, str):
        return Outcome(NOT_MEASURED, command), ""
    status, text = call(command, place, limit, place.scratch / f"{stage.name}.txt")
    outcome = stage.read(place, status, text)
    outcome.seconds = round(time.perf_counter() - begin, 1)
    return outcome, f"$ {' '.join(command)}\n{text}\nexit status {status}"


def call(command: list[str], place: Place, limit: float, output: Path) -> tuple[int | None, str]:
    """Exit status and output; None for the status of what had to be stopped, with all that it had started."""
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=place.tree, env=place.environment, stdout=file, stderr=file, start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, output.read_text(errors="replace")


def first_object(text: str) -> Any:
    """What a program printed as JSON, in lines of its own among others.

    Raises:
        ValueError: there is none.
    """
    start = re.search(r"^\{", text, re.M)
    if start is None:
        raise ValueError("no object")
    return json.JSONDecoder().raw_decode(text, start.start())[0]


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")
