"""The generated kernels on a real GPU, compiled by Inductor as for a user."""

import pytest
import torch
from torch.nn import functional as F

from inductor_kernels import compat, tiles, tuned

from . import cases
from .layers import OPS, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def check(name, arguments, dtype=torch.float32, **options):
    """Compile an operator, run it on the GPU, and compare it with exact arithmetic on the CPU."""
    torch._dynamo.reset()  # or sizes that differ between two calls of one test become dynamic
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    op = getattr(OPS, name)
    y = torch.compile(lambda *a: op(*a), fullgraph=True, **options)(*moved)
    cases.assert_right(name, arguments, y.cpu(), dtype)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize(
    "lead, n, k", [((1,), 1280, 1280), ((77,), 640, 2048), ((2, 1024), 1280, 640), ((33,), 50, 101)]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_linear(bits, lead, n, k, dtype):
    check("linear", cases.linear(lead, n, k, bits, dtype, out=torch.float16, rows=True), torch.float16)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("z", [0, 255])
def test_extreme_codes(bits, z):
    check("linear", cases.linear((256,), 128, 4096, bits, torch.int8, z=z, extreme=True))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("stride, kernel, c", [(1, 3, 320), (2, 3, 64), (1, 1, 64), (1, 3, 4)])
def test_conv2d(bits, stride, kernel, c):
    padding = (kernel // 2, kernel // 2)
    arguments = cases.conv2d(2, (32, 31), c, 320, (kernel, kernel), bits, torch.int8, stride=(stride, stride),
                             padding=padding, out=torch.bfloat16)  # fmt: skip
    check("conv2d", arguments, torch.bfloat16)


@pytest.mark.parametrize("bits", cases.BITS)
def test_weight_only(bits):
    for dtype in (torch.float16, torch.bfloat16):
        flat = cases.weight_only(cases.linear((77,), 320, 640, bits), dtype, conv=False)
        check("linear_weight_only", flat, dtype)
        image = cases.weight_only(cases.conv2d(2, (16, 16), 32, 64, bits=bits), dtype, conv=True)
        check("conv2d_weight_only", image, dtype)


@pytest.mark.parametrize("bits", cases.BITS)
def test_autotuned(bits):
    with compat.config.patch(max_autotune_gemm=True):
        check("linear", cases.linear((512,), 640, 320, bits, torch.int8))
        check("conv2d", cases.conv2d(1, (32, 32), 64, 128, bits=bits, dtype=torch.int8))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("shares", [2, 8])
def test_shared_reductions(bits, shares, monkeypatch):
    monkeypatch.setattr(tuned, "way", lambda arch, p: tuned.Way(tiles.fitting(arch, p.m, p.n)[-1], shares))
    check("linear", cases.linear((256,), 1280, 5120, bits, torch.int8, out=torch.float16), torch.float16)
    check("linear", cases.linear((33,), 50, 101, bits, torch.uint8, rows=True))
    check("conv2d", cases.conv2d(1, (16, 16), 640, 320, bits=bits, dtype=torch.int8))


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("n", [2560, 70])
def test_gates_and_the_quantize_behind_them(bits, n):
    half = torch.float16
    x, w, wzp, total, scale, *rest = cases.linear((256,), n, 640, bits, torch.int8, out=half)
    arguments = x, w, wzp, total, scale / 50, *rest  # far from what float16 cannot hold

    def f(*arguments):
        value, gate = OPS.linear(*arguments).chunk(2, -1)
        y = value * F.gelu(gate)
        return y, quantize(y, 20, arguments[5])

    y, codes = torch.compile(f, fullgraph=True)(*[a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments])
    exact = cases.exact("linear", arguments).rounded(half).glu("gelu", half).rounded(half)
    exact.check(y.cpu(), half)
    exact.codes(20, arguments[5]).check(codes.cpu(), torch.int8)


def test_cuda_graphs_need_no_host():
    x, (_, *rest) = torch.randn(64, 64), cases.linear((64,), 64, 64, 4, torch.int8)
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in (x, *rest)]

    def f(x, *rest):
        return F.silu(OPS.linear(quantize(x, 20, rest[4]), *rest))

    compiled = torch.compile(f, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        y = compiled(*moved)
    cases.exact("linear", (quantize(x, 20, rest[4]), *rest)).activated("silu").check(y.cpu(), torch.float32)


def test_eager_serves_as_well():
    arguments = cases.linear((9,), 20, 30, 4, torch.int8)
    y = OPS.linear(*[a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments])
    cases.assert_right("linear", arguments, y.cpu())
