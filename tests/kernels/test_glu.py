"""Values and gates of one product are computed by one kernel on a GPU, and separately on a CPU."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from . import cases
from .kernels import kinds
from .layers import OPS, linear, parameters, product, tokens

pytest.importorskip("triton")
K = 640
GATES = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}


@pytest.mark.parametrize("gate, dtype", [*((gate, torch.float16) for gate in GATES), ("gelu", torch.float32)])
def test_gate_and_next_quantize_are_an_epilogue(gate, dtype):
    """ff.net.0 -> value * gelu(gate) -> quantize -> ff.net.2: two products, codes between them."""

    def f(x_q, *p):
        value, gates = product(x_q, p[:7], out=dtype).chunk(2, -1)
        return linear(value * GATES[gate](gates), p[7:])

    inputs = tokens(2, 1024, K, dtype=torch.int8), *parameters(8 * K, K), *parameters(K, 4 * K)
    assert kinds(f, *inputs) == ["tem", "tem"]


@pytest.mark.parametrize("reads", ["the product", "a half", "the other half"])
def test_a_gate_stays_apart_where_something_else_reads_what_is_between(reads):
    def f(x_q, *p):
        y = product(x_q, p)
        value, gate = y.chunk(2, -1)
        return value * F.gelu(gate), {"the product": y + 1, "a half": value + 1, "the other half": gate + 1}[reads]

    found = kinds(f, tokens(2, 64, K, dtype=torch.int8), *parameters(8 * K, K))
    assert "tem" in found and "poi" in found and "call" not in found


def test_halves_that_are_none_stay_apart():
    def f(x_q, *p):
        value, gate, _ = product(x_q, p).split([K, K, 2 * K], -1)
        rows = product(x_q, p).chunk(2, 1)
        return value * F.gelu(gate), rows[0] * F.gelu(rows[1])

    found = kinds(f, tokens(2, 64, K, dtype=torch.int8), *parameters(4 * K, K))
    assert "poi" in found and "call" not in found


def test_a_cpu_keeps_them_apart_and_both_are_right():
    """oneDNN has no gated product."""
    arguments = cases.linear((2, 5), 12, 40, 4, torch.uint8, out=torch.float32)

    def f(*arguments):
        value, gate = OPS.linear(*arguments).chunk(2, -1)
        return value * F.gelu(gate)

    with torch.no_grad():
        y, (code, *_) = run_and_get_code(torch.compile(f, fullgraph=True), *arguments)
    assert "linear_glu" not in code
    for found in (y, OPS.linear_glu(*arguments, "gelu")):
        cases.exact("linear", arguments).glu("gelu").check(found, torch.float32)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("gate", GATES)
def test_the_operator_is_the_formula(bits, gate):
    arguments = cases.linear((2, 5), 12, 40, bits, torch.int8, out=torch.bfloat16, rows=True)
    cases.exact("linear", arguments).glu(gate).check(OPS.linear_glu(*arguments, gate), torch.bfloat16)


def test_mistakes_are_named():
    with pytest.raises(
        ValueError, match=r"linear_glu: weight is torch.int8 \[9, 17\]; expected an even number of rows"
    ):
        OPS.linear_glu(*cases.linear(), "silu")
    with pytest.raises(ValueError, match="linear_glu: activation is 'none'; expected 'gelu' or 'gelu_tanh' or 'silu'"):
        OPS.linear_glu(*cases.linear(n=8), "none")
