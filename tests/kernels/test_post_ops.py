"""Sums, activations and codes that oneDNN fuses into a product, and the graphs in which it does."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from inductor_kernels import checks, onednn, reference, routes, weights

from . import cases
from .budget import Bounded, known

OPS = torch.ops.inductor_kernels
INVERSE, ZERO = torch.tensor(23.0), torch.tensor(31, dtype=torch.int32)
FAST = ("gelu", "silu")  # taken by oneDNN on every machine


@pytest.fixture(autouse=True)
def products_of_any_size_in_onednn(monkeypatch):
    weights.clear()
    monkeypatch.setattr(routes, "small", lambda: 0)


def assert_codes(found, arguments, activation="none"):
    """The codes of the unrounded result. oneDNN is given 1 / INVERSE and divides by it: two more roundings."""
    inverse = known(INVERSE).rounded(torch.float32).rounded(torch.float32)
    cases.exact("linear", arguments).activated(activation).codes(inverse, ZERO).check(found, torch.uint8)
    assert len(found.unique()) > 20


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_the_bits_of_adding_afterwards(bits, dtype):
    arguments, other = cases.linear((2, 9), 33, 70, bits, dtype), torch.randn(2, 9, 33)
    expected = OPS.linear(*arguments) + other
    for _ in range(2):  # the first call lays the weight out
        assert torch.equal(OPS.linear_post(*arguments, other, "none", None, None), expected)


@pytest.mark.skipif(not onednn.writes(torch.bfloat16), reason="oneDNN's int8 products write bfloat16 from AVX-512 on")
def test_sixteen_bits_where_onednn_writes_them():
    arguments, other = cases.linear((3,), 16, 32, 4, out=torch.bfloat16), torch.randn(3, 16).bfloat16()
    y = OPS.linear_post(*arguments, other, "none", None, None)
    (cases.exact("linear", arguments) + other).check(y, torch.bfloat16)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_activations_and_codes(activation, bits, rows):
    """Also where it falls back to other kernels: scales per row, and 8-bit weights on machines without VNNI."""
    for out in (torch.float32, torch.bfloat16):
        arguments = cases.linear((2, 9), 33, 70, bits, rows=rows, out=out)
        y = OPS.linear_post(*arguments, None, activation, None, None)
        cases.exact("linear", arguments).activated(activation).check(y, out)
        assert_codes(OPS.linear_post(*arguments, None, activation, INVERSE, ZERO), arguments, activation)


def test_nothing_to_multiply():
    arguments = cases.linear((0,), 16, 32, 4)
    assert OPS.linear_post(*arguments, None, "gelu", INVERSE, ZERO).shape == (0, 16)


def test_what_does_not_fit_is_refused():
    arguments = cases.linear((3,), 16, 32, 4)
    OPS.linear(*arguments)
    for other in (torch.zeros(16), torch.zeros(3, 16).half()):
        with pytest.raises(ValueError, match=r"linear_post: other is .*expected torch.float32 \[3, 16\]"):
            OPS.linear_post(*arguments, other, "none", None, None)
    with pytest.raises(ValueError, match="linear_post: activation is 'tanh'; expected 'none' or 'gelu'"):
        OPS.linear_post(*arguments, None, "tanh", None, None)
    with pytest.raises(ValueError, match="linear_post: out_zero_point is None; expected an int32 tensor"):
        OPS.linear_post(*arguments, None, "gelu", INVERSE, None)


def taken(f, *inputs, dynamic=False):
    """(results, generated code, how often it calls ``linear_post`` and ``linear``)."""
    torch._dynamo.reset()
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(f, fullgraph=True, dynamic=dynamic), *inputs)
    return found, code, (code.count("linear_post.on_cpu("), code.count("linear.on_cpu("))


def test_sums_in_a_graph():
    """Sums are fused in either order, but not where the product is read twice or the other operand is broadcast."""
    (a, b, c, d), other = [cases.linear((20,), 24, 32, 4) for _ in range(4)], torch.randn(20, 24)

    def f(other, row):
        twice = OPS.linear(*c)
        return OPS.linear(*a) + other, other.relu() + OPS.linear(*b), twice + other, twice.relu(), OPS.linear(*d) + row

    found, _, calls = taken(f, other, other[0])
    first, second, twice, fourth = (cases.exact("linear", arguments) for arguments in (a, b, c, d))
    relu = Bounded(twice.value.relu(), twice.error)
    exact = first + other, second + other.relu(), twice + other, relu, fourth + other[0]
    for y, expected in zip(found, exact, strict=True):
        expected.check(y, torch.float32)
    assert calls == (2, 2)


def test_sums_with_a_factor_stay_sums_with_a_factor():
    """Inductor's pattern matcher ignores ``alpha``."""
    (a, b, c), other = [cases.linear((20,), 24, 32, 4) for _ in range(3)], torch.randn(20, 24)

    def f(other, inverse, zero):
        codes = torch.add(OPS.linear(*c) * inverse, zero, alpha=2).round().clamp(0, 255).to(torch.uint8)
        return torch.add(OPS.linear(*a), other, alpha=2), torch.add(other, OPS.linear(*b), alpha=-0.5), codes

    found, _, calls = taken(f, other, INVERSE, ZERO)
    first, second, third = (cases.exact("linear", arguments) for arguments in (a, b, c))
    (first + other * 2).check(found[0], torch.float32)
    (second * -0.5 + other).check(found[1], torch.float32)
    third.codes(known(INVERSE), 2 * ZERO).check(found[2], torch.uint8)
    assert calls == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_in_a_graph(dtype):
    """Everything between two layers is fused; the codes are computed from the unrounded results."""
    layers = [cases.linear((20,), 24, 32, 4, out=dtype) for _ in range(3)]
    names = ("none", *FAST)

    def f(inverse, zero, *codes):
        made = (reference.ACTIVATIONS[n](OPS.linear(x, *a[1:])) for n, x, a in zip(names, codes, layers, strict=True))
        return [reference.quantize(y, inverse, zero, 255) for y in made]

    found, code, calls = taken(f, INVERSE, ZERO, *(a[0] for a in layers))
    for codes, arguments, name in zip(found, layers, names, strict=True):
        assert_codes(codes, arguments, name)
    assert calls == (3, 0) and "cpp_pybinding(" not in code


