"""Every operator on the CPU against exact arithmetic, in every variety of arguments."""

import pytest
import torch

import inductor_kernels
from inductor_kernels import avx2, routes, weights

from . import cases

OPS = torch.ops.inductor_kernels


@pytest.fixture(params=["chosen", "int8", "avx2", "float32"])
def route(request, monkeypatch):
    """Runs with the kernel chosen by size, or with one kernel for all sizes (int8 only where it is exact)."""
    weights.clear()
    if request.param != "chosen":
        monkeypatch.setattr(routes, "small", lambda: 0 if request.param == "int8" else 1 << 60)
        monkeypatch.setattr(routes, "has_avx2", lambda: request.param == "avx2" and avx2.available())


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize(
    "lead, n, k, z, extreme",
    [
        ((1,), 1, 1, 0, False),
        ((5,), 9, 17, 255, False),
        ((), 4, 6, 128, False),
        ((2, 77), 33, 65, 117, False),
        ((300,), 130, 260, 0, True),
        ((130,), 64, 512, 255, True),
        ((0,), 4, 8, 3, False),
    ],
)
def test_linear(route, bits, dtype, lead, n, k, z, extreme):
    arguments = cases.linear(lead, n, k, bits, dtype, z=z, extreme=extreme)
    cases.assert_right("linear", arguments, OPS.linear(*arguments))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias, rows", [(False, False), (False, True), (True, True)])
def test_linear_options(route, bits, out, bias, rows):
    arguments = cases.linear((3, 11), 24, 40, bits, out=out, bias=bias, rows=rows)
    cases.assert_right("linear", arguments, OPS.linear(*arguments), out)


GEOMETRIES = [
    dict(),
    dict(stride=(2, 2)),
    dict(kernel=(1, 1), padding=(0, 0)),
    dict(kernel=(1, 1), padding=(1, 1), stride=(2, 2)),
    dict(kernel=(5, 3), padding=(2, 0), stride=(1, 2)),
    dict(dilation=(2, 2), padding=(2, 2)),
    dict(dilation=(1, 2), padding=(0, 1), stride=(2, 1)),
    dict(groups=2),
    dict(groups=8, o=16),
    dict(c=3, o=5),
    dict(c=33, o=17, batch=1, size=(13, 4)),
    dict(c=64, o=32, size=(16, 16), extreme=True, z=0),
    dict(c=64, o=32, size=(16, 16), extreme=True, z=255),
]


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv2d(route, bits, geometry):
    for dtype in (torch.uint8, torch.int8):
        arguments = cases.conv2d(bits=bits, dtype=dtype, **geometry)
        cases.assert_right("conv2d", arguments, OPS.conv2d(*arguments))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_conv2d_types(route, bits, out):
    arguments = cases.conv2d(bits=bits, out=out, bias=out != torch.float16)
    cases.assert_right("conv2d", arguments, OPS.conv2d(*arguments), out)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only(bits, dtype):
    flat = cases.weight_only(cases.linear((2, 7), 33, 65, bits), dtype, conv=False)
    cases.assert_right("linear_weight_only", flat, OPS.linear_weight_only(*flat), dtype)
    for geometry in GEOMETRIES[:9]:
        arguments = cases.weight_only(cases.conv2d(bits=bits, **geometry), dtype, conv=True)
        cases.assert_right("conv2d_weight_only", arguments, OPS.conv2d_weight_only(*arguments), dtype)


@pytest.mark.parametrize("bits", cases.BITS)
def test_any_strides(route, bits):
    x, *rest = cases.linear((6, 4), 12, 20, bits)
    strided = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(OPS.linear(strided, *rest), OPS.linear(x, *rest))
    x, *rest = cases.conv2d(bits=bits)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y = OPS.conv2d(strided, *rest)
    assert y.is_contiguous() and torch.equal(y, OPS.conv2d(x, *rest))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("warm", [False, True])
def test_vectors_of_any_strides(route, bits, warm):
    for name, arguments in (("linear", cases.linear((6,), 12, 20, bits)), ("conv2d", cases.conv2d(bits=bits))):
        op, spread = getattr(OPS, name), cases.apart(arguments)
        if warm:
            op(*spread)
        cases.assert_right(name, arguments, op(*spread))


