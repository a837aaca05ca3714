"""Models other than SDXL: layers, groups, text rows, sensitivities, plans."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mixdq_ao import allocate, analyze, calibrate, mixdq_config, quantize_
from mixdq_ao.layers import find_layers, group_of, text_readers
from tests.search.zoo import TOKENS, WIDTH, ZOO, ToyPipeline

PROMPTS = ["0", "1", "2"]
EVERY = pytest.mark.parametrize("name", ZOO)


def plain(i: int) -> Tensor:
    """As T5 gives: nothing is the same for all prompts."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(i))


def with_bos(i: int) -> Tensor:
    """As CLIP gives, or a decoder-only language model: the first row always the same, and large."""
    text = plain(i)
    text[0] = torch.linspace(-300, 300, WIDTH)
    return text


def with_outlier(i: int) -> Tensor:
    """An outlier that moves and differs."""
    text = plain(i)
    text[1 + i] *= 200
    return text


@EVERY
def test_every_layer_is_found_and_has_a_group(name):
    model = ZOO[name].build()
    layers = find_layers(model)
    leaves = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == len(leaves) > 10
    groups = {n: group_of(n) for n in layers}
    assert set(groups.values()) == {"content", "quality"}
    assert ZOO[name].text in text_readers(model)
    assert groups[ZOO[name].text] == "content"
    for layer, group in groups.items():
        if "attn1.to_q" in layer or layer.endswith(("attn.to_q", "conv_out", "proj_in", "norm_out.linear")):
            assert group == "quality", layer
        if ".ff" in layer or layer.endswith(("add_k_proj", "proj_mlp")):
            assert group == "content", layer


def test_flux_single_blocks_and_its_output():
    assert group_of("single_transformer_blocks.3.proj_out") == "content"
    assert group_of("proj_out") == group_of("single_transformer_blocks.3.attn.to_v") == "quality"


@EVERY
def test_calibrated_analyzed_planned_and_run(name):
    pipe = ToyPipeline(ZOO[name], plain)
    calibration = calibrate(pipe, PROMPTS)
    called = [n for n in find_layers(pipe.transformer) if n in calibration.layers]
    assert len(called) >= len(find_layers(pipe.transformer)) - 2
    assert calibration.bos_embedding is None and "no row set apart" in calibration.metadata["text_rows"]
    found = analyze(pipe, PROMPTS, method="probe", calibration=calibration, probes=2, weight_bits=(4, 8), act_bits=(8,))
    assert sorted(found.layers) == sorted(called)
    assert {n: v.group for n, v in found.layers.items()} == {n: group_of(n) for n in called}
    overridden = analyze(
        pipe, PROMPTS, method="probe", calibration=calibration, probes=1, weight_bits=(8,), rule=lambda _: "quality"
    )
    assert {v.group for v in overridden.layers.values()} == {"quality"}
    plan = allocate(found, weight_bits=6, weight_choices=(4, 8), objective="additive").plan.with_calibration(
        calibration
    )
    pictures = pipe(PROMPTS, [torch.Generator().manual_seed(i) for i in range(3)]).images
    quantized = copy.copy(pipe)
    quantized.transformer = copy.deepcopy(pipe.transformer)
    quantize_(quantized.transformer, mixdq_config(plan))
    images = quantized(PROMPTS, [torch.Generator().manual_seed(i) for i in range(3)]).images
    assert 0 < (images - pictures).abs().max() < 0.2


@EVERY
def test_a_first_row_that_stands_out_is_set_apart(name):
    calibration = calibrate(ToyPipeline(ZOO[name], with_bos), PROMPTS)
    assert calibration.bos_embedding == pytest.approx(with_bos(0)[0].tolist())
    assert calibration.metadata["text_rows"].startswith("first row set apart: the same for every prompt")
    apart = {n for n, v in calibration.layers.items() if v.prompt_range is not None}
    assert apart == text_readers(ZOO[name].build()) & set(calibration.layers)
    lo, hi = calibration.layers[ZOO[name].text].prompt_range or (0.0, 0.0)
    assert -10 < lo < hi < 10


def test_other_outliers_are_said_and_not_set_apart():
    calibration = calibrate(ToyPipeline(ZOO["PixArt-Sigma"], with_outlier), PROMPTS)
    assert calibration.bos_embedding is None
    assert "row " in calibration.metadata["text_rows"] and "is an outlier" in calibration.metadata["text_rows"]
    off = calibrate(ToyPipeline(ZOO["PixArt-Sigma"], with_bos), PROMPTS, bos=False)
    assert off.bos_embedding is None and "text_rows" not in off.metadata


def test_a_first_row_that_differs_is_not_set_apart():
    def differs(i: int) -> Tensor:
        return torch.cat([300.0 * (1 + i) * torch.ones(1, WIDTH), plain(i)[1:]])

    calibration = calibrate(ToyPipeline(ZOO["SD3"], differs), PROMPTS)
    assert calibration.bos_embedding is None
    assert "row 0 is an outlier" in calibration.metadata["text_rows"]
    assert "differs between prompts" in calibration.metadata["text_rows"]
