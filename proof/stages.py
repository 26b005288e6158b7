# SPDX-License-Identifier: Apache-2.0
"""The stages of a proof, in the order in which they run."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from counting.cubins import tool

from .place import LIBRARIES, Place
from .stage import NOT_MEASURED, PROVED, REFUTED, Outcome, Stage, first_object, last_line

FAMILIES = ("optim", "rational", "kv", "spectral")
# What the names of tests say that they show; the rest is numerics.
SHOWN = {
    "torch.compile": re.compile("compile|opcheck"),
    "graphs": re.compile("graphs|in_a_graph|captured"),
    "streams": re.compile("another_stream"),
    "determinism": re.compile("same_bits"),
}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
BENCH_SECONDS = {"cuda": 170, "cpu": 60}
VERDICTS = {"holds": "hold", "FAILS": "fail", "not measured": "not measured"}
QUICK = ("build", "import", "predictions")
PROFILED = 6  # calls below their bars, the furthest first


def build_command(place: Place) -> list[str] | str:
    if tool("nvcc") is None:
        return "no CUDA library came along, and there is no nvcc to build one with: Triton's kernels alone are tried"
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def build_read(place: Place, status: int | None, text: str) -> Outcome:
    package = place.tree / "python" / "singlepass"
    if status != 0 or not any(package.glob("_C_cuda*.so")):
        return Outcome(REFUTED, f"setup.py: {last_line(text)}")
    for path in package.glob("*"):
        link = place.scratch / "site" / "singlepass" / path.name
        if not link.exists():
            link.symlink_to(path)
    return Outcome(PROVED, "the CUDA library builds here")


def info_command(place: Place) -> list[str]:
    return [sys.executable, "-m", "singlepass", "info", "--json"]


def info_read(place: Place, status: int | None, text: str) -> Outcome:
    try:
        facts = first_object(text)
    except ValueError:
        return Outcome(REFUTED, f"singlepass does not import: {last_line(text)}")
    library = facts["libraries"][place.device]
    said = f"torch {facts['torch']}, triton {facts['triton']}, python {facts['python']}"
    said += f"; {', '.join(facts['gpus']) or 'no GPU'}"
    if library["loaded"]:
        return Outcome(PROVED, f"{said}; the library loads", facts)
    return Outcome(REFUTED, f"{said}; {library['reason']}", facts)


def predictions_command(place: Place) -> list[str] | str:
    if place.device == "cpu":
        return "what is predicted is of GPUs"
    return [sys.executable, "-m", "proof.predictions", place.device]


def predictions_read(place: Place, status: int | None, text: str) -> Outcome:
    try:
        facts = first_object(text)
    except ValueError:
        return Outcome(REFUTED, "out of time" if status is None else last_line(text))
    counts = Counter({True: "hold", False: "fail", None: "not measured"}[p["holds"]] for p in facts["predictions"])
    said = "predictions: " + ", ".join(f"{n} {name}" for name, n in counts.items())
    said += "" if facts["gpu"] else "; no times are predicted of this GPU"
    whole = facts["gpu"] and not counts["not measured"]
    return Outcome(REFUTED if counts["fail"] else PROVED if whole else NOT_MEASURED, said, facts)


def tests_command(place: Place) -> list[str]:
    folders = [f"tests/{name}" for name in (*FAMILIES, "triton")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not large"]
    # Test modules alone are collected, and one that cannot be does not keep the others from running.
    command += ["-o", "addopts=-ra --import-mode=importlib --strict-markers", "--continue-on-collection-errors"]
    command += [f"--junitxml={place.scratch / 'tests.xml'}", f"--basetemp={place.scratch / 'pytest'}", *folders]
    if place.device == "cuda":
        command.append("--require-gpu")
        if importlib.util.find_spec("xdist") is not None:
            command += ["-p", "xdist", "-n", "8"]
    return command


def tests_read(place: Place, status: int | None, text: str) -> Outcome:
    path = place.scratch / "tests.xml"
    if status is None or not path.exists():
        return Outcome(REFUTED, f"pytest: {'out of time' if status is None else last_line(text)}")
    counts = read_tests(path)
    facts = {"counts": counts, "failed": failed_tests(path)}
    total = Counter[str]()
    for by_outcome in counts.values():
        total.update(by_outcome)
    said = ", ".join(f"{n:,} {name}" for name, n in total.items())
    if status != 0:
        return Outcome(REFUTED, said or last_line(text), facts)
    return Outcome(PROVED if total["passed"] else NOT_MEASURED, said, facts)


def shown_by(test: str) -> str:
    """What a test shows, by its name."""
    return next((what for what, pattern in SHOWN.items() if pattern.search(test.split("[")[0])), "numerics")


def backend_of(test: str) -> str:
    """Whose kernels a test runs, by its file and its parameters."""
    return "triton" if "triton" in test else "native"


def outcome_of(case: ElementTree.Element) -> str:
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if case.find(tag) is not None:
            return outcome
    return "passed"


def read_tests(path: Path) -> dict[str, dict[str, int]]:
    """Numbers of tests by outcome, for each "family/backend/what is shown"."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        test = f"{case.get('classname')}.{case.get('name')}"
        family = next((name for name in FAMILIES if f".{name}." in test), None)
        family = family or next((name for name in FAMILIES[1:] if name in test), FAMILIES[0])
        key = f"{family}/{backend_of(test)}/{shown_by(str(case.get('name')))}"
        counts.setdefault(key, Counter())[outcome_of(case)] += 1
    return {key: dict(counts[key]) for key in sorted(counts)}


