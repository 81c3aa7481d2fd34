"""Reading of machine code, on small excerpts of what the tools print."""

from __future__ import annotations

import pytest

from distmuon.benchmarks.compiled import amdgcn, flow, sass

HOPPER = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.64 R2, desc[UR6][R2.64] ;
        /*0020*/                   UTMALDG.3D [UR8], [UR4] ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0040*/              @!P0 BRA 0x00d0 ;
        /*0050*/                   WARPGROUP.ARRIVE ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/              @!P1 BRA 0x0030 ;
        /*0090*/                   FFMA R1, R2, R3, R4 ;
        /*00a0*/                   FFMA R1, R2, R3, R4 ;
        /*00b0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*00e0*/              @!P0 BRA 0x00d0 ;
        /*00f0*/                   BRA 0x0050 ;
        /*0100*/                   BRA 0x0100 ;
"""
AMPERE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], [R6.64], P1 ;
        /*0020*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0030*/              @P2  LDG.E.U16 R9, [R10.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0050*/                   BAR.SYNC 0x0 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   EXIT ;
"""
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
CDNA = """k:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	buffer_load_ushort v1, v2, s[4:7], 0 offen
.LBB0_1:
	buffer_load_dwordx4 v[1:4], v2, s[4:7], 0 offen
	ds_read_b128 v[8:11], v5
	s_barrier
	v_mfma_f32_32x32x8_bf16 v[0:15], v[8:9], v[10:11], v[0:15]
	s_cbranch_scc1 .LBB0_1
	v_fma_f32 v1, v2, v3, v4
	s_endpgm
	.section	.AMDGPU.metadata
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 1
    .vgpr_count:     114
    .vgpr_spill_count: 2
"""


def test_the_hot_loop_is_a_loop_and_not_what_lies_between_addresses() -> None:
    loop = sass.hot_loop(sass.parse(HOPPER))
    assert [i.address for i in loop] == [0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xD0, 0xE0, 0xF0]


def test_figures_of_a_hopper_kernel() -> None:
    assert sass.figures(HOPPER) == {
        **{"instructions": 17, "has_loop": True, "loop": 9, "tensor": {"HGMMA.64x128x16": 2}, "ldg": 0},
        **{"async_copies": 0, "tma_loads": 0, "shared_loads": 0, "barriers": 0},
    }


def test_figures_of_an_ampere_kernel() -> None:
    assert sass.figures(AMPERE) == {
        **{"instructions": 8, "has_loop": True, "loop": 6, "tensor": {"HMMA.16816": 1}, "ldg": 1},
        **{"async_copies": 1, "tma_loads": 0, "shared_loads": 1, "barriers": 1},
    }


def test_a_load_in_a_hot_loop_counts_however_wide_and_outside_only_if_narrow() -> None:
    wide = AMPERE.replace("LDG.E.U16", "LDG.E.128")
    assert sass.figures(wide)["ldg"] == 1
    without_loop = "\n".join(line for line in wide.splitlines() if "BRA" not in line)
    assert sass.figures(without_loop)["ldg"] == 0
    assert sass.figures(without_loop.replace("LDG.E.128", "LDG.E.64"))["ldg"] == 1


def test_scalar_products_make_a_hot_loop_where_there_are_no_tensor_cores() -> None:
    scalar = AMPERE.replace("HMMA.16816.F32.BF16 R4", "FFMA R4")
    assert sass.figures(scalar)["loop"] == 6
    assert sass.figures(scalar)["tensor"] == {}


def test_registers_and_spills() -> None:
    found = sass.registers_and_spills(PTXAS)
    assert found == {"registers": 168, "stack": 8, "spill_stores": 4, "spill_loads": 12}
    with pytest.raises(ValueError, match="reports no registers and spills, but: 'nothing'"):
        sass.registers_and_spills("nothing")


def test_figures_of_an_amd_kernel() -> None:
    assert amdgcn.figures(CDNA) == {
        **{"registers": 114, "spill_vector": 2, "spill_scalar": 1, "stack": 0, "instructions": 9, "has_loop": True},
        **{"loop": 5, "tensor": {"v_mfma_f32_32x32x8_bf16": 1}, "ldg": 0, "shared_loads": 1, "barriers": 1},
        "global_loads": {"buffer_load_dwordx4": 1},
    }
    assert amdgcn.figures(CDNA.replace("buffer_load_dwordx4", "buffer_load_ushort"))["ldg"] == 1
    with pytest.raises(ValueError, match="vgpr_count"):
        amdgcn.figures("k:\n\ts_endpgm\n")


def test_the_innermost_loop_with_the_most_work_is_hot() -> None:
    nested = [[1], [2], [3], [2, 4], [1, 5], [6], [5, 7], []]
    assert flow.hot_loop(nested, [0, 0, 4, 0, 9, 1, 0, 0]) == [2, 3]
    assert flow.hot_loop(nested, [0, 0, 0, 0, 9, 1, 0, 0]) == [1, 2, 3, 4]
    assert flow.hot_loop(nested, [9, 0, 0, 0, 0, 0, 0, 9]) == []
    assert flow.hot_loop([[0]], [1]) == [0]
    assert flow.hot_loop([], []) == []
