# SPDX-License-Identifier: Apache-2.0
"""Which newer releases of other packages break a test: `make test-newest` installs the newest of all but torch in an
environment of its own, runs the tests that touch what has changed, and says in one table what became of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

from environment import ROOT, Environment, fail
from rich.console import Console
from rich.table import Table

FOLDER = ".venv-newest"
RESULT = ROOT / "build" / "newest.xml"
BUILDING = ("pip>=25.1", "setuptools", "ninja", "numpy")  # from 25.1 on, pip knows dependency groups
OPTIMIZERS = ("tests/optim/test_oracles.py", "tests/bench/test_cases.py")
TABLES = ("tests/bench", "tests/examples")
DIGITS = ("tests/examples/test_train_digits.py", "tests/examples/test_train_kat_digits.py")
CORE = ("tests/simt/test_common.py", "tests/simt/test_core.py")
TRANSFORMERS = (
    "tests/kv/test_transformers.py",
    "tests/kv/test_transformers_cache.py",
    "tests/kv/test_transformers_errors.py",
    "tests/rational/test_convert.py",
    "tests/spectral/test_usage.py",
    "tests/examples/test_compress_kv_text.py",
)
TESTS = {  # what we use of other packages -> the tests that touch it
    "accelerate": ("tests/spectral/test_usage.py",),
    "adabelief-pytorch": OPTIMIZERS,
    "cmake": CORE,
    "expecttest": ("tests/optim/test_torch_database.py",),
    "hypothesis": (
        "tests/kv/test_properties.py",
        "tests/optim/test_properties.py",
        "tests/rational/test_properties.py",
    ),
    "lion-pytorch": OPTIMIZERS,
    "matplotlib": TABLES,
    "ninja": ("tests/packaging/test_wheel.py",),
    "numpy": ("tests/simt/test_common.py", "tests/simt/test_optim.py", "tests/kv/test_functional.py"),
    "pybind11": CORE,
    "pyelftools": ("tests/packaging/test_wheel.py",),
    "pytest": ("tests/packaging", "tests/test_ops.py"),
    "pytest-xdist": ("tests/test_ops.py",),
    "pytorch-optimizer": OPTIMIZERS,
    "pyyaml": ("tests/packaging/test_workflows.py",),
    "rich": TABLES,
    "scikit-learn": DIGITS,
    "scipy": ("tests/rational/test_fit.py",),
    "setuptools": ("tests/packaging/test_build.py", "tests/packaging/test_wheel.py"),
    "torch-abi-audit": ("tests/packaging/test_wheel.py",),
    "transformers": TRANSFORMERS,
    "triton": ("tests/triton",),
}


def locked() -> dict[str, str]:
    lock = ROOT / "locks" / f"py3{sys.version_info[1]}.txt"
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.M))


def installed(environment: Environment) -> dict[str, str]:
    lines = environment.run("-m", "pip", "--disable-pip-version-check", "list", "--format=freeze")[1]
    return {name.lower().replace("_", "-"): v for name, v in re.findall(r"^([\w.-]+)==(\S+)", lines, re.M)}


def outcomes(tests: tuple[str, ...], results: list[tuple[str, str]]) -> Counter[str]:
    """Of the tests in these files and folders; `results` has a test's module, with dots, and its outcome."""
    modules = tuple(test.removesuffix(".py").replace("/", ".") for test in tests)
    return Counter(how for module, how in results if f"{module}.".startswith(tuple(f"{m}." for m in modules)))


def needed() -> set[str]:
    """Names in the group of what tests need, and in the extras in it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def named(name: str) -> str:
        found = re.search(rf"^{name} = \[(.*?)\]$", text, re.M | re.S)
        assert found is not None
        return found[1]

    extras = [extra for some in re.findall(r"singlepass\[(.*?)\]", named("test")) for extra in some.split(",")]
    return set(re.findall(r'"([\w-]+)', "".join(map(named, ("test", *extras))))) - {"singlepass"}


def run(environment: Environment, tests: list[str], jobs: str) -> list[tuple[str, str]]:
    """Module and outcome of each test."""
    RESULT.parent.mkdir(exist_ok=True)
    options = ("-q", "-n", jobs, "--dist", "loadgroup", f"--junit-xml={RESULT}")
    subprocess.run([environment.python, "-m", "pytest", *options, *tests], cwd=ROOT)
    results = []
    for case in ElementTree.parse(RESULT).iter("testcase"):
        how = {child.tag for child in case} & {"failure", "error", "skipped"}
        results.append((case.get("classname", ""), how.pop() if how else "passed"))
    return results


def main(torch: str, jobs: str) -> None:
    if missing := needed() - set(TESTS):
        fail("tests for every package that tests need", ", ".join(sorted(missing)), "Add them to tools/newest.py.")
    environment, before = Environment(FOLDER), locked()
    environment.create()
    environment.pip("install", "-q", "--upgrade", torch, *BUILDING)
    options = ("--upgrade", "--upgrade-strategy=eager", "--no-build-isolation")
    environment.pip("install", "-q", *options, torch, "-e", ".", "--group", "test")
    after = installed(environment)
    moved = [name for name in before if name in after and after[name] != before[name]]
    tests = sorted({test for name in moved for test in TESTS.get(name, ())})
    results = run(environment, tests, jobs) if tests else []

    table = Table(
        "package", "locked", "newest", "passed", "failed", title=f"Releases newer than the locks, with {torch}"
    )
    for name in moved:
        counts = outcomes(TESTS.get(name, ()), results)
        broken = counts["failure"] + counts["error"]
        cells = (str(counts["passed"]), str(broken)) if name in TESTS else ("", "")
        table.add_row(name, before[name], after[name], *cells, style="red" if broken else "")
    Console().print(table if moved else "Nothing is newer than the locks.")
    if any(how in ("failure", "error") for _, how in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
