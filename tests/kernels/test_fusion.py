"""Fusion on a GPU: the kernels in the code that Inductor generates are counted."""

import re

import pytest
import torch
from torch.nn import functional as F

from inductor_kernels import compat, lowering, roofline, testing

from . import cases
from .kernels import kinds
from .layers import OPS, conv2d, image, linear, parameters, product, tokens

pytest.importorskip("triton")
N, K = 1280, 640


@pytest.fixture
def always_in_front(monkeypatch):
    monkeypatch.setattr(roofline, "LAUNCH", 1)


@pytest.mark.parametrize("bits", cases.BITS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_quantize_product_bias_silu_residual(bits, arch, always_in_front):
    def f(x, r, *p):
        return F.silu(linear(x, p, bits)) + r

    assert kinds(f, tokens(2, 77, K), tokens(2, 77, N), *parameters(N, K, bits), arch=arch) == ["tem"]


@pytest.mark.parametrize("bits", cases.BITS)
def test_convolution_time_embedding_silu_residual(bits, always_in_front):
    def f(x, r, time, *p):
        return F.silu(conv2d(x, p, bits) + time[:, :, None, None]) + r

    inputs = image(2, 64, 16, 16), image(2, 128, 16, 16), tokens(2, 128), *parameters(128, 64, bits, (3, 3))
    assert kinds(f, *inputs) == ["tem"]


def test_pointwise_convolution_is_a_product(always_in_front):
    def f(x, r, *p):
        return conv2d(x, p, padding=0) + r

    code = testing.cuda_code(f, image(2, 64, 16, 16), image(2, 128, 16, 16), *parameters(128, 64, 8, (1, 1)))
    (source,) = testing.kernels(code).values()
    assert "triton_tem" in source and "tap_h" not in source


def test_norm_takes_the_quantize():
    def f(x, w, b, *p):
        return linear(F.layer_norm(x, (K,), w, b), p)

    found = kinds(f, tokens(2, 1024, K), tokens(K), tokens(K), *parameters(N, K))
    assert len(found) == 2 and found[0] in ("red", "per") and found[1] == "tem"


def test_per_token_scales_come_from_the_norm():
    def f(x, w, b, *p):
        y = F.layer_norm(x, (K,), w, b).float()
        row = y.abs().amax(-1).clamp(min=1e-6) / 127
        x_q = torch.round(y / row.unsqueeze(-1)).clamp(-127, 127).to(torch.int8)
        return product(x_q, p, rows=row)

    found = kinds(f, tokens(2, 1024, K), tokens(K), tokens(K), *parameters(N, K))
    assert len(found) == 2 and found[1] == "tem"


def test_query_key_and_value_share_one_quantize():
    def f(x, *p):
        return [linear(x, (*q[:4], p[4], q[5], p[6])) for q in (p[:7], p[7:14], p[14:])]

    found = kinds(f, tokens(2, 1024, K), *(parameters(K, K) * 3))
    assert found.count("poi") == 1 and len(found) <= 4


def test_what_reads_the_same_input_stays_out_of_a_product_with_its_quantize():
    """Inductor alone would make it an epilogue, because it has as many elements as the quantize in the prologue."""

    def f(x, *p):
        h = conv2d(F.silu(F.group_norm(x, 8)), p[:7])
        return h, conv2d(x, p[7:], padding=0)

    three, one = parameters(64, 128, 8, (3, 3)), parameters(64, 128, 8, (1, 1))
    found = kinds(f, tokens(1, 128, 8, 8), *three, *one)
    assert found.count("tem") == 2 and "call" not in found


def test_product_hands_codes_to_the_next():
    def f(x_q, *p):
        return linear(F.silu(product(x_q, p[:7])), p[7:], 4)

    inputs = tokens(2, 1024, K, dtype=torch.int8), *parameters(N, K), *parameters(K, N, 4)
    assert kinds(f, *inputs) == ["tem", "tem"]


def test_quantize_after_attention_goes_where_columns_are_few():
    """No producer can quantize the result of attention. With 640 channels at 512 pixels the product does, with more
    channels a separate kernel (see benchmarks/results/roofline.md)."""

    def f(x, *p):
        return linear(x.transpose(1, 2).reshape(1, -1, x.shape[1] * x.shape[3]), p)

    assert kinds(f, tokens(1, 10, 1024, 64), *parameters(640, 640)) == ["tem"]
    assert kinds(f, tokens(1, 20, 256, 64), *parameters(1280, 1280)) == ["poi", "tem"]


def test_text_projections_of_many_layers_do_not_each_quantize():
    assert kinds(lambda x, *p: linear(x, p), tokens(1, 77, 2048), *parameters(16640, 2048)) == ["poi", "tem"]


def test_split_shortcut_adds_two_products_without_the_concatenation():
    def f(a, b, *p):
        x = torch.cat([F.silu(a), F.silu(b)], 1)
        return conv2d(x[:, :64], p[:7], padding=0) + conv2d(x[:, 64:], p[7:], padding=0)

    inputs = (
        image(1, 64, 64, 64),
        image(1, 128, 64, 64),
        *parameters(640, 64, 8, (1, 1)),
        *parameters(640, 128, 8, (1, 1)),
    )
    assert sorted(kinds(f, *inputs)) == ["poi", "poi", "tem", "tem"]  # each half is quantized where it comes from


def test_large_quantize_stays_in_front_of_many_columns():
    assert kinds(lambda x, *p: linear(x, p), tokens(4096, K), *parameters(N, K)) == ["poi", "tem"]


def test_residual_block_of_convolutions():
    """A ResNet block without its norms: conv, time embedding, SiLU, conv, shortcut."""

    def f(x, time, *p):
        h = F.silu(conv2d(F.silu(x), p[:7]) + time[:, :, None, None])
        return conv2d(h, p[7:14]) + conv2d(x, p[14:], padding=0)

    first, second, shortcut = (parameters(128, k, 8, s) for k, s in ((64, (3, 3)), (128, (3, 3)), (64, (1, 1))))
    found = kinds(f, image(2, 64, 32, 32), tokens(2, 128), *first, *second, *shortcut)
    assert found.count("tem") == 3 and len(found) <= 5, found


@pytest.mark.parametrize("bits", cases.BITS)
def test_weight_only(bits):
    def f(x, *p):
        return F.gelu(OPS.linear_weight_only(x, *p[:2], p[3], p[5], bits))

    assert kinds(f, tokens(2, 77, K), *parameters(N, K, bits)) == ["tem"]


def test_what_cannot_be_generated_is_called(caplog):
    def grouped(x, *p):
        return OPS.conv2d(x, *p[:6], 8, [1, 1], [1, 1], [1, 1], 2, torch.float16)

    lowering._note.cache_clear()
    x = torch.zeros(1, 8, 8, 8, dtype=torch.int8)
    for _ in range(2):
        assert kinds(grouped, x, *parameters(8, 4, 8, (3, 3))) == ["call"]
    assert [r.message for r in caplog.records if "inductor_kernels" in r.name].count(
        "inductor_kernels: no kernel is generated (grouped convolution); the operator is called instead"
    ) == 1


@pytest.mark.parametrize("capability", [None, 75])
def test_without_triton_or_on_an_old_gpu_the_operator_is_called(capability, monkeypatch, caplog):
    lowering._note.cache_clear()
    monkeypatch.setattr(compat, "triton_device", lambda device: capability)
    x = tokens(16, K, dtype=torch.int8)
    for _ in range(2):
        assert kinds(lambda x, *p: product(x, p), x, *parameters(N, K)) == ["call"]
    said = [r.message for r in caplog.records if f"cuda with capability {capability}" in r.message]
    assert len(said) == 1


def test_nothing_waits_for_the_device():
    """No value is read on the host, which would rule out CUDA graphs."""

    def f(x, w, b, *p):
        return linear(F.layer_norm(x, (K,), w, b), p)

    code = testing.cuda_code(f, tokens(2, 64, K), tokens(K), tokens(K), *parameters(N, K))
    assert not re.search(
        r"\.item\(|\.cpu\(|device='cpu'|_local_scalar_dense|synchronize", code.rpartition("async_compile.wait")[2]
    )


def test_modules_and_subclasses_are_opened():
    """The parameters and buffers of a module become inputs of the code."""
    code = testing.cuda_code(torch.nn.Linear(16, 8), torch.zeros(4, 16))
    assert "addmm" in code and "cuda" in code
