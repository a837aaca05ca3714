"""Layers of a model: SDXL's 794, groups, split points, bytes; plans that do not fit."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import nn

from mixdq_ao import LayerPlan, Plan, PlanError, mixdq_config, quantize_
from mixdq_ao.app.measure import held_bytes
from mixdq_ao.layers import find_layers, group_of, reads_text, split_points, text_readers


def test_sdxl_has_794_layers(sdxl):
    layers = find_layers(sdxl)
    kinds = [type(m) for m in layers.values()]
    assert (len(layers), kinds.count(nn.Linear), kinds.count(nn.Conv2d)) == (794, 743, 51)
    assert sum(map(reads_text, layers)) == 140
    assert sum(group_of(n) == "content" for n in layers) == 420


def test_sdxl_split_points_come_from_the_model(sdxl):
    assert list(split_points(sdxl).values()) == [1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]
    assert all(n in find_layers(sdxl) for n in split_points(sdxl))


def test_a_plan_covers_sdxl_by_name(sdxl):
    plan = Plan.uniform(sdxl, 4, 16)
    assert set(mixdq_config(plan).fqn_to_config) == set(find_layers(sdxl))
    summary = plan.summary(sdxl)
    assert summary.average_weight_bits == 4 and summary.counts == {4: 794}
    weights = sum(m.weight.numel() for m in find_layers(sdxl).values())
    assert 0.5 <= summary.bytes / weights <= 0.51


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_predicted_bytes_are_the_bytes_held(unet, calibration, bits):
    plan = Plan.uniform(unet, bits, 8).with_calibration(calibration)
    predicted = plan.summary(unet).bytes
    quantize_(unet, mixdq_config(plan))
    assert held_bytes(unet) == predicted


@pytest.mark.parametrize(
    ("name", "layer", "says"),
    [
        ("nowhere", LayerPlan(weight_bits=8), "'nowhere' is not a linear or convolution layer"),
        ("in", LayerPlan(weight_bits=8), "is not a linear"),
        ("conv_in", LayerPlan(weight_bits=8, act_bits=8), "'conv_in': act_bits is 8 but there is no act_range"),
        ("conv_in", LayerPlan(weight_bits=8, split=4), "split is 4"),
        ("conv_in", LayerPlan(weight_bits=8, bos=True), "bos is true"),
        ("time_embedding.linear_1", LayerPlan(weight_bits=8, split=2), "split is 2"),
    ],
)
def test_a_plan_that_does_not_fit(unet, name, layer, says):
    before = {n: p.clone() for n, p in unet.named_parameters()}
    plan = Plan({"conv_out": LayerPlan(weight_bits=8), name: layer}, {}, (1.0,))
    with pytest.raises(PlanError, match=says):
        plan.validate(unet)
    with pytest.raises(PlanError, match=says):
        quantize_(unet, mixdq_config(plan))
    assert all(torch.equal(before[n], p) for n, p in unet.named_parameters())


def test_bos_embedding_of_another_width(unet):
    name = next(n for n in find_layers(unet) if reads_text(n))
    plan = Plan({name: LayerPlan(weight_bits=8, bos=True)}, {}, (1.0, 2.0))
    with pytest.raises(PlanError, match="bos_embedding has 2"):
        plan.validate(unet)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")]
)
def test_convolutions_that_cannot_be_quantized(module):
    model = nn.ModuleDict({"c": module})
    with pytest.raises(PlanError, match="layer 'c': padding"):
        Plan.uniform(model, 8, 16).validate(model)


def video_models():
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}
    with torch.device("meta"):
        yield UNet3DConditionModel(
            **blocks,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
        yield UNetMotionModel(
            **blocks,
            motion_num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        )
        yield UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=8,
            num_attention_heads=(2, 4),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        )


@pytest.mark.parametrize("model", list(video_models()), ids=lambda model: type(model).__name__)
def test_attention_over_frames_reads_no_text(model):
    readers = text_readers(model)
    assert readers and all(model.get_submodule(n).in_features == 8 for n in readers)
    assert any(reads_text(n) for n in set(find_layers(model)) - readers) or "SpatioTemporal" in type(model).__name__
    layers = find_layers(model)
    assert all(0 < at < layers[n].in_channels for n, at in split_points(model).items())


@pytest.mark.parametrize(
    "name",
    [
        "context_embedder",  # SD3, FLUX, FLUX.2, Chroma, AuraFlow
        "context_embedder.proj_in",  # HunyuanVideo
        "caption_projection.linear_1",  # PixArt, SANA, LTX
        "caption_projection.0.linear",  # HiDream
        "condition_embedder.text_embedder.linear_1",  # Wan
        "patch_embed.text_proj",  # CogView4
        "txt_in",  # Qwen-Image
        "cap_embedder.1",  # Z-Image
        "time_caption_embed.caption_embedder.1",  # Lumina2
        "text_embeddings.in_layer",  # Kandinsky5
    ],
)
def test_the_first_layer_of_a_text_embedder(name):
    """The layer alone reads the encoders' output, not what comes after it, nor one of a pooled embedding."""
    model = nn.Module()
    for other in (name, f"{name}.later", f"time_text_embed.{name}", "pooled_text_embeddings.in_layer", "proj_out"):
        parent = model
        *path, last = other.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(4, 4))
    assert text_readers(model) == {name}
    assert group_of(name) == "content"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer_blocks.0.img_mlp.net.0.proj", "content"),
        ("layers.3.feed_forward.w1", "content"),
        ("visual_transformer_blocks.0.cross_attention.to_query", "content"),
        ("visual_transformer_blocks.0.self_attention.to_query", "quality"),
        ("layers.3.attention.to_q", "quality"),
        ("time_text_embed.timestep_embedder.linear_1", "quality"),
    ],
)
def test_groups_by_other_names(name, group):
    assert group_of(name) == group