def failed_tests(path: Path) -> list[str]:
    cases = ElementTree.parse(path).iter("testcase")
    return [f"{case.get('classname')}.{case.get('name')}" for case in cases if outcome_of(case) == "failed"]


def sanitizer_command(check: str, place: Place) -> list[str] | str:
    program = [sys.executable, "-m", "proof.small", place.device]
    if place.device == "cpu":
        if check != SANITIZERS[0]:
            return "a rehearsal on the CPU runs the program once, without a sanitizer"
        return ["env", "TRITON_INTERPRET=1", *program]
    found = tool("compute-sanitizer")
    if found is None:
        return "no compute-sanitizer here"
    # Tensors cut out of cached memory would have neighbours where an access out of bounds must fault.
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", found, "--tool", check, "--print-limit", "200", *program]


def sanitizer_read(tool: str, place: Place, status: int | None, text: str) -> Outcome:
    lines = [line for line in text.splitlines() if re.match(r"[\w/]+: ", line)]
    wrong = [line for line in lines if ": WRONG" in line]
    facts: dict[str, Any] = {"calls": len(lines), "wrong": wrong, "reports": reports_of_ours(text)}
    if status is None:
        return Outcome(REFUTED, f"out of time after {len(lines)} calls", facts)
    if status != 0 or wrong or not lines:
        return Outcome(REFUTED, wrong[0] if wrong else last_line(text), facts)
    if place.device == "cpu":
        return Outcome(NOT_MEASURED, f"{len(lines)} calls are right on the CPU and in the interpreter", facts)
    if "ERROR SUMMARY" not in text and "RACECHECK SUMMARY" not in text:
        return Outcome(NOT_MEASURED, f"{tool} gave no summary: {last_line(text)}", facts)
    if facts["reports"]:
        return Outcome(REFUTED, f"{len(facts['reports'])} reports: {facts['reports'][0]}", facts)
    return Outcome(PROVED, f"{len(lines)} calls, no report on a kernel of ours", facts)


def reports_of_ours(text: str) -> list[str]:
    """First lines of a sanitizer's reports that name a kernel of ours; torch's own are for torch."""
    ours = re.compile(r"singlepass|\b(" + "|".join(sorted(triton_kernels())) + r")\b")
    reports = re.split(r"^========= (?=Invalid|Uninitialized|Error|Warning|Race|Program hit)", text, flags=re.M)[1:]
    return [report.splitlines()[0].strip() for report in reports if ours.search(report)]


