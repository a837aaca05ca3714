"""Smoothing: full precision stays the same to the bit, channels come nearer to one size, wrong folds are taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixdq_ao import CalibrationError, QuantizationError, Sampling, calibrate
from mixdq_ao.quantize.folds import Fold, exponents, find_folds
from mixdq_ao.search.smoothing import smooth_
from mixdq_ao.search.trial import run
from tests.search.zoo import ZOO, ToyPipeline

PROMPTS = ["0", "1", "2"]
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def text(i: int) -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(i))


def unbalanced() -> ToyPipeline:
    """SD 1.5's layout with one channel far larger than others after a norm and after a GEGLU."""
    pipe = ToyPipeline(ZOO["SD 1.5"], text)
    block: Any = pipe.transformer.get_submodule(BLOCK)
    with torch.no_grad():
        block.norm3.weight[3] *= 50
        block.ff.net[0].proj.weight[5] *= 50
    return pipe


def output(pipe: ToyPipeline) -> torch.Tensor:
    return run(pipe, PROMPTS, Sampling(), images=False).denoised


def same_weights(pipe: ToyPipeline) -> bool:
    fresh = unbalanced().transformer.state_dict()
    return all(torch.equal(p, fresh[n]) for n, p in pipe.transformer.state_dict().items())


def test_the_model_stays_and_its_channels_come_together():
    pipe = unbalanced()
    before, seen = output(pipe), {}

    def see(name: str):
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0].abs().flatten(0, -2).amax(0)

        return hook

    folds = find_folds(pipe.transformer)
    spread = {}
    for when in ("before", "after"):
        seen.clear()
        handles = [
            pipe.transformer.get_submodule(f.readers[0]).register_forward_pre_hook(see(f.readers[0])) for f in folds
        ]
        output(pipe)
        for handle in handles:
            handle.remove()
        spread[when] = {n: (x.max() / x.median()).item() for n, x in seen.items()}
        if when == "before":
            done = smooth_(pipe, PROMPTS)
    assert torch.equal(output(pipe), before)
    worst = [n for n in spread["before"] if spread["before"][n] > 20]
    assert worst and all(spread["after"][n] < 0.5 * spread["before"][n] for n in worst)
    powers = exponents(done[next(f for f in done if f.source == f"{BLOCK}.norm3")].smoothing or "")
    assert len(powers) == 16 and powers[3] == max(powers) > 1 and max(map(abs, powers)) <= 4


def test_calibration_smooths_for_itself_and_leaves_the_model():
    pipe = unbalanced()
    plain, smooth = calibrate(pipe, PROMPTS), calibrate(pipe, PROMPTS, smoothing=0.5)
    assert same_weights(pipe)
    assert not any(layer.smoothing for layer in plain.layers.values())
    reader = f"{BLOCK}.ff.net.0.proj"
    assert exponents(smooth.layers[reader].smoothing or "")[3] > 1
    widths = [max(map(abs, c.layers[reader].act_range)) for c in (plain, smooth)]
    assert widths[1] < 0.5 * widths[0]
    assert smooth.metadata["smoothing"] == 0.5 and "smoothing" not in plain.metadata
    q, k = (smooth.layers[f"{BLOCK}.attn1.to_{x}"] for x in "qk")
    assert q.smoothing == k.smoothing and q.act_range == k.act_range
    # what no fold reaches is as it was
    untouched = [n for n in plain.layers if smooth.layers[n].smoothing is None]
    assert "conv_in" in untouched
    assert all(smooth.layers[n].act_range == plain.layers[n].act_range for n in untouched)


def test_a_fold_that_does_not_hold_is_refused():
    pipe = unbalanced()
    wrong = Fold(f"{BLOCK}.norm2", (f"{BLOCK}.ff.net.0.proj",))
    with pytest.raises(QuantizationError, match="smoothing or rotation changed the output"):
        smooth_(pipe, PROMPTS, folds=[wrong])
    assert same_weights(pipe)
    for strength in (2, float("nan")):
        with pytest.raises(CalibrationError, match="smoothing is"):
            calibrate(pipe, PROMPTS, smoothing=strength)
    attention = pipe.transformer.get_submodule(f"{BLOCK}.attn1")
    with pytest.raises(CalibrationError, match="did not call UNet2DConditionModel itself"):
        calibrate(pipe.transformer, run=lambda: attention(torch.ones(1, 4, 16)), smoothing=0.5)
    assert same_weights(pipe)


@pytest.mark.parametrize("name", ZOO)
def test_other_models_are_left_as_they_compute(name):
    pipe = ToyPipeline(ZOO[name], text)
    before = output(pipe)
    smooth_(pipe, PROMPTS)
    assert torch.allclose(output(pipe), before, rtol=1e-4, atol=1e-5)