def test_activations_in_a_graph():
    """An activation is fused also where no 8-bit codes follow; a generated kernel computes 4-bit codes."""
    a, b = (cases.linear((20,), 24, 32, 4) for _ in range(2))

    def f(inverse, zero):
        return F.gelu(OPS.linear(*a)), reference.quantize(F.silu(OPS.linear(*b)), inverse, zero, 15)

    (y, codes), code, calls = taken(f, INVERSE, ZERO)
    cases.exact("linear", a).activated("gelu").check(y, torch.float32)
    assert codes.max() == 15
    assert calls == (2, 0) and code.count("cpp_pybinding(") == 1 and ".erf()" not in code and ".exp()" not in code


def test_what_stays_with_inductor():
    """Not fused: a result with other readers, scales per row, and an activation that gates another tensor."""
    shared, gate = cases.linear((20,), 24, 32, 4), cases.linear((20,), 24, 32, 4)
    rows, up = cases.linear((20,), 24, 32, 4, rows=True), torch.randn(20, 24)

    def f(inverse, zero, up):
        y = OPS.linear(*shared)
        gated = F.silu(OPS.linear(*gate)) * up
        return reference.quantize(y, inverse, zero, 255), F.gelu(y), F.silu(OPS.linear(*rows)), gated

    found, _, calls = taken(f, INVERSE, ZERO, up)
    assert_codes(found[0], shared)
    assert calls == (0, 3)


@pytest.mark.parametrize("reason", ["small", "dynamic"])
def test_products_not_known_to_be_large(reason, monkeypatch):
    a = cases.linear((20,), 24, 32, 4)
    monkeypatch.setattr(routes, "small", lambda: 0 if reason == "dynamic" else 20 * 24 * 32 + 1)

    def f(x, inverse, zero):
        return reference.quantize(F.gelu(OPS.linear(x, *a[1:])), inverse, zero, 255)

    found, _, calls = taken(f, a[0], INVERSE, ZERO, dynamic=reason == "dynamic")
    assert_codes(found, a, "gelu")
    assert calls == (0, 1)
