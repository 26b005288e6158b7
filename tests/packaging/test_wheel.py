# SPDX-License-Identifier: Apache-2.0
"""One wheel for every Python and every torch: what must and what must not be in it. `make release` asks the same of the
wheels in dist/, by --wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile
from packaging.version import Version

TORCH_FLOOR = "2.10"
# What every torch brings or every Linux has; anything else would have to be bundled.
SYSTEM = {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "ld-linux-x86-64", "ld-linux-aarch64"}
ALLOWED = {"_C_cpu.so": SYSTEM | {"libtorch_cpu", "libc10"}}
ALLOWED |= {f"_C_cuda{major}.so": ALLOWED["_C_cpu.so"] | {"libtorch_cuda", "libcudart"} for major in (12, 13)}
FLOORS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}  # of manylinux_2_28
FOLDERS = {"": "python/singlepass", "triton_kernels/": "triton_kernels", "bench/": "bench"}


def needed(library: Path) -> set[str]:
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return {tag.needed.split(".so")[0] for tag in dynamic.iter_tags("DT_NEEDED")}


def symbols(library: Path) -> dict[str, bool]:
    """Dynamic symbols: name -> whether the library defines it."""
    with library.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        return {symbol.name: symbol["st_shndx"] != "SHN_UNDEF" for symbol in table.iter_symbols() if symbol.name}


def newest_versions(library: Path) -> dict[str, tuple[int, ...]]:
    """Of each system library's symbols that are needed."""
    newest: dict[str, tuple[int, ...]] = {}
    with library.open("rb") as file:
        for _, versions in ELFFile(file).get_section_by_name(".gnu.version_r").iter_versions():
            for name, _, number in (version.name.partition("_") for version in versions):
                newest[name] = max(newest.get(name, ()), tuple(map(int, number.split("."))))
    return newest


@pytest.mark.slow("builds the wheel")
def test_tag_names_no_python(wheel: Path) -> None:
    assert re.fullmatch(r"singlepass-[^-]+-py3-none-(linux|manylinux_2_28)_\w+\.whl", wheel.name)


def test_one_top_level_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"singlepass"}


def test_holds_exactly_the_modules_of_the_tree(wheel: Path, root: Path) -> None:
    expected = {
        f"singlepass/{package}{path.relative_to(root / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (root / folder).rglob("*.py")
    }
    data = {"singlepass/py.typed", "singlepass/rational/tables.json"}
    extras = data | {"singlepass/build_info.json", *(f"singlepass/{name}" for name in ALLOWED)}
    listed = zipfile.ZipFile(wheel).namelist()  # some tools list folders too
    names = {name for name in listed if ".dist-info/" not in name and not name.endswith("/")}
    assert names - extras == expected
    assert names >= data | {"singlepass/build_info.json", "singlepass/_C_cpu.so"}


def test_libraries_are_those_that_the_build_reports(unpacked: Path, libraries: list[Path]) -> None:
    info = json.loads((unpacked / "singlepass" / "build_info.json").read_text())
    assert [path.name for path in libraries] == ["_C_cpu.so", *(f"_C_cuda{major}.so" for major in sorted(info["cuda"]))]
    assert bool(info["cuda"]) != bool(info["cuda_reason"])


def test_no_library_is_bundled_or_needed_beyond_torch_and_the_system(libraries: list[Path]) -> None:
    for library in libraries:
        assert needed(library) <= ALLOWED[library.name]


def test_no_python_symbols(libraries: list[Path]) -> None:
    for library in libraries:
        assert not [name for name in symbols(library) if re.match(r"_?Py[A-Z_]", name)]


def test_libtorch_is_used_through_its_c_shim_only(libraries: list[Path]) -> None:
    cxx = re.compile(r"_ZN?[A-Z]*K?(2at|3c10|5torch|6caffe2)")
    for library in libraries:
        undefined = [name for name, defined in symbols(library).items() if not defined]
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
        assert not [name for name in undefined if cxx.match(name)]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_stable_abi_at_the_torch_floor(libraries: list[Path]) -> None:
    audit = pytest.importorskip("torch_abi_audit", reason="torch-abi-audit is not installed")
    for library in libraries:
        report = audit.inspect_extension(library)
        assert report.error is None
        assert report.torch.stable
        assert Version(report.torch.min_torch_version) <= Version(TORCH_FLOOR)


def test_no_newer_system_than_torch_asks_for(wheel: Path) -> None:
    """torch's own wheels are manylinux_2_28: whoever has torch can load the libraries."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    audit = subprocess.run(command, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stderr
    tag = json.loads(audit.stdout)["sym_tag"]
    _, *glibc = re.fullmatch(r"(manylinux)_(\d+)_(\d+)_\w+", tag).groups()
    assert tuple(map(int, glibc)) <= (2, 28)


def test_headers_of_other_torches_ask_for_no_newer_system_either(root: Path, tmp_path: Path) -> None:
    """They call what those of this torch may not."""
    (tmp_path / "probe.cpp").write_text(
        "#include <cmath>\n#include <dlfcn.h>\n#include <memory>\n"
        "double of(double x, std::shared_ptr<int> p) { return std::exp(x) + std::log(x) + std::pow(x, *p); }\n"
        "void* named(const char* name) { return dlsym(RTLD_DEFAULT, name); }\n"
    )
    compiler = ("c++", "-shared", "-fPIC", f"-I{root / 'csrc'}", "-include", "torch/glibc.h")
    library = tmp_path / "probe.so"
    subprocess.run([*compiler, tmp_path / "probe.cpp", "-ldl", "-o", library], check=True)
    assert newest_versions(library)["GLIBC"] <= FLOORS["GLIBC"]


def test_no_path_of_the_machine_that_built_it(libraries: list[Path], root: Path) -> None:
    """The same commit gives the same bytes in every folder."""
    folders = [str(root), sys.prefix, str(Path(torch.__file__).parents[1])]
    for library in libraries:
        data = library.read_bytes()
        assert not [folder for folder in folders if folder.encode() in data]


def test_nothing_is_exported(libraries: list[Path]) -> None:
    for library in libraries:
        assert not [name for name, defined in symbols(library).items() if defined]


def test_metadata(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    required = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == [f"torch>={TORCH_FLOOR}"]
    assert "License-Expression: Apache-2.0" in text
    assert "Author: The singlepass authors" in text  # as in CITATION.cff
    assert (metadata.parent / "licenses" / "LICENSE").is_file()
