"""The operators on a GPU in eager mode: integer products by ``torch._int_mm`` have the same bits as in float64,
weight-only products have float32 sums."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inductor_kernels import int_mm, reference

from . import cases


@pytest.fixture
def by_integers(monkeypatch):
    """Calls a function as on CUDA, checks that ``torch._int_mm`` gets what CUDA accepts, and counts its calls."""
    multiply, calls = torch._int_mm, []

    def checked(a, b):
        assert a.dtype == b.dtype == torch.int8 and a.is_contiguous() and b.t().is_contiguous()
        assert a.shape[0] > 16 and a.shape[1] > 0 and a.shape[1] % 8 == 0 and b.shape[1] > 0 and b.shape[1] % 8 == 0
        calls.append(a.shape)
        return multiply(a, b)

    def call(function, arguments):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(reference, "INTEGER_UNITS", ("cpu",))
            patch.setattr(torch, "_int_mm", checked)
            return function(*arguments), len(calls)

    return call


def without_sum(arguments):
    return (*arguments[:3], None, *arguments[4:])


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("z", [0, 117, 255])
@pytest.mark.parametrize(
    "lead, n, k",
    [((), 1, 1), ((16,), 8, 16), ((17,), 9, 17), ((2, 77), 33, 65), ((3, 1, 40), 64, 200), ((0,), 4, 8), ((5,), 0, 8),
     ((5,), 4, 0)],
)  # fmt: skip
def test_linear(by_integers, bits, dtype, z, lead, n, k):
    arguments = cases.linear(lead, n, k, bits, dtype, z=z, rows=True)
    expected = reference.linear(*arguments)
    for given in (arguments, without_sum(arguments)):
        y, calls = by_integers(reference.linear, given)
        assert torch.equal(y, expected) and y.stride() == expected.stride() and calls == (y.numel() > 0 and k > 0)


GEOMETRIES = [
    dict(),
    dict(kernel=(1, 1), padding=(0, 0)),
    dict(kernel=(1, 1), padding=(1, 0), stride=(2, 2)),
    dict(kernel=(5, 3), padding=(2, 0), stride=(1, 2)),
    dict(kernel=(2, 4), padding=(3, 2), stride=(3, 1)),
    dict(dilation=(1, 2), padding=(0, 1), stride=(2, 1)),
    dict(dilation=(2, 2), padding=(2, 2)),
    dict(c=3, o=5, batch=1, size=(3, 3), padding=(0, 0)),  # one pixel
    dict(c=33, o=17, batch=1, size=(13, 4)),
    dict(batch=0),
    dict(o=0),
    dict(c=0),
]


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("z", [0, 117, 255])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv2d(by_integers, monkeypatch, bits, z, geometry):
    for dtype in (torch.uint8, torch.int8):
        arguments = cases.conv2d(bits=bits, dtype=dtype, z=z, **geometry)
        expected = reference.conv2d(*arguments) if 0 not in geometry.values() else None
        x, *rest = without_sum(arguments)
        in_planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for piece, given in ((int_mm.PIECE, arguments), (1, arguments), (4000, (in_planes, *rest))):
            monkeypatch.setattr(int_mm, "PIECE", piece)
            y, calls = by_integers(reference.conv2d, given)
            if expected is None:
                assert calls == 0 and (y == arguments[6]).all()
            else:
                assert torch.equal(y, expected) and y.stride() == expected.stride()
                assert calls == 1 if piece > 4000 else y.shape[1] if piece == 1 else calls >= 1


def test_grouped_convolutions_and_sums_beyond_int32_stay_in_float64(by_integers):
    arguments = cases.conv2d(groups=2)
    y, calls = by_integers(reference.conv2d, arguments)
    assert calls == 0 and torch.equal(y, reference.conv2d(*arguments))
    for k, expected in ((int_mm.LONGEST, 1), (int_mm.LONGEST + 1, 0)):
        arguments = list(cases.linear((2,), 3, k, z=0, bias=False))
        arguments[0], arguments[1] = torch.full((2, k), 255, dtype=torch.uint8), torch.full((3, k), -127).to(torch.int8)
        y, calls = by_integers(reference.linear, without_sum(arguments))
        exact = torch.tensor(-255.0 * 127 * k, dtype=torch.float64).float() * arguments[4]
        assert calls == expected and torch.equal(y, exact.expand(2, 3))


def test_a_gpu_whose_library_lacks_the_product(monkeypatch):
    arguments = cases.linear((20,), 9, 17)
    expected = reference.linear(*arguments)
    monkeypatch.setattr(reference, "INTEGER_UNITS", ("cpu",))
    lacking = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul with transpose_mat1 1")
    monkeypatch.setattr(torch, "_int_mm", mock.Mock(side_effect=lacking))
    assert torch.equal(reference.linear(*arguments), expected)
    monkeypatch.setattr(torch, "_int_mm", mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        reference.linear(*arguments)


def product_of_everything(x_q, w, x_image, w_image, z, scale):
    """A linear layer and a padded convolution."""
    y = reference.linear(x_q, w, None, None, scale, z, None, None, 8, torch.float32)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    return y, reference.conv2d(x_image, w_image, None, None, scale, z, None, 8, *geometry, torch.float32)


@pytest.fixture
def tensors():
    x, w = cases.linear((3, 4), 12, 17)[:2]
    x_image, w_image = cases.conv2d()[:2]
    return x, w, x_image, w_image, cases.zero_point(), torch.rand(12)


def test_it_is_traced_and_runs_in_inference_mode(by_integers, tensors):
    expected = product_of_everything(*tensors)
    compiled = torch.compile(product_of_everything, fullgraph=True, backend="aot_eager")
    for function in (compiled, torch.inference_mode()(product_of_everything)):
        found = by_integers(function, tensors)[0]
        assert all(map(torch.equal, found, expected))


def test_nothing_waits_for_the_gpu(tensors, monkeypatch):
    """Meta tensors have no values, so reading one on the host would fail."""
    expected = product_of_everything(*tensors)
    monkeypatch.setattr(reference, "INTEGER_UNITS", ("meta",))
    found = product_of_everything(*(t.to("meta") for t in tensors))
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]


class Seen(TorchDispatchMode):
    """Collects the types of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        self.made |= {t.dtype for t in tree_leaves(y) if isinstance(t, torch.Tensor)}
        return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lead", [(2, 9), (), (0, 3)])
