"""Prepared weights: never stale, never kept longer than the weight, safe to build from many threads."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from inductor_kernels import avx2, onednn, packing, routes, weights

from . import cases

OPS = torch.ops.inductor_kernels


@pytest.fixture(autouse=True, params=["int8", "avx2", "float32"])
def empty_cache(request, monkeypatch):
    if request.param == "float32":
        monkeypatch.setattr(routes, "has_avx2", lambda: False)
    monkeypatch.setattr(routes, "small", lambda: 0 if request.param == "int8" else 1 << 60)
    weights.clear()
    yield
    weights.weight_cache("speed")
    weights.clear()


def check(arguments):
    cases.assert_right("linear", arguments, OPS.linear(*arguments))


def test_second_call_prepares_nothing():
    arguments = cases.linear(bits=4)
    check(arguments)
    prepared = weights.find(arguments[1], arguments[2], 4, 17)
    check(arguments)
    assert weights.count() == 1 and weights.find(arguments[1], arguments[2], 4, 17) is prepared


def test_dropped_with_the_weight():
    arguments = cases.linear(bits=4)
    check(arguments)
    view = arguments[1].view(-1)
    del arguments
    gc.collect()
    assert weights.count() == 1
    del view
    gc.collect()
    assert weights.count() == 0


def summed(arguments):
    """``arguments`` with the weight_sum of the weight as it is now."""
    w = packing.unpack_weight(arguments[1], arguments[2], arguments[8], arguments[0].shape[-1])
    return (*arguments[:3], w.sum(1, dtype=torch.int32), *arguments[4:])


@pytest.mark.parametrize("bits", cases.BITS)
def test_changes_in_place_are_noticed(bits):
    arguments = cases.linear(bits=bits)
    check(arguments)
    other, zero_point, _ = cases.weight((9, 17), bits)
    arguments[1].copy_(other)
    check(summed(arguments))
    if zero_point is not None:
        arguments[2].copy_(zero_point)
        check(summed(arguments))
        check(summed((*arguments[:2], arguments[2] + 1, *arguments[3:])))


def test_replaced_weights_are_noticed():
    for _ in range(20):  # freed memory is soon given out again
        check(cases.linear(bits=4))
    assert weights.count() <= 1


def test_views_of_one_storage_are_told_apart():
    arguments = cases.linear((5,), 8, 8)
    w = arguments[1]
    for part in (w, w[:4], w[4:], w.t(), w[::2]):
        n = part.shape[0]
        check(
            (
                arguments[0],
                part,
                None,
                part.sum(1, dtype=torch.int32),
                torch.rand(n),
                *arguments[5:6],
                None,
                *arguments[7:],
            )
        )


def test_memory_mode_keeps_nothing():
    weights.weight_cache("memory")
    for bits in cases.BITS:
        check(cases.linear(bits=bits))
        cases_conv = cases.conv2d(bits=bits)
        cases.assert_right("conv2d", cases_conv, OPS.conv2d(*cases_conv))
    assert weights.count() == 0
    with pytest.raises(ValueError, match="weight_cache mode='fast'"):
        weights.weight_cache("fast")


def test_many_input_sizes_keep_a_bounded_number_of_layouts():
    arguments = cases.conv2d(bits=4)
    for size in range(3, 3 + 2 * weights.MAX_FORMS):
        call = (cases.codes((1, size, size, 8)), *arguments[1:])
        cases.assert_right("conv2d", call, OPS.conv2d(*call))
    assert len(weights.find(arguments[1], arguments[2], 4, 8).forms) <= weights.MAX_FORMS


@pytest.mark.parametrize("with_onednn", [True, False])
def test_one_layout_serves_every_batch_size(monkeypatch, with_onednn):
    """A copy for each batch size would take many times the memory of the weight."""
    if not (onednn.available() if with_onednn else avx2.available()):
        pytest.skip("no such kernel on this CPU")
    monkeypatch.setattr(routes, "takes_onednn", lambda *_: with_onednn)
    monkeypatch.setattr(routes, "has_avx2", lambda: not with_onednn)
    arguments = cases.conv2d(bits=4)
    shapes = [(batch, size, size, 8) for size in (6, 9) for batch in (1, 2, 5)]
    for shape in shapes:
        call = (cases.codes(shape), *arguments[1:])
        cases.assert_right("conv2d", call, OPS.conv2d(*call))
    forms = weights.find(arguments[1], arguments[2], 4, 8).forms
    kept = [forms[key] for key in forms if isinstance(key, tuple) and key[0] in shapes]
    assert len(kept) == len(shapes)
    held = {id(form if with_onednn else form.panels) for form in kept}
    assert len(held) == (2 if with_onednn else 1)


def test_threads():
    calls = [cases.linear((40,), 16, 24, bits) for bits in cases.BITS] * 8
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, calls))


def test_inference_tensors():
    with torch.inference_mode():
        arguments = cases.linear(bits=4)
        check(arguments)
        arguments[1].zero_()
        weights.clear()
        check(summed(arguments))


def test_threads_that_keep_many_forms_do_not_meet():
    prepared = weights.Prepared(8, 4)

    def work(thread):
        for i in range(3000):
            assert prepared.keep((thread, i), i) == i

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    assert len(prepared.forms) <= weights.MAX_FORMS
