"""PTX instructions are compared with Python's integers."""

import numpy as np
import pytest

from inductor_kernels import ptx

A, B, C = np.random.default_rng(0).integers(0, 2**32, (3, 50), dtype=np.uint32)


def test_lop3_takes_bits_from_its_table():
    for table in range(256):
        found = ptx.lop3(A, B, C, table)
        for a, b, c, y in zip(A.tolist(), B.tolist(), C.tolist(), found.tolist(), strict=True):
            bits = (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
            assert y == sum(bit << i for i, bit in enumerate(bits))


def test_a_text_runs():
    text = "{ .reg .b32 t; shr.u32 t, $2, 4; sub.u32 $0, t, $3; xor.b32 t, t, 0xff; lop3.b32 $1, t, $3, 0x0f, 0xea; }"
    first, second = ptx.run(text, 2, [A, B])
    assert first.tolist() == [((a >> 4) - b) % 2**32 for a, b in zip(A.tolist(), B.tolist(), strict=True)]
    expected = [((a >> 4) ^ 0xFF) & b | 0x0F for a, b in zip(A.tolist(), B.tolist(), strict=True)]
    assert second.tolist() == expected


def test_other_instructions_are_named():
    with pytest.raises(NotImplementedError, match=r"'mul.lo.u32 \$0, \$1, 3'; expected lop3.b32"):
        ptx.run("{ mul.lo.u32 $0, $1, 3; }", 1, [A])
