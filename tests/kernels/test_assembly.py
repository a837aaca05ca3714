"""Loops are found in disassembled machine code."""

import pytest

from inductor_kernels import assembly

LINES = """
.text.kernel:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   {product} ;
        /*0050*/                   {product} ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "product, operations",
    [
        ("IMMA.16832.S8.S8.SAT R4, R68.reuse.ROW, R2.COL, R4", 2 * 16 * 8 * 32),
        ("HMMA.16816.F32 R4, R68, R2, R4", 2 * 16 * 8 * 16),
        ("IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24", 2 * 64 * 128 * 32 // 4),
        ("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", 2 * 64 * 64 * 16 // 4),
    ],
)
def test_the_loop_with_products(product, operations):
    text = LINES.replace("{product}", product)
    assert assembly.loop(text) == assembly.Loop(instructions=4, operations=2 * operations)
    assert assembly.products(text) == {product.split()[0]}


@pytest.mark.parametrize("product", ["FFMA R4, R5, R6, R4", "UTCIMMA gdesc[UR10], gdesc[UR12], tmem[UR4]"])
def test_products_of_unknown_size_make_no_loop(product):
    assert assembly.loop(LINES.replace("{product}", product)) is None
    assert assembly.loop("") is None
