"""quantize_, then diffusers' own saving and loading, of a whole pipeline: UNet, text encoders, VAE."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mixdq_ao import (
    CalibrationError,
    CheckpointError,
    MixDQError,
    Plan,
    QuantizationError,
    Sampling,
    bos_aware,
    calibrate,
    load_quantized,
    mixdq_config,
    quantize_,
    save_quantized,
)
from mixdq_ao.layers import find_layers
from mixdq_ao.models import MixDQConfig
from mixdq_ao.models.components import quantize_text_encoders, quantize_vae, vae_sensitivity
from mixdq_ao.models.declared import known_plan
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.quantize.tensor import is_quantized

from .same import assert_same

ONE = Sampling(steps=1)


def tiny_clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=9, bos_token_id=38, eos_token_id=39, pad_token_id=1,
        )
    ).eval()  # fmt: skip


def tiny_t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


@pytest.fixture(params=[tiny_clip, tiny_t5])
def encoder(request):
    torch.manual_seed(4)
    return request.param()


IDS = torch.tensor([[38, 5, 7, 39], [38, 9, 39, 39]])


@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_a_text_encoder_by_itself(encoder, tmp_path, shard):
    plan = Plan.uniform(encoder, 8, 16)
    exact = encoder(IDS).last_hidden_state
    encoder.save_pretrained(tmp_path / "full")
    quantize_(encoder, mixdq_config(plan))
    output = encoder(IDS).last_hidden_state
    assert 0 < (output - exact).norm() / exact.norm() < 0.02
    encoder.save_pretrained(tmp_path / "q", max_shard_size=shard)
    assert (len(list((tmp_path / "q").glob("*.safetensors"))) > 1) == (shard == "3KB")
    loaded = type(encoder).from_pretrained(tmp_path / "q")
    assert_same(encoder, loaded)
    assert_same(encoder, load_quantized(tmp_path / "q"))
    assert torch.equal(loaded(IDS).last_hidden_state, output)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(encoder, type(encoder).from_pretrained(tmp_path / "again"))
    save_quantized(encoder, tmp_path / "ours")
    assert_same(encoder, type(encoder).from_pretrained(tmp_path / "ours"))
    streamed = type(encoder).from_pretrained(tmp_path / "full", quantization_config=MixDQConfig(plan))
    assert_same(encoder, streamed)
    streamed.save_pretrained(tmp_path / "streamed")
    assert_same(encoder, type(encoder).from_pretrained(tmp_path / "streamed"))


def test_another_type_while_loading(tmp_path):
    encoder = tiny_clip()
    quantize_(encoder, mixdq_config(Plan.uniform(encoder, 4, 16)))
    encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(encoder.to(torch.bfloat16), loaded)


def test_a_damaged_text_encoder_is_one_error(tmp_path):
    encoder = tiny_clip()
    quantize_(encoder, mixdq_config(Plan.uniform(encoder, 8, 16)))
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        CLIPTextModel.from_pretrained(tmp_path)


def quantized_everywhere(bundled):
    """Text encoders first: the denoiser is calibrated with their embeddings."""
    pipe = bundled.pipe
    quantize_text_encoders(pipe)
    calibration = calibrate(pipe, bundled.prompts, steps=1)
    latents = generate_all(pipe, bundled.prompts[:2], ONE, "latent")[:1, :, :8, :8] / pipe.vae.config.scaling_factor
    plan = Plan.uniform(pipe.unet, 8, 8).with_calibration(calibration)
    quantize_(pipe.unet, mixdq_config(plan))
    return pipe, plan, latents


def test_a_whole_pipeline_with_diffusers_alone(bundled, tmp_path):
    """No attach, no save_pipeline: quantize_, save_pretrained, from_pretrained, in this process and in a fresh one."""
    exact = generate_all(bundled.pipe, bundled.prompts[:2], ONE)
    pipe, plan, latents = quantized_everywhere(bundled)
    vae = pipe.vae
    state = {n: p for n, p in vae.named_parameters()}
    try:
        vae_plan = quantize_vae(vae, latents)
        assert any(layer.quantized for layer in vae_plan.layers.values())
        assert known_plan(pipe.unet) == plan and known_plan(vae) == vae_plan
        pictures = generate_all(bos_aware(pipe), bundled.prompts[:2], ONE)
        error = (pictures - exact).square().mean()
        assert -10 * torch.log10(error) > 30  # dB
        pipe.save_pretrained(tmp_path / "saved")
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
        again.set_progress_bar_config(disable=True)
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            model = getattr(again, name)
            assert any(is_quantized(m.weight) for m in find_layers(model).values())
            assert_same(getattr(pipe, name), model)
        assert torch.equal(generate_all(bos_aware(again), bundled.prompts[:2], ONE), pictures)
    finally:  # the VAE is shared by all tests
        for name, parameter in state.items():
            layer, _, key = name.rpartition(".")
            vae.get_submodule(layer)._parameters[key] = parameter
        vae._internal_dict = type(vae.config)({k: v for k, v in vae.config.items() if k != "quantization_config"})
        del vae.hf_quantizer
    code = (
        "import sys, mixdq_ao\n"
        "assert not {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'saved')!r})\n"
        "print(type(pipe.text_encoder.text_model.encoder.layers[0].mlp.fc1.weight).__name__\n"
        "      if hasattr(pipe.text_encoder, 'text_model') else\n"
        "      type(pipe.text_encoder.encoder.layers[0].mlp.fc1.weight).__name__, pipe.unet.conv_out.weight)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("MixDQTensor") == 2


def test_sensitive_layers_of_a_vae_keep_16_bits(_bundled):
    vae = _bundled.pipe.vae
    before = {n: p.data_ptr() for n, p in vae.named_parameters()}
    latents = torch.randn(1, vae.config.latent_channels, 8, 8)
    found = vae_sensitivity(vae, latents)
    assert {n: p.data_ptr() for n, p in vae.named_parameters()} == before
    assert set(found) == {n for n in find_layers(vae) if n.startswith(("decoder.", "post_quant_conv"))}
    worse = vae_sensitivity(vae, latents, weight_bits=2)
    assert all(worse[n] < found[n] for n in found)
    with pytest.raises(CalibrationError, match="no layer of AutoencoderKL reaches 500"):
        quantize_vae(vae, latents, floor=500, sensitivity=found)


def test_a_second_quantize_keeps_what_was_known(unet, calibration):
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    names = sorted(plan.layers)
    for part in (names[:3], names[3:]):
        quantize_(unet, mixdq_config(Plan({n: plan.layers[n] for n in part}, {}, plan.bos_embedding)))
    assert known_plan(unet).layers == plan.layers


def test_a_model_that_has_adapters_is_not_saved_half(quantized, tmp_path):
    state = {"conv_in.base_layer.weight": quantized.conv_in.weight}
    with pytest.raises(CheckpointError, match="unload_lora_weights"):
        quantized.hf_quantizer.get_state_dict_and_metadata(state, safe_serialization=True)


def test_the_config_says_the_plan(quantized, plan, tmp_path):
    quantized.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert Plan.from_json(stored["plan"]).layers == {n: v for n, v in plan.layers.items()}


def test_the_wrong_part_of_a_pipeline_is_named(bundled):
    with pytest.raises(MixDQError, match="pipe is a CLIPTextModel without text encoders, expected"):
        quantize_text_encoders(bundled.pipe.text_encoder)
    with pytest.raises(QuantizationError, match="model is a StableDiffusionXLPipeline, expected nn.Module"):
        quantize_vae(bundled.pipe, torch.zeros(1, 4, 8, 8))
    with pytest.raises(QuantizationError, match="vae is a UNet2DConditionModel, which decodes nothing"):
        quantize_vae(bundled.pipe.unet, torch.zeros(1, 4, 8, 8))
