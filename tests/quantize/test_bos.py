"""BOS rows: recognised by value in any batch, chunk and type; text encoders that do not fit are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from mixdq_ao import BOSAwareTextEncoder, MixDQTensor, Plan, TextEncoderError, bos_aware, mixdq_config, quantize_
from mixdq_ao.quantize.bos import bos_mask
from mixdq_ao.quantize.quantizer import act_params

from ..conftest import bos_row, text_rows


def layer(bits: int = 8) -> tuple[torch.Tensor, MixDQTensor]:
    weight = torch.randn(10, 24)
    return weight, MixDQTensor.from_hp(weight, bits, act=act_params(-4, 4), bos_embedding=bos_row())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bos_rows_are_full_precision_and_the_others_as_without(bits):
    weight, quantized = layer(bits)
    plain = MixDQTensor.from_hp(weight, bits, act=act_params(-4, 4))
    x = text_rows(3)
    y = F.linear(x, quantized)
    full = (x.double() @ weight.double().t()).float()
    assert torch.allclose(y[:, 0], full[:, 0], rtol=1e-6, atol=1e-4)
    assert torch.equal(y[:, 1:], F.linear(x[:, 1:], plain))


def test_wherever_they_stand():
    weight, quantized = layer()
    x = torch.randn(4, 14, 24)
    places = [(0, 0), (0, 7), (2, 0), (3, 5)]  # a batch, two chunks of one prompt, an odd place
    for b, t in places:
        x[b, t] = bos_row()
    assert bos_mask(x, bos_row()).nonzero()[:, :2].tolist() == [list(p) for p in places]
    y = F.linear(x, quantized)
    for b, t in places:
        assert torch.allclose(y[b, t], weight @ bos_row(), rtol=1e-5, atol=1e-3)


def test_zero_negatives_are_ordinary_rows():
    _, quantized = layer()
    x = torch.cat([torch.zeros(1, 7, 24), text_rows(1)])
    y = F.linear(x, quantized)
    assert torch.equal(y[0], torch.zeros(7, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recognised_in_16_bits(dtype):
    x = text_rows(2).to(dtype)
    assert bos_mask(x, bos_row())[:, 0].all() and not bos_mask(x, bos_row())[:, 1:].any()


def test_a_bias_is_added_once():
    weight, quantized = layer()
    bias = torch.randn(10)
    y = F.linear(text_rows(1), quantized, bias)
    assert torch.allclose(y[0, 0], weight @ bos_row() + bias, rtol=1e-5, atol=1e-3)


def quantized_pipe(bundled):
    plan = Plan.uniform(bundled.pipe.unet, 8, 8).with_calibration(bundled.calibration)
    pipe = bundled.pipe
    quantize_(pipe.unet, mixdq_config(plan))
    for name in ("text_encoder", "text_encoder_2"):
        object.__setattr__(pipe, name, copy.deepcopy(getattr(pipe, name)))
    return bos_aware(pipe)


def test_calibration_finds_bos(bundled):
    calibration = bundled.calibration
    assert calibration.bos_embedding is not None
    name = next(n for n in calibration.layers if n.endswith("attn2.to_k"))
    layer = calibration.layers[name]
    wide, narrow = (max(map(abs, r)) for r in (layer.act_range, layer.prompt_range))
    assert wide >= 50 * narrow


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_batches_and_guidance(bundled, guidance):
    from mixdq_ao.models.pipelines import Sampling, generate_all
    from mixdq_ao.search.metrics import psnr

    sampling = Sampling(steps=2, guidance_scale=guidance, batch_size=4)
    prompts = bundled.prompts[:4]
    full = generate_all(bundled.pipe, prompts, sampling)
    pictures = generate_all(quantized_pipe(bundled), prompts, sampling)
    assert psnr(pictures, full).min() > 35


def test_wrapping_twice_is_wrapping_once(bundled):
    pipe = quantized_pipe(bundled)
    wrapped = type(pipe.text_encoder)
    assert type(bos_aware(pipe).text_encoder) is wrapped


def test_the_wrapper_is_the_encoder(bundled):
    pipe = quantized_pipe(bundled)
    assert isinstance(pipe.text_encoder, BOSAwareTextEncoder)
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert "bos_row" not in pipe.text_encoder.state_dict()


def test_another_clip_skip_is_refused(bundled):
    pipe = quantized_pipe(bundled)
    with pytest.raises(TextEncoderError, match="clip_skip"):
        pipe("a red circle", num_inference_steps=1, guidance_scale=0.0, clip_skip=1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_foreign_encoder_is_refused(bundled, wrapped):
    pipe = bundled.pipe
    quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, 8, 8).with_calibration(bundled.calibration)))
    foreign = copy.deepcopy(bos_aware(pipe).text_encoder if wrapped else pipe.text_encoder)
    with torch.no_grad():
        foreign.get_input_embeddings().weight.normal_()
    object.__setattr__(pipe, "text_encoder", foreign)
    with pytest.raises(TextEncoderError, match="calibrated with another encoder"):
        bos_aware(pipe)


def test_none_is_changed_where_one_is_foreign(bundled):
    pipe = bundled.pipe
    quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, 8, 8).with_calibration(bundled.calibration)))
    with torch.no_grad():
        pipe.text_encoder_2.get_input_embeddings().weight.normal_()
    with pytest.raises(TextEncoderError, match="text_encoder_2"):
        bos_aware(pipe)
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel" and not isinstance(
        pipe.text_encoder, BOSAwareTextEncoder
    )


def test_without_a_quantized_unet(bundled):
    with pytest.raises(TextEncoderError, match="quantize it first"):
        bos_aware(bundled.pipe)