def triton_kernels() -> set[str]:
    """Names of the functions that Triton launches."""
    folder = Path(__file__).resolve().parents[1] / "triton_kernels"
    return {
        name for path in folder.rglob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }


def bench_command(place: Place) -> list[str]:
    command = [sys.executable, "-m", "singlepass", "bench", "run", "--device", place.device, "--check"]
    command += ["--budget", str(BENCH_SECONDS[place.device]), "--results", str(place.scratch / "bench")]
    return command


def bench_result(place: Place) -> Path | None:
    """The file that this proof's own bench wrote; other runs' files may lie among the results."""
    return next((place.scratch / "bench").glob("*/*.json"), None)


def bench_read(place: Place, status: int | None, text: str) -> Outcome:
    path = bench_result(place)
    if status not in (0, 1, 2) or path is None:
        return Outcome(REFUTED, "out of time" if status is None else last_line(text))
    from singlepass.bench import checks, results

    shutil.copytree(place.scratch / "bench", place.results, dirs_exist_ok=True)
    run = results.load(path)
    verdicts = checks.check(run)
    counts = Counter(verdict.verdict for verdict in verdicts)
    facts = {"file": path.name, "bars": dict(counts), "copy_gbps": run.copy_gbps, "matrix_tflops": run.matrix_tflops}
    said = f"copies at {run.copy_gbps:,.0f} GB/s, matrix products at {run.matrix_tflops:,.1f} TFLOP/s; bars: "
    said += ", ".join(f"{n} {VERDICTS[name]}" for name, n in counts.items())
    wrong = [row.key for row in run.rows if row.status == "wrong"]
    if wrong:
        return Outcome(REFUTED, f"{said}; wrong: {'/'.join(wrong[0])}", facts)
    if place.device == "cpu":
        return Outcome(NOT_MEASURED, f"on the CPU: {said}", facts)
    return Outcome(REFUTED if counts["FAILS"] else PROVED if counts["holds"] else NOT_MEASURED, said, facts)


def profile_command(place: Place) -> list[str] | str:
    path = bench_result(place)
    if path is None:
        return "nothing was measured"
    return [sys.executable, "-m", "proof.profile", str(path), str(PROFILED)]


def profile_read(place: Place, status: int | None, text: str) -> Outcome:
    try:
        cases = first_object(text)
    except ValueError:
        return Outcome(NOT_MEASURED, "out of time" if status is None else last_line(text))
    missing = [entry["missing"] for entry in cases.values() if "missing" in entry]
    if missing:
        return Outcome(NOT_MEASURED, f"{len(cases)} calls below a bar: {missing[0]}", cases)
    return Outcome(PROVED, f"{len(cases)} calls below a bar, with the profiler's reasons", cases)


BUILD = Stage("build", "the library builds here", "build", build_command, build_read, 600)
STAGES = [
    Stage("import", "the libraries load under this torch", "import", info_command, info_read, 120),
    Stage("predictions", "what was predicted without a GPU", "predicted", predictions_command, predictions_read, 150),
    Stage("tests", "every test that needs a GPU", "right", tests_command, tests_read, 260),
    *(
        Stage(
            tool,
            f"{tool} of every kernel",
            "right",
            partial(sanitizer_command, tool),
            partial(sanitizer_read, tool),
            260,
        )
        for tool in SANITIZERS
    ),
    Stage("bench", "every bar, beside eager, torch.compile and peers", "fast", bench_command, bench_read, 240),
    Stage("profile", "why calls miss their bars", "why", profile_command, profile_read, 70),
]


def stages_for(place: Place) -> list[Stage]:
    """All of them, and building first where no CUDA library came along; a rehearsal takes the libraries there are."""
    came_along = any(path.name.startswith("_C_cuda") for path in place.tree.glob(LIBRARIES))
    return STAGES if came_along or place.device == "cpu" else [BUILD, *STAGES]
