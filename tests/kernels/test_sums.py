"""Residuals that oneDNN adds to its products under Inductor: the bits of adding afterwards, and when it is left out."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from inductor_kernels import cpu, weights

from . import cases

OPS = torch.ops.inductor_kernels


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    weights.clear()
    monkeypatch.setattr(cpu, "_small", lambda: 0)


def summed(arguments, other):
    return (*arguments[:7], other, *arguments[8:])


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_the_bits_of_adding_afterwards(bits, dtype):
    arguments, other = cases.linear((2, 9), 33, 70, bits, dtype), torch.randn(2, 9, 33)
    expected = OPS.linear(*arguments) + other
    for _ in range(2):  # the first call lays the weight out
        assert torch.equal(OPS.linear_add(*summed(arguments, other)), expected)


@pytest.mark.skipif(not cpu.writes(torch.bfloat16), reason="oneDNN's int8 products write bfloat16 from AVX-512 on")
def test_sixteen_bits_where_onednn_writes_them():
    arguments, other = cases.linear((3,), 16, 32, 4, out=torch.bfloat16), torch.randn(3, 16).bfloat16()
    expected = (OPS.linear(*arguments[:9], torch.float32) + other).bfloat16()
    OPS.linear(*arguments)
    y = OPS.linear_add(*summed(arguments, other))
    torch.testing.assert_close(y.float(), expected.float(), rtol=2**-7, atol=1e-6)


def test_what_does_not_fit_is_refused():
    arguments = cases.linear((3,), 16, 32, 4)
    for other in (torch.zeros(16), torch.zeros(3, 16).half()):
        with pytest.raises(ValueError, match=r"linear_add: other is .*expected torch.float32 \[3, 16\]"):
            OPS.linear_add(*summed(arguments, other))


def test_in_a_compiled_graph():
    """Taken along in either order; not where the product is read twice or the other is broadcast."""
    (a, b, c, d), other = [cases.linear((20,), 24, 32, 4) for _ in range(4)], torch.randn(20, 24)

    def f(other, row):
        twice = OPS.linear(*c)
        return OPS.linear(*a) + other, other.relu() + OPS.linear(*b), twice + other, twice.relu(), OPS.linear(*d) + row

    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), other, other[0])
        for y, expected in zip(found, f(other, other[0]), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert code.count("linear_add.on_cpu(") == 2 and code.count("linear.on_cpu(") == 2
