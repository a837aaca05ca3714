"""Smoothing: full precision stays the same to the bit, channels come nearer to one size, wrong folds are taken back."""

from __future__ import annotations

import pytest
import torch

from mixdq_ao import QuantizationError, Sampling
from mixdq_ao.search.smoothing import Fold, apply_, find_folds, smooth_
from mixdq_ao.search.trial import run
from tests.search.zoo import ZOO, ToyPipeline

PROMPTS = ["0", "1", "2"]


def text(i: int) -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(i))


def unbalanced() -> ToyPipeline:
    """SD 1.5's layout with one channel far larger than others after a norm and after a GEGLU."""
    pipe = ToyPipeline(ZOO["SD 1.5"], text)
    block = pipe.transformer.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    with torch.no_grad():
        block.norm3.weight[3] *= 50
        block.ff.net[0].proj.weight[5] *= 50
    return pipe


def output(pipe: ToyPipeline) -> torch.Tensor:
    return run(pipe, PROMPTS, Sampling(), images=False).denoised


def test_every_place_of_a_block_is_found():
    folds = find_folds(ZOO["SD 1.5"].build())
    block = "mid_block.attentions.0.transformer_blocks.0"
    mine = {f.source.removeprefix(block + "."): f for f in folds if f.source.startswith(block)}
    assert set(mine) == {"norm1", "norm2", "norm3", "attn1.to_v", "attn2.to_v", "ff.net.0.proj"}
    assert mine["norm1"].readers == tuple(f"{block}.attn1.to_{x}" for x in "qkv")
    assert mine["ff.net.0.proj"].rows == 4 * 16
    assert not any("add_v_proj" in f.source or f.source.endswith("attn.to_v") for f in find_folds(ZOO["SD3"].build()))


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
            scales = smooth_(pipe, PROMPTS)
    assert torch.equal(output(pipe), before)
    worst = [n for n in spread["before"] if spread["before"][n] > 20]
    assert worst and all(spread["after"][n] < 0.5 * spread["before"][n] for n in worst)
    assert all(torch.equal(s.log2(), s.log2().round()) and s.max() <= 16 for s in scales.values())
    for fold, scale in scales.items():
        apply_(pipe.transformer, fold, 1 / scale)
    fresh = unbalanced().transformer.state_dict()
    assert all(torch.equal(p, fresh[n]) for n, p in pipe.transformer.state_dict().items())


def test_a_fold_that_does_not_hold_is_taken_back():
    pipe = unbalanced()
    block = "mid_block.attentions.0.transformer_blocks.0"
    wrong = Fold(f"{block}.norm2", (f"{block}.ff.net.0.proj",))
    with pytest.raises(QuantizationError, match="smoothing changed the output"):
        smooth_(pipe, PROMPTS, folds=[wrong])
    fresh = unbalanced().transformer.state_dict()
    assert all(torch.equal(p, fresh[n]) for n, p in pipe.transformer.state_dict().items())
    with pytest.raises(QuantizationError, match="strength is 2"):
        smooth_(pipe, PROMPTS, strength=2)


@pytest.mark.parametrize("name", ZOO)
def test_other_models_are_left_as_they_compute(name):
    pipe = ToyPipeline(ZOO[name], text)
    before = output(pipe)
    smooth_(pipe, PROMPTS)
    assert torch.allclose(output(pipe), before, rtol=1e-4, atol=1e-5)
