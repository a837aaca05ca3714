"""BOS-aware text encoders: pictures as in full precision; other encoders than the calibrated one are refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from transformers import T5Config, T5EncoderModel

from mixdq_ao import BOSAwareTextEncoder, Plan, TextEncoderError, bos_aware, mixdq_config, quantize_
from mixdq_ao.models.bos_encoder import _rows


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


def test_it_is_pickled_and_copied(bundled, shapes):
    """Before its first call, in which transformers adds hooks that cannot be pickled to any encoder."""
    quantized, pipe = quantized_pipe(bundled), shapes.load_pipeline()
    object.__setattr__(pipe, "unet", quantized.unet)
    encoder, ids = bos_aware(pipe).text_encoder, torch.tensor([[0, 5, 1]])
    others = pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder)
    for other in others:
        assert type(other) is type(encoder) and torch.equal(other.bos_row, encoder.bos_row)
        assert torch.equal(other(ids).last_hidden_state, encoder(ids).last_hidden_state)


CPU = torch.device("cpu")
OFFLOADS = {
    "sequential": lambda encoder: cpu_offload(encoder, CPU),
    "model": lambda encoder: cpu_offload_with_hook(encoder, CPU),
    "group": lambda encoder: apply_group_offloading(encoder, CPU, CPU, "block_level", num_blocks_per_group=1),
    "compiled": lambda encoder: torch.compile(encoder, backend="eager"),
}


@torch.no_grad()
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
@pytest.mark.parametrize("first", [True, False], ids=["checked first", "offloaded first"])
def test_an_encoder_that_is_elsewhere_until_it_is_called(bundled, offload, first):
    """Or another wrapper around it: the check sees every output."""
    pipe = bundled.pipe
    quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, 8, 8).with_calibration(bundled.calibration)))
    ids = pipe.tokenizer("a red circle", return_tensors="pt").input_ids
    expected = copy.deepcopy(pipe.text_encoder)(ids, output_hidden_states=True).hidden_states[-2]
    if first:
        bos_aware(pipe)
    for name in ("text_encoder", "text_encoder_2"):
        wrapped = offload(getattr(pipe, name))
        if isinstance(wrapped, torch.nn.Module):
            object.__setattr__(pipe, name, wrapped)
    for _ in range(2):
        states = bos_aware(pipe).text_encoder(ids, output_hidden_states=True).hidden_states
        assert torch.equal(states[-2], expected)
        with pytest.raises(TextEncoderError, match="clip_skip"):
            states[-1]


def test_a_denoiser_that_is_elsewhere_until_it_is_called(bundled):
    pipe = bundled.pipe
    quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, 8, 8).with_calibration(bundled.calibration)))
    cpu_offload(pipe.unet, CPU)
    with pytest.raises(TextEncoderError, match="is offloaded.* first, offload then"):
        bos_aware(pipe)


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


def test_encoders_side_by_side_padded_to_the_width_of_a_later_one():
    """SD3: [CLIP | CLIP | zeros], and T5's rows after these."""
    embedding = torch.cat([torch.ones(3), torch.full((2,), 2.0), torch.zeros(4)])
    rows = _rows({"text_encoder": 3, "text_encoder_2": 2, "text_encoder_3": 9}, embedding)
    assert {n: row.tolist() for n, row in rows.items()} == {"text_encoder": [1, 1, 1], "text_encoder_2": [2, 2]}
    alone = _rows({"text_encoder": 3, "text_encoder_2": 6}, torch.ones(9))
    assert [len(row) for row in alone.values()] == [3, 6]
    for widths in ({"text_encoder": 3}, {"text_encoder": 12}, {}):  # three hidden states in a row; another encoder
        with pytest.raises(TextEncoderError, match="do not make up the 9 of the BOS embedding"):
            _rows(widths, torch.ones(9))


@pytest.mark.parametrize("token", ["bos_token_id", "eos_token_id"])
def test_an_encoder_without_a_first_token(bundled, token):
    pipe = bundled.pipe
    quantize_(pipe.unet, mixdq_config(Plan.uniform(pipe.unet, 8, 8).with_calibration(bundled.calibration)))
    encoder = copy.deepcopy(pipe.text_encoder)
    setattr(encoder.config, token, None)
    with pytest.raises(TextEncoderError, match="an encoder .* has no token that begins every text"):
        BOSAwareTextEncoder.wrap(encoder, torch.ones(encoder.config.hidden_size), None, "an encoder")


def test_t5_has_no_first_token():
    encoder = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=10))
    with pytest.raises(TextEncoderError, match="has no token that begins every text"):
        BOSAwareTextEncoder.wrap(encoder, torch.ones(8))


def test_without_a_quantized_unet(bundled):
    with pytest.raises(TextEncoderError, match="quantize it first"):
        bos_aware(bundled.pipe)
