"""The C kernel: exact sums, every remainder of its tiles, and machines without a compiler."""

import pytest
import torch

from inductor_kernels import avx2, reference

from . import cases

needs_kernel = pytest.mark.skipif(not avx2.available(), reason="no x86 compiler")


def call(arguments):
    x, w, _, _, scale, z, bias, rows, *_ = arguments
    return avx2.product(avx2.pack_linear(w), x, scale, int(z), bias, rows, (*x.shape[:-1], w.shape[0]))


@needs_kernel
@pytest.mark.parametrize("m", [1, 5, 6, 7, 95, 96, 97, 200])
@pytest.mark.parametrize("n, k", [(1, 1), (15, 2), (16, 31), (17, 33), (48, 770)])
def test_remainders(m, n, k):
    arguments = cases.linear((m,), n, k, dtype=torch.int8 if m % 2 else torch.uint8, rows=bool(k % 2))
    cases.assert_right("linear", arguments, call(arguments))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_do_not_depend_on_threads(threads):
    arguments = cases.linear((130,), 100, 1600, z=0, bias=False, extreme=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = call((*arguments[:4], torch.ones(100), *arguments[5:]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, (arguments[0].double() @ arguments[1].double().t()).float())


@needs_kernel
@pytest.mark.parametrize("levels", [15, 255])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000, 400_001])
def test_codes_of_every_remainder(count, levels):
    x = torch.randn(count) * 40
    x[: count // 2] = x[: count // 2].round() + 0.5  # ties
    given = torch.tensor(0.5), torch.tensor(levels // 3, dtype=torch.int32), levels
    assert torch.equal(avx2.quantize(x, *given), reference.quantize(x, *given))


@needs_kernel
def test_codes_of_what_is_no_number():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
    codes = avx2.quantize(x, torch.tensor(3.0), torch.tensor(7, dtype=torch.int32), 255)
    assert codes.tolist() == [0, 255, 0, 255, 0]


@needs_kernel
@pytest.mark.parametrize("view", [
    lambda x: x, lambda x: x.permute(0, 2, 3, 1), lambda x: x[:, 1:4], lambda x: x[..., ::2],
    lambda x: x[:, :1].expand(-1, 5, -1, -1), lambda x: x.transpose(0, 1),
])  # fmt: skip
def test_codes_of_any_layout(view):
    x = view(torch.randn(3, 5, 7, 9))
    given = torch.tensor(20.0), torch.tensor(128, dtype=torch.int32), 255
    codes = avx2.quantize(x, *given)
    assert codes.shape == x.shape and torch.equal(codes, reference.quantize(x, *given))


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 5), (2, 4, 4, 2), (3, 9, 16, 17), (1, 130, 40, 40)])
def test_codes_of_planes(shape):
    x = reference.like_planes(torch.randn(shape).permute(0, 2, 3, 1))
    given = torch.tensor(20.0), torch.tensor(128, dtype=torch.int32), 255
    for part in (x, x[..., 1:], x[1:]):
        codes = avx2.quantize_planes(part, *given)
        assert codes.is_contiguous() and torch.equal(codes, reference.quantize(part, *given))


@needs_kernel
@pytest.mark.parametrize("geometry", [dict(), dict(o=17, size=(5, 3)), dict(stride=(2, 2), c=3, o=33, size=(31, 9))])
def test_conv_into_planes(geometry):
    """Both memory orders get the same numbers, also where a tile's rows belong to two images."""
    x, w, _, total, scale, z, bias, _, stride, padding, *_ = cases.conv2d(**geometry)
    act = torch.tensor(5.0), z, 255
    rest = w, None, total, scale, bias, 8, stride, padding, [1, 1], 1
    values = torch.randn(x.shape) * 10
    rows = torch.ops.inductor_kernels.quantize_conv2d(values, *act, *rest)
    planes = torch.ops.inductor_kernels.quantize_conv2d(reference.like_planes(values), *act, *rest)
    assert rows.is_contiguous() and reference.in_planes(planes) and torch.equal(rows, planes)


@needs_kernel
@pytest.mark.parametrize("k", [1, 7, 16, 31, 40])
@pytest.mark.parametrize("m", [1, 97, 300])
def test_linear_of_values(m, k):
    """Quantizing while reading gives the same bits as a separate pass."""
    x, w, _, _, scale, z, bias, *_ = cases.linear((m,), 33, k)
    values, inverse, packed = torch.randn(m, k) * 60, torch.tensor(1.3), avx2.pack_linear(w)
    codes = reference.quantize(values, inverse, z, 200)
    given = scale, int(z), bias, None, (m, 33)
    assert torch.equal(avx2.product(packed, values, *given, inverse.item(), 200), avx2.product(packed, codes, *given))


@pytest.fixture
def uncached(monkeypatch):
    """The library is looked for again in the test, and again after it."""
    avx2._library.cache_clear()
    yield
    monkeypatch.undo()
    avx2._library.cache_clear()


def test_absent_without_a_compiler(uncached, monkeypatch, caplog):
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert not avx2.available()
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert "the AVX2 kernel was not built" in caplog.text


def test_can_be_turned_off(uncached, monkeypatch):
    monkeypatch.setenv("INDUCTOR_KERNELS_AVX2", "0")
    assert not avx2.available()
