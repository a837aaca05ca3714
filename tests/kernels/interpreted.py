"""Tests of every template in Triton's interpreter; test_interpreter.py runs them in a process of their own."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from inductor_kernels import compat, reference, roofline, testing, tiles, tuned

from . import cases

OPS = torch.ops.inductor_kernels
HALF = torch.float16


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with testing.interpreter(), torch.no_grad():
        yield


def run(fn, *arguments, kernels=1, **options):
    """The compiled result, after checking that the function became ``kernels`` Triton kernels."""
    y, code = run_and_get_code(torch.compile(fn, fullgraph=True, **options), *arguments)
    found = testing.kernels(code[0])
    assert len(found) == kernels and any("tem" in name for name in found), list(found)
    assert "torch.ops.inductor_kernels" not in code[0].split("async_compile.wait")[1]
    return y


def check(name, arguments, dtype=torch.float32, **options):
    """``options``: further arguments of run() and torch.compile."""
    op = getattr(OPS, name)
    cases.assert_right(name, arguments, run(lambda *a: op(*a), *arguments, **options), dtype)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize(
    "lead, n, k, dtype, out, bias, rows",
    [
        ((1,), 50, 64, torch.int8, torch.float32, True, False),
        ((33,), 50, 100, torch.uint8, torch.float16, False, True),
        ((2, 20), 70, 37, torch.int8, torch.bfloat16, True, True),
        ((), 16, 128, torch.uint8, torch.float32, False, False),
    ],
)
def test_linear(bits, lead, n, k, dtype, out, bias, rows):
    arguments = cases.linear(lead, n, k, bits, dtype, out=out, bias=bias, rows=rows)
    check("linear", arguments, out)


@pytest.mark.parametrize("bits", cases.BITS)
def test_vectors_of_any_strides(bits):
    """Vectors with gaps are copied before the product reads them."""
    spread = cases.apart(cases.linear((20,), 24, 96, bits, torch.int8))
    y, code = run_and_get_code(torch.compile(lambda *a: OPS.linear(*a), fullgraph=True), *spread)
    assert any("tem" in name for name in testing.kernels(code[0]))
    cases.assert_right("linear", spread, y)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("z", [0, 255])
def test_extreme_codes(bits, z):
    check("linear", cases.linear((20,), 24, 96, bits, torch.int8, z=z, extreme=True))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize(
    "geometry",
    [
        dict(dtype=torch.int8),
        dict(dtype=torch.uint8, stride=(2, 1), padding=(0, 2), kernel=(3, 2), c=20, o=17, bias=False),
        dict(dtype=torch.int8, dilation=(2, 1), padding=(2, 1), c=33, size=(6, 5), out=torch.float16),
        dict(dtype=torch.uint8, kernel=(1, 1), padding=(0, 0), out=torch.bfloat16),
        dict(dtype=torch.int8, kernel=(1, 1), padding=(1, 1), stride=(2, 2), c=3),
    ],
    ids=str,
)
def test_conv2d(bits, geometry):
    check("conv2d", cases.conv2d(bits=bits, **geometry), geometry.get("out", torch.float32))


@pytest.fixture
def no_prologue(monkeypatch):
    monkeypatch.setattr(roofline, "prologue_pays", lambda *a, **k: False)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize(
    "geometry",
    [
        dict(dtype=torch.int8, c=32, z=0),
        dict(dtype=torch.int8, c=48, z=255, stride=(2, 1), padding=(0, 2), kernel=(3, 2), extreme=True),
        dict(dtype=torch.uint8, c=16, dilation=(2, 1), padding=(2, 1), size=(6, 5)),
        dict(dtype=torch.uint8, c=20),  # rows that do not begin at multiples of 16 bytes
    ],
    ids=str,
)
def test_conv2d_reads_zero_points_past_the_edge(no_prologue, bits, geometry):
    """Where codes are read, not computed, one more kernel makes the table of zero points. Odd rows are masked."""
    arguments = cases.conv2d(bits=bits, **geometry)
    kernels = 1 if geometry["c"] == 20 else 3
    y = run(lambda x, *rest: OPS.conv2d((x + 1) - 1, *rest), *arguments, kernels=kernels)
    cases.assert_right("conv2d", arguments, y)


def test_layers_share_the_rows_of_zero_points(no_prologue):
    first, second = (cases.conv2d(c=16, o=16, dtype=torch.int8, z=z) for z in (3, 250))

    def products(x, y, *rest):
        return OPS.conv2d(x + 1, *rest[:12]), OPS.conv2d(y + 1, *rest[12:])

    arguments = first[0], second[0], *first[1:], *second[1:]
    y, code = run_and_get_code(torch.compile(lambda *a: torch.add(*products(*a)), fullgraph=True), *arguments)
    exact = [cases.exact("conv2d", (x + 1, *rest)) for x, *rest in (first, second)]
    (exact[0] + exact[1]).check(y, torch.float32)
    assert code[0].count(".run(") == 5  # codes of x and y, the rows, two products


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only(bits, dtype):
    arguments = cases.weight_only(cases.linear((2, 9), 33, 45, bits), dtype, conv=False)
    check("linear_weight_only", arguments, dtype)
    arguments = cases.weight_only(cases.conv2d(bits=bits, stride=(1, 2), c=20, size=(5, 6)), dtype, conv=True)
    check("conv2d_weight_only", arguments, dtype)


def test_dynamic_shapes_compile_once():
    compiled = torch.compile(lambda *a: OPS.linear(*a), fullgraph=True, dynamic=True)
    for rows in (33, 20, 5):
        arguments = cases.linear((2, rows), 30, 100, 4, torch.int8)
        cases.assert_right("linear", arguments, compiled(*arguments))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_any_size_compile_once(stride):
    """Dynamic sizes are computed in integers."""
    compiled = torch.compile(lambda *a: OPS.conv2d(*a), fullgraph=True, dynamic=True)
    for size in ((9, 7), (6, 12), (5, 5)):
        arguments = cases.conv2d(bits=4, size=size, stride=(stride, stride), dtype=torch.int8)
        y, code = run_and_get_code(compiled, *arguments)
        assert all("tem" in name for name in testing.kernels("".join(code)))
        assert "floor(" not in "".join(code)
        cases.assert_right("conv2d", arguments, y)


def quantize(x, zero_point, dtype):
    low = -128 if dtype == torch.int8 else 0
    return (torch.round(x.float() * 20) + (zero_point + low)).clamp(low, low + 255).to(dtype)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("k", [64, 45])
def test_linear_fuses_what_surrounds_it(bits, dtype, k):
    """Quantize as the prologue, bias, GELU and residual as the epilogue: one kernel, no more roundings than apart."""
    _, *rest = cases.linear((2, 11), 24, k, bits, dtype, out=HALF)
    x, residual = torch.randn(2, 11, k).half(), torch.randn(2, 11, 24).half()

    def f(x, residual, *rest):
        return F.gelu(OPS.linear(quantize(x, rest[4], dtype), *rest)) + residual

    exact = cases.exact("linear", (quantize(x, rest[4], dtype), *rest))
    exact = exact.rounded(HALF).activated("gelu").rounded(HALF) + residual
    exact.check(run(f, x, residual, *rest), HALF)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("kernel, c", [(3, 32), (3, 20), (1, 20)])
def test_conv2d_fuses_what_surrounds_it(bits, kernel, c):
    """The same for a channels-last module: padding must still read the zero point when the quantize is inside."""
    padding = (kernel // 2, kernel // 2)
    _, *rest = cases.conv2d(2, (6, 5), c, 24, (kernel, kernel), bits, torch.int8, padding=padding, out=HALF)
    x, residual = (torch.randn(2, n, 6, 5).half().to(memory_format=torch.channels_last) for n in (c, 24))

    def f(x, residual, *rest):
        y = OPS.conv2d(quantize(x, rest[4], torch.int8).permute(0, 2, 3, 1), *rest)
        return F.silu(y.permute(0, 3, 1, 2)) + residual

    y = run(f, x, residual, *rest)
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = cases.exact("conv2d", (quantize(x, rest[4], torch.int8).permute(0, 2, 3, 1), *rest))
    exact = exact.rounded(HALF).activated("silu").rounded(HALF) + residual.permute(0, 2, 3, 1)
    exact.check(y.permute(0, 2, 3, 1), HALF)


@pytest.mark.parametrize("tile, parts", [((16, 64, 32, 2, 1), 2), ((32, 128, 32, 2, 1), 4)])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_columns_of_a_tile_are_finished_in_parts(monkeypatch, tile, parts, name):
    tile = tiles.Tile(*tile)
    monkeypatch.setattr(tuned, "candidates", lambda *a, **k: [tile])
    assert tile.parts == parts
    if name == "linear":
        arguments = cases.linear((35,), 141, 45, 4, torch.int8, rows=True)
    else:
        arguments = cases.conv2d(1, (5, 6), 20, 141, bits=4, dtype=torch.int8)
    exact = cases.exact(name, arguments)
    residual = torch.randn(exact.value.shape)

    def f(residual, *rest):
        return F.silu(getattr(OPS, name)(*rest)) + residual

    (exact.activated("silu") + residual).check(run(f, residual, *arguments), torch.float32)


@pytest.mark.parametrize(
    "gate, bits, k, dtype, out",
    [
        ("gelu", 8, 100, torch.int8, HALF),
        ("gelu", 4, 45, torch.uint8, torch.float32),
        ("gelu_tanh", 2, 45, torch.int8, torch.float32),
        ("silu", 4, 64, torch.int8, HALF),
    ],
)
def test_gates(gate, bits, k, dtype, out):
    """Values, gates and the next quantize are one kernel."""
    arguments = cases.linear((2, 11), 150, k, bits, dtype, out=out, rows=True)

    def f(*arguments):
        value, gates = OPS.linear(*arguments).chunk(2, -1)
        y = value * reference.ACTIVATIONS[gate](gates)
        return y, quantize(y, arguments[5], dtype)

    y, codes = run(f, *arguments)
    exact = cases.exact("linear", arguments).rounded(out).glu(gate, out).rounded(out)
    exact.check(y, out)
    exact.codes(20, arguments[5]).check(codes, dtype)


@pytest.mark.parametrize("gate", ["gelu", "silu"])
def test_gates_of_shared_reductions(shared, gate):
    arguments = cases.linear((20,), 50, 300, 4, torch.int8, rows=True)
    y = run(lambda *a: OPS.linear_glu(*a), *arguments, gate, kernels=2)
    cases.exact("linear", arguments).glu(gate).check(y, torch.float32)


@pytest.fixture
def shared(monkeypatch):
    """Three programs share every reduction."""
    monkeypatch.setattr(tuned, "way", lambda arch, product: tuned.Way(tiles.fitting(arch, product.m, product.n)[-1], 3))


@pytest.mark.parametrize(
    "bits, lead, k, dtype, out, bias, rows",
    [
        (8, (2, 17), 300, torch.int8, torch.float16, True, True),
        (4, (33,), 256, torch.uint8, torch.float32, False, False),
        (2, (5,), 37, torch.int8, torch.bfloat16, True, False),  # fewer steps than programs
    ],
)
def test_shared_reductions(shared, bits, lead, k, dtype, out, bias, rows):
    arguments = cases.linear(lead, 70, k, bits, dtype, out=out, bias=bias, rows=rows)
    check("linear", arguments, out, kernels=2)


@pytest.mark.parametrize(
    "bits, geometry, kernels",
    [
        (8, dict(dtype=torch.int8, c=32), 4),  # codes, rows of zero points, product, sum
        (4, dict(dtype=torch.uint8, c=20, stride=(2, 1), padding=(0, 2), kernel=(3, 2), bias=False), 2),
        (2, dict(dtype=torch.int8, c=100, kernel=(1, 1), padding=(0, 0)), 2),
    ],
    ids=str,
)
def test_shared_reductions_of_convolutions(shared, no_prologue, bits, geometry, kernels):
    arguments = cases.conv2d(bits=bits, z=3, **geometry)
    y = run(lambda x, *rest: OPS.conv2d((x + 1) - 1, *rest), *arguments, kernels=kernels)
    cases.assert_right("conv2d", arguments, y)


def test_shared_reductions_of_any_size_compile_once(shared):
    compiled = torch.compile(lambda *a: OPS.linear(*a), fullgraph=True, dynamic=True)
    for rows in (33, 20, 5):
        arguments = cases.linear((2, rows), 30, 200, 4, torch.int8)
        cases.assert_right("linear", arguments, compiled(*arguments))


def test_what_follows_a_shared_reduction_adds_it_up(shared, no_prologue):
    """Bias, SiLU, residual, norm and the next quantize: one kernel; then the next product and its sum."""
    _, *first = cases.linear((20,), 48, 300, 8, torch.int8, out=HALF)
    _, *second = cases.linear((20,), 24, 48, 4, torch.int8, out=HALF)
    x, residual = cases.codes((20, 300), torch.int8), 40 * torch.randn(20, 48).half()  # as large as the product

    def f(x, residual, first, second):
        y = F.layer_norm(F.silu(OPS.linear(x, *first)) + residual, (48,))
        return OPS.linear(quantize(y, second[4], torch.int8), *second)

    y = run(f, x, residual, first, second, kernels=4)
    exact = cases.exact("linear", (x, *first)).rounded(HALF).activated("silu").rounded(HALF) + residual
    codes = exact.rounded(HALF).layer_norm().rounded(HALF).codes(20, second[4])
    cases.assert_right("linear", (codes, *second), y, HALF)


def test_next_quantize_is_an_epilogue():
    """A product writes 8-bit codes for the next one."""
    _, *first = cases.linear((40,), 48, 64, 8, torch.int8, out=HALF)
    _, *second = cases.linear((40,), 24, 48, 4, torch.int8, out=HALF)
    x = cases.codes((40, 64), torch.int8)

    def f(x, first, second):
        return OPS.linear(quantize(F.silu(OPS.linear(x, *first)), second[4], torch.int8), *second)

    y = run(f, x, first, second, kernels=2)
    codes = cases.exact("linear", (x, *first)).rounded(HALF).activated("silu").rounded(HALF).codes(20, second[4])
    cases.assert_right("linear", (codes, *second), y, HALF)


def test_prologue_is_left_out_where_it_costs_more(no_prologue):
    arguments = cases.linear((20,), 24, 64, 8, torch.int8)
    x = torch.randn(20, 64)
    run(lambda x, *rest: OPS.linear(quantize(x, rest[4], torch.int8), *rest), x, *arguments[1:], kernels=2)


def test_max_autotune_times_several_tiles():
    arguments = cases.linear((20,), 64, 64, 4, torch.int8)
    with compat.config.patch(max_autotune_gemm=True):
        check("linear", arguments)


def test_max_autotune_fuses_what_the_default_does(monkeypatch):
    """Every one of several equal layers fuses its activation and the codes of the next layer. With worker processes,
    torch fuses only one of them if the choice of a tile is left open (``return_multi_template``)."""
    real, made = compat.autotune_select_algorithm, []
    monkeypatch.setattr(compat, "autotune_select_algorithm", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    x, *layer = cases.linear((64,), 64, 64, 8, torch.int8)

    def f(x, *layer):
        for _ in range(3):
            x = quantize(F.silu(OPS.linear(x, *layer)), layer[4], torch.int8)
        return x

    launches = {}
    for autotune in (False, True):
        torch._dynamo.reset()
        with compat.config.patch(max_autotune_gemm=autotune):
            _, code = run_and_get_code(torch.compile(f, fullgraph=True), x, *layer)
        launches[autotune] = code[0].count(".run(")
    assert launches[True] == launches[False] == 3
    nodes = [r[0] if isinstance(r, tuple) else r for r in made]
    assert len(nodes) == 6 and not any(isinstance(n.data.data, compat.ir.MultiTemplateBuffer) for n in nodes)
