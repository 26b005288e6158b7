# SPDX-License-Identifier: Apache-2.0
"""Reads what the compiler made of kernels: machine instructions with their control bits, registers, shared memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

OF_CUBINS = "triton"
_RESOURCES = re.compile(
    r"^ *Function (?P<name>\S+?):\s*$\n"
    r"^.*?REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)",
    re.M,
)
_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)$", re.M)
_FUNCTION = re.compile(r"^\s+Function : (\S+)$", re.M)
# An instruction is 128 bits, of which the second line shows the higher half.
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s+/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x(?P<high>[0-9a-f]{16}) \*/",
    re.M,
)
_WIDTH = re.compile(r"\.(?:(128|64|32)|[US](16|8))\b")
DRIVER_SHARED = 1024  # bytes of shared memory of each block, on sm_80 and later
STEP = 16  # bytes of an instruction
NO_BARRIER = 7
WGMMA = 0.62  # of the time that a Hopper's tensor cores take for the same products by mma.sync

PIPES = {
    "fma": ("FADD", "FMUL", "FFMA", "FFMA2", "IMAD", "HADD2", "HMUL2", "HFMA2"),
    "alu": (
        *("BMSK", "F2FP", "FCHK", "FMNMX", "FSEL", "FSETP", "I2FP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA"),
        *("LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX"),
    ),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "special": ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"),
    "lsu": (
        *("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LD", "ST", "SHFL", "ATOM", "ATOMG", "ATOMS", "RED"),
        "REDG",
    ),
    "tensor": ("HMMA", "IMMA", "HGMMA"),
}
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. high: the half of its bits that ends in what the compiler tells the scheduler."""

    address: int
    guard: str
    name: str
    operands: str
    high: int

    @cached_property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def kind(self) -> str:
        """What it is counted as: with the width of an access, and whether a conversion is from or to 64 bits."""
        if self.op in ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS"):
            return f"{self.op}.{self.bits}"
        return f"{self.op}.64" if self.is_convert64 else self.op

    @cached_property
    def marks(self) -> frozenset[str]:
        """What it can be recognised by: its kind, its name, and the numbers that it is given."""
        return frozenset((self.kind, self.name, *re.findall(r"-?0x[0-9a-f]+", self.operands)))

    @property
    def bits(self) -> int:
        """Of an access, for each thread."""
        found = _WIDTH.search(self.name)
        return int(found[1] or found[2]) if found else 32

    @property
    def is_convert64(self) -> bool:
        return self.op in ("F2F", "F2I", "I2F") and bool(re.search(r"\.[FSU]64", self.name))

    @property
    def pipe(self) -> tuple[str, float] | None:
        """Which pipe makes it, and how many instructions of that pipe's plainest kind it counts for."""
        pipe = "convert64" if self.is_convert64 else _PIPE_OF.get(self.op)
        if pipe is None:
            return None
        if self.op == "HGMMA":  # each of four warps multiplies 16 rows
            return pipe, WGMMA * int(self.name.split(".")[1].split("x")[1]) / 8
        if pipe == "tensor":
            halves = r"\.(1688|8816)(?!.*TF32)|\.16816\.[US]8"
            return pipe, 0.5 if re.search(halves, self.name) else 1.0
        return pipe, max(1.0, self.bits / 32) if pipe == "lsu" and self.op != "SHFL" else 1.0

    @property
    def sector(self) -> tuple[str, int]:
        """The 32 bytes of memory that it accesses: a register, and how many such pieces further on."""
        found = re.search(r"\[(R\w+(?:\.64)?)(?:\+(-?0x[0-9a-f]+))?\]", self.operands)
        return (found[1], int(found[2] or "0", 16) // 32) if found else (self.operands, 0)

    @property
    def groups_left(self) -> int:
        """Of copies to shared memory, that DEPBAR does not wait for."""
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found else 0

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def stall(self) -> int:
        """Clocks before the warp's next instruction."""
        return self.high >> 41 & 0xF

    @property
    def sets(self) -> int | None:
        """The barrier that opens when its result is there."""
        barrier = self.high >> 46 & 0x7
        return None if barrier == NO_BARRIER else barrier

    @property
    def waits(self) -> tuple[int, ...]:
        """The barriers that it waits for."""
        return tuple(barrier for barrier in range(6) if self.high >> 52 + barrier & 1)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One function of a cubin. shared: static. local: bytes of spilled registers and of arrays indexed at run time."""

    name: str
    arch: str
    code: tuple[Instruction, ...]
    registers: int
    shared: int
    local: int

    @property
    def plain_name(self) -> str:
        """Without the namespaces and the type that it returns."""
        name = self.name.replace("(anonymous namespace)::", "")
        return re.sub(r"^void |singlepass::(?:\w+::)?(?=\w)", "", name)


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, which Triton's package has some of."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        found = shutil.which(str(Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", name)))
    return found


def _run(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run([str(part) for part in command], input=text, capture_output=True, text=True, check=True)
    return done.stdout


def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin by their names as C++ writes them.

    Raises:
        ValueError: cuobjdump is missing, or prints what this does not know.
    """
    program = tool("cuobjdump")
    if program is None:
        raise ValueError("counting: expected cuobjdump; got none. Install the CUDA toolkit or Triton")
    resources = parse_resources(_run(program, "--dump-resource-usage", cubin))[OF_CUBINS]
    arch = cubin.suffixes[-2].removeprefix(".")
    functions = parse_code(_run(program, "-sass", cubin))
    names = _run("c++filt", "-p", text="\n".join(functions)).splitlines()
    kernels = {}
    for name, (mangled, code) in zip(names, functions.items(), strict=True):
        numbers = resources[mangled]
        # From sm_90 on, what the driver keeps of shared memory is counted, too.
        shared = numbers["shared"] - (DRIVER_SHARED if arch not in ("sm_80", "sm_86", "sm_89") else 0)
        local = numbers["local"] + numbers["stack"]
        kernels[name] = Kernel(name, arch, code, numbers["registers"], max(0, shared), local)
    return kernels


def parse_code(text: str) -> dict[str, tuple[Instruction, ...]]:
    """What cuobjdump -sass prints: the instructions of each function.

    Raises:
        ValueError: addresses do not follow each other, so something was not understood.
    """
    pieces = _FUNCTION.split(text)
    found = {}
    for name, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        code = tuple(
            Instruction(int(m["address"], 16), m["guard"] or "", m["name"], m["operands"], int(m["high"], 16))
            for m in _INSTRUCTION.finditer(piece)
        )
        for i, instruction in enumerate(code):
            if instruction.address != i * STEP:
                raise ValueError(
                    f"counting: expected an instruction at {i * STEP:#x} of {name}; got one at "
                    f"{instruction.address:#x}. Teach counting/cubins.py what stands between"
                )
        found[name] = code
    return found


def resources(paths: Iterable[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """Registers, bytes of stack, of shared memory and of spills by architecture and kernel, of libraries and cubins."""
    program = tool("cuobjdump")
    found: dict[str, dict[str, dict[str, int]]] = {}
    if program is None:
        return found
    for path in paths:
        done = subprocess.run([program, "--dump-resource-usage", str(path)], capture_output=True, text=True)
        for arch, kernels in parse_resources(done.stdout).items():
            found.setdefault(arch, {}).update(kernels)
    return found


def parse_resources(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """What cuobjdump --dump-resource-usage prints: for each architecture, the functions compiled for it.

    It names none for a cubin by itself, which is what Triton compiles for the machine it runs on.
    """
    pieces = [OF_CUBINS, *_ARCHITECTURE.split(text)]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for arch, piece in zip(pieces[::2], pieces[1::2], strict=True):
        for match in _RESOURCES.finditer(piece):
            numbers = {key: int(value) for key, value in match.groupdict().items() if key != "name"}
            found.setdefault(arch, {})[match["name"]] = numbers
    return found


def spilling(found: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Kernels with local memory: spilled registers, or arrays that are indexed at run time."""
    return sorted(
        f"{name} ({arch})" for arch, kernels in found.items() for name, n in kernels.items() if n["local"] or n["stack"]
    )
