# SPDX-License-Identifier: Apache-2.0
"""Sets up the environment that make works in, from the locks.

    environment.py install VENV TORCH KIND      torch, and what the lock of that kind says: bench, dev or docs
    environment.py editable VENV                the package itself
    environment.py jobs                         how many processes may work at the same time

What is missing is said in one line. The machine's own Python runs this, which may be too old for the package.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ((3, 10), (3, 13))  # those that have a lock: the first and the last
CGROUPS, MEMBERSHIPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NO_QUOTA = ("max", "-1")  # version 2, version 1
JOB = 2 * 2**30  # bytes of memory for each job: a worker of pytest, a compiler, mypy


def fail(expected, got, remedy):
    raise SystemExit(f"make: expected {expected}; got {got}. {remedy}")


def dotted(version):
    return ".".join(map(str, version))


def check(torch):
    """What must be there before anything is installed."""
    if not sys.platform.startswith("linux"):
        fail("Linux", sys.platform, "Use a Linux machine, or a container.")
    first, last = PYTHONS
    if not first <= sys.version_info[:2] <= last:
        got = f"{dotted(sys.version_info[:3])} ({sys.executable})"
        fail(f"Python {dotted(first)} to {dotted(last)}", got, "Name one: make PYTHON=python3.11 ...")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"Install it (Debian and Ubuntu: apt install python{dotted(sys.version_info[:2])}-venv)."
        fail(f"Python's module {missing[0]}", f"none in {sys.executable}", remedy)
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        fail("a C++20 compiler", f"no {compiler[0]}", "Install g++ 11 or newer, or set CXX.")
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)
    asked = re.search(r"==\s*(\d+)\.(\d+)", torch)
    if asked and tuple(map(int, asked.groups())) < tuple(map(int, floor.split("."))):
        fail(f"a torch from {floor} on", f"TORCH={torch}", "Name a newer one, or leave TORCH out.")


class Environment:
    """A virtual environment, and what goes into it."""

    def __init__(self, folder):
        self.python = str(Path(folder).absolute() / "bin" / "python")
        self.folder = folder

    def run(self, *arguments):
        done = subprocess.run([self.python, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout

    def create(self):
        """One that works and has this Python's version stays as it is."""
        status, version = self.run("-c", "import sys, pip; print(*sys.version_info[:2])") if self.exists() else (1, "")
        if status == 0 and tuple(map(int, version.split())) != sys.version_info[:2]:
            remedy = f"Remove {self.folder}, or name another: make VENV=.venv-{sys.version_info[1]} ..."
            got, expected = dotted(version.split()), dotted(sys.version_info[:2])
            fail(f"Python {expected} in {self.folder}", got, remedy)
        if status != 0:
            import venv

            venv.create(self.folder, clear=True, with_pip=True, symlinks=True)

    def exists(self):
        return os.access(self.python, os.X_OK)

    def pip(self, *arguments):
        """pip without its progress; of what it prints, only what matters comes through, when it fails."""
        status, output = self.run("-m", "pip", "--disable-pip-version-check", *arguments)
        if status == 0:
            return
        said = re.search(r"^.*?(\w+: expected .*; got .*)$", output, re.M)  # by our own setup.py
        if said:
            raise SystemExit(said.group(1))
        if re.search(r"NewConnectionError|ConnectTimeout|NameResolutionError|Max retries exceeded", output):
            remedy = "Connect this machine, or set PIP_INDEX_URL or PIP_FIND_LINKS."
            fail("an index of packages that pip can reach", "no connection", remedy)
        raise SystemExit("{}\nmake: expected pip {} to succeed; got the above.".format(output, " ".join(arguments)))

    def install(self, torch, kind):
        """torch first, by its one pin; then exactly what the lock of this Python says."""
        self.pip("install", "-q", torch)
        prefix = "" if kind == "dev" else kind + "-"
        lock = ROOT / "locks" / "{}py{}{}.txt".format(prefix, *sys.version_info[:2])
        lines = lock.read_text(encoding="utf-8").splitlines()
        pins = self.pins_of_torch()
        chosen = [line for line in lines if re.match(r"[\w.-]+==", line) and line.split("==")[0] not in pins]
        self.pip("install", "-q", "--no-deps", *chosen)

    def pins_of_torch(self):
        """What torch itself pins to one version, such as Triton. For the torch that locks/ is made for, they agree."""
        code = "import importlib.metadata as m, json; print(json.dumps(m.requires('torch') or []))"
        requirements = json.loads(self.run("-c", code)[1])
        return {match.group(1).lower() for match in (re.match(r"([\w.-]+)\s*==", r) for r in requirements) if match}

    def check(self):
        status, output = self.run("-m", "pip", "check")
        if status:
            remedy = f"Remove {self.folder}, which an installation may have left half-done, and run make again."
            raise SystemExit(f"{output}make: expected packages that fit together; got the above. {remedy}")


def settings_of_cgroup(controller, *names):
    """What the files of these names say, for each control group around this process that has them."""
    for line in MEMBERSHIPS.read_text().splitlines() if MEMBERSHIPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each controller. A container may see only the end of its path.
        top = CGROUPS / controller if controllers else CGROUPS
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            files = [folder / name for name in names]
            if all(file.is_file() for file in files):
                yield " ".join(file.read_text().strip() for file in files)


def jobs():
    """How many processes this machine has CPUs and memory for, as far as this process may use them."""
    quotas = [*settings_of_cgroup("cpu", "cpu.max")]
    quotas += settings_of_cgroup("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    limits = [*settings_of_cgroup("memory", "memory.max"), *settings_of_cgroup("memory", "memory.limit_in_bytes")]
    shares = [quota.split() for quota in quotas if not quota.startswith(NO_QUOTA)]
    cpus = min([float(len(os.sched_getaffinity(0))), *(int(quota) / int(period) for quota, period in shares)])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min([memory, *(int(limit) for limit in limits if limit != "max")])
    return max(1, int(min(cpus, memory / JOB)))


def main(command, *arguments):
    if command == "jobs":
        print(jobs())
        return
    environment = Environment(arguments[0])
    if command == "install":
        check(arguments[1])
        environment.create()
        environment.install(*arguments[1:])
    else:
        environment.pip("install", "-q", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    environment.check()


if __name__ == "__main__":
    main(*sys.argv[1:])
