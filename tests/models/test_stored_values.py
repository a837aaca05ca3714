"""Weights whose stored values no quantizing makes are refused by name, whoever loads them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file

from mixdq_ao import CheckpointError, load_quantized, save_quantized
from mixdq_ao.models.fused_text import fuse_text_projections
from mixdq_ao.models.serialization import save_pipeline
from mixdq_ao.models.text_reuse import reuse_text_projections

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAN = float("nan")


@pytest.fixture
def saved(quantized, plan, tmp_path):
    save_quantized(quantized, tmp_path, plan=plan)
    return tmp_path


def change(directory, ends, value):
    """The first stored tensor whose key ends so is multiplied or replaced. Returns the key."""
    path = directory / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
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


def test_what_could_not_be_loaded_is_not_saved(quantized, tmp_path):
    unet = copy.deepcopy(quantized)
    fuse_text_projections(unet)
    with pytest.raises(CheckpointError, match="unfuse_text_projections"):
        unet.save_pretrained(tmp_path / "fused")
    with pytest.raises(CheckpointError, match="unfuse_text_projections"):
        save_quantized(unet, tmp_path / "fused")


def test_a_pipeline_that_keeps_the_texts_projections_says_how_to_save_it(quantized, tmp_path):
    pipe = type("Pipe", (), {"unet": copy.deepcopy(quantized)})()
    reuse_text_projections(pipe)
    pipe.components = {"unet": pipe.unet}
    with pytest.raises(CheckpointError, match=r"pipe\.unet = pipe\.unet\.undo\(\) first"):
        save_pipeline(pipe, tmp_path / "pipe")
