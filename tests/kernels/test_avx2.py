"""The C kernel by itself: exact sums, every remainder of its tiles, and what happens without a compiler."""

import pytest
import torch

from inductor_kernels import avx2

from . import cases

needs_kernel = pytest.mark.skipif(not avx2.available(), reason="no x86 compiler")


def call(arguments):
    x, w, _, _, scale, z, bias, rows, *_ = arguments
    return avx2.product(avx2.linear_plan(w), x, scale, int(z), bias, rows, (*x.shape[:-1], w.shape[0]))


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


def test_absent_without_a_compiler(monkeypatch, caplog):
    monkeypatch.setenv("CC", "/no/such/compiler")
    avx2._function.cache_clear()
    try:
        assert not avx2.available()
    finally:
        monkeypatch.undo()
        avx2._function.cache_clear()
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert "the AVX2 kernel was not built" in caplog.text


def test_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("INDUCTOR_KERNELS_AVX2", "0")
    avx2._function.cache_clear()
    try:
        assert not avx2.available()
    finally:
        monkeypatch.undo()
        avx2._function.cache_clear()