def test_reference_agrees_with_exact_arithmetic():
    for bits in cases.BITS:
        arguments = cases.linear((4,), 7, 33, bits, torch.int8, rows=True)
        cases.assert_right("linear", arguments, inductor_kernels.reference.linear(*arguments))
        arguments = cases.conv2d(bits=bits, dtype=torch.int8, stride=(2, 1))
        cases.assert_right("conv2d", arguments, inductor_kernels.reference.conv2d(*arguments))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_harmless(route, bits, dtype):
    """Autocast must not round integers held in float32; in float16 they would even overflow."""
    out = {"out": dtype}
    linear, conv2d = cases.linear((9,), 30, 250, bits, **out), cases.conv2d(c=30, bits=bits, **out)
    for name, arguments in (
        ("linear", linear),
        ("conv2d", conv2d),
        ("linear_weight_only", cases.weight_only(linear, dtype, conv=False)),
        ("conv2d_weight_only", cases.weight_only(conv2d, dtype, conv=True)),
    ):
        op = getattr(OPS, name)
        with torch.autocast("cpu", dtype):
            y = op(*arguments)
        assert torch.equal(y, op(*arguments)) and y.isfinite().all()
        cases.assert_right(name, arguments, y, dtype)


def test_grad_mode_is_harmless():
    arguments = cases.linear()
    with torch.enable_grad():
        assert not OPS.linear(*arguments).requires_grad
    with torch.inference_mode():
        cases.assert_right("linear", arguments, OPS.linear(*arguments))


def replaced(arguments, index, value):
    return (*arguments[:index], value, *arguments[index + 1 :])


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(5, 17), "linear: x_q is torch.float32"),
        (0, torch.zeros(5, 16, dtype=torch.uint8), "linear: weight is torch.int8.*16"),
        (1, torch.zeros(9, 17, dtype=torch.uint8), "linear: weight is torch.uint8"),
        (2, torch.zeros(9, dtype=torch.int8), "linear: weight_zero_point is torch.int8"),
        (3, torch.zeros(9), "linear: weight_sum is torch.float32"),
        (4, torch.zeros(8), r"linear: scale is torch.float32 \[8\]; expected float32 \[9\]"),
        (5, torch.zeros(1, dtype=torch.int32), "linear: zero_point"),
        (6, torch.zeros(3), "linear: bias"),
        (7, torch.zeros(4), "linear: row_scale"),
        (8, 3, "linear: weight_bits is 3"),
        (9, torch.int32, "linear: out_dtype"),
    ],
)
def test_errors_name_the_argument(index, value, message):
    with pytest.raises(ValueError, match=message):
        OPS.linear(*replaced(cases.linear(), index, value))


@pytest.mark.parametrize(
    "index, value, message",
    [
        (1, torch.tensor(20.0, dtype=torch.float64), "quantize: inv_scale is torch.float64"),
        (3, 70000, "quantize: levels is 70000"),
        (7, torch.ones(9, dtype=torch.float64), "linear: scale is torch.float64"),
        (7, torch.ones(9, dtype=torch.float16), "linear: scale is torch.float16"),
        (8, torch.ones(8), "linear: bias"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_errors_for_a_weight_that_is_known_are_those_of_a_new_one(route, known, index, value, message):
    _, w, wzp, total, scale, z, bias, _, bits, _ = cases.linear()
    arguments = (torch.randn(5, 17), torch.tensor(20.0), z, 255, w, wzp, total, scale, bias, bits)
    if known:
        OPS.quantize_linear(*arguments)
    with pytest.raises(ValueError, match=message):
        OPS.quantize_linear(*replaced(arguments, index, value))


@pytest.mark.parametrize(
    "index, value, message",
    [
        (8, [0, 1], "conv2d: stride"),
        (9, [-1, 1], "conv2d: padding"),
        (11, 3, "conv2d: groups is 3"),
        (0, torch.zeros(2, 1, 1, 8, dtype=torch.uint8), "conv2d: x is .*3x3"),
    ],
)
def test_conv_errors_name_the_argument(index, value, message):
    arguments = replaced(cases.conv2d(padding=(0, 0)), index, value)
    with pytest.raises(ValueError, match=message):
        OPS.conv2d(*arguments)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize(
    "options",
    [
        {"c": 2, "o": 136, "groups": 2},
        {"c": 3, "o": 99, "groups": 3, "padding": (0, 0)},
        {"c": 1, "o": 8, "padding": (3, 3)},
        {"c": 1, "o": 8, "kernel": (2, 1), "padding": (2, 0)},
        {"c": 16, "o": 16, "groups": 16, "kernel": (1, 3), "padding": (1, 0)},
        {"c": 16, "o": 16, "groups": 16},
        {"c": 16, "o": 24, "groups": 2, "padding": (4, 4)},
    ],
    ids=str,
)
def test_one_channel_to_a_group(monkeypatch, bits, options):
    """oneDNN's AVX-512 kernels do not correct for the zero point in some of these."""
    weights.clear()
    monkeypatch.setattr(routes, "small", lambda: 0)
    arguments = cases.conv2d(**options, bits=bits)
    cases.assert_right("conv2d", arguments, OPS.conv2d(*arguments))
