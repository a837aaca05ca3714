"""Every loader refuses weights with values that quantization cannot produce, by name."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file

from mixdq_ao import CheckpointError, Plan, load_quantized, mixdq_config, quantize_, save_quantized
from mixdq_ao.models.fused_projections import fuse_projections
from mixdq_ao.models.fused_text import fuse_text_projections
from mixdq_ao.models.joint_names import without_joint
from mixdq_ao.models.serialization import save_pipeline
from mixdq_ao.models.text_reuse import reuse_text_projections
from tests.conftest import unet_inputs

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAN = float("nan")


@pytest.fixture
def saved(quantized, plan, tmp_path):
    save_quantized(quantized, tmp_path, plan=plan)
    return tmp_path


def stored(directory):
    """Tensors and metadata of a saved model."""
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()


def change(directory, ends, value):
    """Multiplies or replaces the first stored tensor whose key has a given end. Returns the key."""
    path, (tensors, metadata) = directory / WEIGHTS, stored(directory)
    key = next(k for k in sorted(tensors) if k.endswith(ends))
    tensors[key].copy_(value(tensors[key]) if callable(value) else torch.full_like(tensors[key], value))
    save_file(tensors, path, metadata=metadata)
    return key


@pytest.mark.parametrize("load", [load_quantized, UNet2DConditionModel.from_pretrained])
@pytest.mark.parametrize(
    ("ends", "value", "says"),
    [
        ("_weight_scale", NAN, "scale holds other values than expected: positive"),
        ("_weight_scale", lambda t: -t, "scale holds"),
        ("_weight_act_scale", 0.0, "act_scale holds"),
        (
            "_weight_act_inv_scale",
            lambda t: 2 * t,
            "act_inv_scale holds .* one over act_scale",
        ),
        ("_weight_act_zero_point", 1000, "act_zero_point holds other values than expected: a code from 0 to"),
        ("_weight_weight_zero_point", 100, "weight_zero_point holds"),
        ("_weight_bos_output", NAN, "bos_output holds"),
        ("_weight_bos_embedding", NAN, "bos_embedding holds"),
    ],
)
def test_values_are_looked_at(saved, load, ends, value, says):
    change(saved, ends, value)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: .* is damaged: {says}"):
        load(saved)


@pytest.mark.parametrize("load", [load_quantized, UNet2DConditionModel.from_pretrained])
def test_a_plan_that_contradicts_the_weights_is_refused(saved, load):
    config = json.loads((saved / "config.json").read_text())
    layers = config["quantization_config"]["plan"]["layers"]
    name = next(n for n, layer in layers.items() if layer["weight_bits"] == 4)
    layers[name]["weight_bits"] = 8
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"layer '{name}' is planned as W8.* and stored as W4"):
        load(saved)


@torch.no_grad()
@pytest.mark.parametrize("fuse", [fuse_projections, fuse_text_projections])
@pytest.mark.parametrize("save", [save_quantized, UNet2DConditionModel.save_pretrained])
@pytest.mark.parametrize("load", [load_quantized, UNet2DConditionModel.from_pretrained])
def test_fused_models_are_saved_as_if_they_were_apart(unet, calibration, tmp_path, fuse, save, load):
    plan = Plan.uniform(unet, 4, 8).with_calibration(calibration)
    quantize_(unet, mixdq_config(plan))
    save(unet, tmp_path / "apart")
    inputs = unet_inputs()
    expected = unet(**inputs)[0]
    assert fuse(unet)
    save(unet, tmp_path / "fused")
    (apart, about), (fused, about_fused) = (stored(tmp_path / name) for name in ("apart", "fused"))
    assert about == about_fused and apart.keys() == fused.keys()
    assert all(torch.equal(apart[key], fused[key]) for key in apart)
    loaded = load(tmp_path / "fused")
    assert loaded.config.quantization_config.plan == plan
    assert torch.equal(loaded(**inputs)[0], expected)


def test_joint_projections_of_the_model_itself_stay():
    apart = {f"a.{name}.weight": 0 for name in ("to_q", "to_k", "to_v")}
    assert without_joint(apart | {"a.to_qkv.weight": 1, "to_kv.weight": 2, "text_projections.layers.0.weight": 3}) == (
        apart | {"to_kv.weight": 2}
    )
    assert without_joint({"a.to_qkv.weight": 1, "b.to_q.weight": 0}) == {"a.to_qkv.weight": 1, "b.to_q.weight": 0}


@torch.no_grad()
def test_a_pipeline_that_keeps_the_texts_projections_is_saved_as_ever(quantized, tmp_path):
    pipe = DDPMPipeline(copy.deepcopy(quantized), DDPMScheduler())
    reuse_text_projections(pipe)
    inputs = unet_inputs()
    expected = pipe.unet(**inputs)[0]
    pipe.save_pretrained(tmp_path / "diffusers")
    save_pipeline(pipe, tmp_path / "ours")
    for name in ("diffusers", "ours"):
        loaded = DDPMPipeline.from_pretrained(tmp_path / name)
        assert torch.equal(loaded.unet(**inputs)[0], expected)
