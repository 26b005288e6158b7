# SPDX-License-Identifier: Apache-2.0
"""What cuobjdump prints, read."""

from __future__ import annotations

import pytest

from counting import cubins

# Two instructions as they are printed, and one that nobody knows.
SCHEDULED = """
		Function : _ZN10singlepass4copyEPf
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/              @!P2 LDG.E.128 R24, desc[UR6][R64.64+0x10] ;   /* 0x0000100640182981 */
                                                                             /* 0x000ea2000c1e1d00 */
        /*0010*/                   FADD R5, R24, 0x3f800000 ;                /* 0x3f80000018057421 */
                                                                             /* 0x004fe40000000000 */
"""


def test_instructions_are_read() -> None:
    load, add = cubins.parse_code(SCHEDULED)["_ZN10singlepass4copyEPf"]
    assert (load.guard, load.op, load.kind, load.bits, load.pipe) == ("@!P2", "LDG", "LDG.128", 128, ("lsu", 4.0))
    assert (add.guard, add.kind, add.pipe) == ("", "FADD", ("fma", 1.0))
    assert {"LDG.128", "LDG.E.128", "0x10"} <= load.marks
    assert "0x3f800000" in add.marks


def test_control_bits_are_read() -> None:
    """The load opens barrier 2, for which the addition waits."""
    load, add = cubins.parse_code(SCHEDULED)["_ZN10singlepass4copyEPf"]
    assert (load.stall, load.sets, load.waits) == (1, 2, ())
    assert (add.stall, add.sets, add.waits) == (2, None, (2,))


def test_both_halves_of_a_sector_are_one() -> None:
    (load, _) = cubins.parse_code(SCHEDULED)["_ZN10singlepass4copyEPf"]
    (other, _) = cubins.parse_code(SCHEDULED.replace("R64.64+0x10", "R64.64"))["_ZN10singlepass4copyEPf"]
    (far, _) = cubins.parse_code(SCHEDULED.replace("R64.64+0x10", "R64.64+0x20"))["_ZN10singlepass4copyEPf"]
    assert load.sector == other.sector != far.sector


def test_a_gap_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected an instruction at 0x10 of .*copy.*; got one at 0x20"):
        cubins.parse_code(SCHEDULED.replace("/*0010*/", "/*0020*/"))


@pytest.mark.parametrize(
    ("name", "kind", "pipe"),
    [
        ("STG.E.U16", "STG.16", ("lsu", 1.0)),
        ("LDG.E.U8.CONSTANT", "LDG.8", ("lsu", 1.0)),
        ("LDS.64", "LDS.64", ("lsu", 2.0)),
        ("STL", "STL.32", None),
        ("F2F.F64.F32", "F2F.64", ("convert64", 1.0)),
        ("F2F.F16.F32", "F2F", ("special", 1.0)),
        ("DFMA", "DFMA", ("fp64", 1.0)),
        ("SHFL.BFLY", "SHFL", ("lsu", 1.0)),
        ("HMMA.16816.F32.BF16", "HMMA", ("tensor", 1.0)),
        ("HMMA.1688.F32", "HMMA", ("tensor", 0.5)),
        ("HMMA.1688.F32.TF32", "HMMA", ("tensor", 1.0)),
        ("IMMA.16832.U8.S8", "IMMA", ("tensor", 1.0)),
        ("IMMA.16816.S8.S8", "IMMA", ("tensor", 0.5)),
        ("HGMMA.64x64x8.F32.TF32", "HGMMA", ("tensor", 8 * cubins.WGMMA)),
        ("UIADD3", "UIADD3", None),
    ],
)
def test_kinds_and_pipes(name: str, kind: str, pipe: tuple[str, float] | None) -> None:
    instruction = cubins.Instruction(0, "", name, "", 0)
    assert (instruction.kind, instruction.pipe) == (kind, pipe)


USAGE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN10singlepass4copyEPf:
  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:924 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function spills:
  REG:255 STACK:48 SHARED:0 LOCAL:16 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resources_are_read() -> None:
    found = cubins.parse_resources(USAGE)
    assert found["sm_90"]["_ZN10singlepass4copyEPf"] == {"registers": 32, "stack": 0, "shared": 1024, "local": 0}
    assert cubins.spilling(found) == ["spills (sm_90)"]
