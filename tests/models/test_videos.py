"""Pipelines that draw videos: a small WanPipeline with random weights, through generate, calibrate, analyze."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from mixdq_ao import MixDQError, Plan, Sampling, analyze, calibrate, mixdq_config, quantize_
from mixdq_ao.models.pipelines import each_frame, generate_all
from mixdq_ao.search.metrics import ssim

PROMPTS = ["a red circle", "a blue square"]
SAMPLING = Sampling(steps=2, height=16, width=16, frames=5, batch_size=2)


class Small(WanPipeline):
    """Its default is videos of 5 frames of 16 x 16 pixels."""

    @torch.no_grad()
    def __call__(self, **options: Any) -> Any:
        size = {"height": 16, "width": 16, "num_frames": 5}
        return inspect.unwrap(WanPipeline.__call__)(self, **(size | options))


def tokenizer() -> Any:
    words = ["<pad>", "<unk>", *sorted({w for p in PROMPTS for w in p.split()})]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=16, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        temperal_downsample=[False, True, True],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    pipe = Small(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_frames_and_latents(pipe):
    """A video of 5 frames is 2 latent ones; a prompt's video does not depend on the batch it is in."""
    videos = generate_all(pipe, PROMPTS, SAMPLING)
    assert videos.shape == (2, 5, 3, 16, 16) and 0 <= videos.min() < videos.max() <= 1
    assert generate_all(pipe, PROMPTS, SAMPLING, "latent").shape == (2, 4, 2, 2, 2)
    second = Sampling(steps=2, height=16, width=16, frames=5, batch_size=1, seed=1)
    alone = generate_all(pipe, PROMPTS[1:], second)
    torch.testing.assert_close(alone, videos[1:], atol=1e-4, rtol=0)


def test_a_quantized_video(pipe):
    exact = generate_all(pipe, PROMPTS, SAMPLING)
    drawn = []
    model = pipe.transformer
    calibration = calibrate(model, run=lambda: drawn.append(generate_all(pipe, PROMPTS, SAMPLING)))
    assert torch.equal(drawn[0], exact)
    likeness = {}
    for bits in (8, 2):
        rough = copy.deepcopy(model)
        quantize_(rough, mixdq_config(Plan.uniform(rough, bits, 8).with_calibration(calibration)))
        pipe.transformer = rough
        video = generate_all(pipe, PROMPTS, SAMPLING)
        likeness[bits] = ssim(each_frame(video), each_frame(exact)).mean().item()
    pipe.transformer = model
    assert 1 > likeness[8] > likeness[2] and likeness[8] > 0.99


@pytest.mark.parametrize("method", ["one_at_a_time", "probe"])
def test_analyzing_videos(pipe, method):
    """Frames are judged one by one: a video's SSIM is their mean."""
    calibration = calibrate(pipe, PROMPTS, batch_size=2)
    options = {"weight_bits": (2, 8), "act_bits": (), "batch_size": 2} | ({"probes": 1} if method == "probe" else {})
    found = analyze(pipe, PROMPTS, calibration=calibration, method=method, **options)
    layer = found.layers["blocks.0.ffn.net.0.proj"]
    assert layer.group == "content" and layer.weight_scores[8] > layer.weight_scores[2]
    assert method == "probe" or 0 < layer.weight_scores[2] < layer.weight_scores[8] < 1 + 1e-9


def test_a_pipeline_that_draws_nothing_known():
    with pytest.raises(MixDQError, match="expected images or frames"):
        generate_all(lambda **_: SimpleNamespace(audios=torch.zeros(1)), ["x"], Sampling())