def test_weights_only_sums_on_a_gpu_are_float32(dtype, lead):
    """float64 runs at a 64th of the speed on consumer GPUs."""
    linear = cases.weight_only(cases.linear(lead, 33, 45), dtype, conv=False)
    image = cases.weight_only(cases.conv2d(c=20), dtype, conv=True)
    check_float32(reference.linear_weight_only, linear, "cuda")
    check_float32(reference.conv2d_weight_only, image, "meta")  # torch without CUDA cannot pretend a convolution there


def _fake(t, device):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def check_float32(function, arguments, device):
    expected = function(*arguments)
    with FakeTensorMode(), Seen() as seen:
        y = function(*(_fake(a, device) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert (y.shape, y.dtype, y.device.type) == (expected.shape, expected.dtype, device)
    assert torch.float64 not in seen.made and torch.float32 in seen.made


def test_sixteen_bit_products_have_sums_that_float16_does_not_hold(monkeypatch):
    """``torch.mm`` is replaced by a function that sums as a tensor core does."""

    def wide(a, b, out_dtype):
        return (a.double() @ b.double()).to(out_dtype)

    x, *rest = cases.weight_only(cases.linear((7,), 9, 170), torch.float16, conv=False)
    x = x * 2000
    monkeypatch.setattr(reference, "_has_wide_sums", lambda x: True)
    monkeypatch.setattr(torch, "mm", wide)
    found = reference.linear_weight_only(x, *rest)
    total = x.double() @ reference.unpack_weight(*rest[:2], 8, 170).double().t()
    assert total.abs().max() > 65504 and torch.isfinite(found).all()
    cases.assert_right("linear_weight_only", (x, *rest), found, torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", cases.BITS)
def test_on_a_gpu(bits):
    ops = torch.ops.inductor_kernels
    for lead, n, k in (((2, 77), 640, 2048), ((1,), 33, 65)):
        check_on_a_gpu("linear", ops.linear, cases.linear(lead, n, k, bits, torch.int8))
    for geometry in GEOMETRIES[:9]:
        check_on_a_gpu("conv2d", ops.conv2d, cases.conv2d(bits=bits, dtype=torch.int8, **geometry))
    for dtype in (torch.float16, torch.bfloat16):
        linear = cases.weight_only(cases.linear((2, 77), 640, 2048, bits), dtype, conv=False)
        check_on_a_gpu("linear_weight_only", ops.linear_weight_only, linear)
        image = cases.weight_only(cases.conv2d(bits=bits), dtype, conv=True)
        check_on_a_gpu("conv2d_weight_only", ops.conv2d_weight_only, image)


def check_on_a_gpu(name, op, arguments):
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    op(*moved)  # makes cuBLAS's handle, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*moved)
    graph.replay()
    cases.assert_right(name, arguments, y.cpu(), y.dtype)
