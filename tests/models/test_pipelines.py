"""The quantized bundled pipeline in other uses: image-to-image, inpainting, ControlNet, IP-Adapter, own embeddings."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)

from mixdq_ao import (
    MixDQError,
    Plan,
    Sampling,
    analyze,
    bos_aware,
    calibrate,
    input_moments,
    mixdq_config,
    orthogonality,
    probe_steps,
    quantize_,
)
from mixdq_ao.layers import find_layers
from mixdq_ao.models.pipelines import generate, other_denoisers
from mixdq_ao.quantize.tensor import is_quantized
from mixdq_ao.search.metrics import psnr


def both(bundled, use: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of ``use(pipe)`` in full precision and at W8A8 with BOS rows."""
    exact = use(bundled.pipe)
    pipe = copy.copy(bundled.pipe)
    object.__setattr__(pipe, "unet", copy.deepcopy(bundled.pipe.unet))
    calibrated = [n for n in find_layers(pipe.unet) if n in bundled.calibration.layers]
    plan = Plan.uniform(pipe.unet, 8, 8)
    plan = Plan({n: plan.layers[n] for n in calibrated}).with_calibration(bundled.calibration)
    quantize_(pipe.unet, mixdq_config(plan))
    bos_aware(pipe)
    assert sum(is_quantized(m.weight) for m in find_layers(pipe.unet).values()) == len(calibrated) > 100
    return exact, use(pipe)


def same_pictures(bundled, use: Callable, least: float = 35) -> None:
    exact, pictures = both(bundled, use)
    assert exact.shape == pictures.shape and not torch.equal(exact, pictures)
    assert psnr(pictures, exact).min() > least, psnr(pictures, exact)


def draw(pipe, bundled, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = {} if "prompt_embeds" in options else {"prompt": bundled.prompts[:1]}
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, **prompts, **options}
    return pipe(generator=generator, output_type="pt", **options).images.float()


@pytest.fixture(scope="module")
def picture(_bundled):
    return draw(_bundled.pipe, _bundled)


def test_from_a_picture(bundled, picture):
    same_pictures(
        bundled,
        lambda pipe: draw(
            StableDiffusionXLImg2ImgPipeline(**_parts(pipe)),
            bundled,
            image=picture,
            strength=0.5,
            num_inference_steps=2,
        ),
    )


def test_inpainting(bundled, picture):
    mask = torch.zeros(1, 1, *picture.shape[-2:])
    mask[..., : picture.shape[-1] // 2] = 1
    size = {"height": picture.shape[-2], "width": picture.shape[-1]}
    same_pictures(
        bundled,
        lambda pipe: draw(
            StableDiffusionXLInpaintPipeline(**_parts(pipe)), bundled,
            image=picture, mask_image=mask, strength=0.99, num_inference_steps=2, **size,
        ),
    )  # fmt: skip


def test_controlnet(bundled, picture):
    """A ControlNet of random numbers, quantized to 8-bit weights too."""
    torch.manual_seed(2)
    channels = (8, 16, 16)  # halves twice, as the VAE does
    net = ControlNetModel.from_unet(bundled.pipe.unet, conditioning_embedding_out_channels=channels).eval()
    with torch.no_grad():  # they begin at zero
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            block.weight.normal_(std=0.2)
    small = copy.deepcopy(net)
    quantize_(small, mixdq_config(Plan.uniform(small, 8, 16)))

    def use(pipe):
        control = net if pipe is bundled.pipe else small
        pipe = StableDiffusionXLControlNetPipeline(**_parts(pipe), controlnet=control)
        return draw(pipe, bundled, image=picture, controlnet_conditioning_scale=1.0)

    plain = draw(bundled.pipe, bundled)
    assert psnr(use(bundled.pipe), plain).min() < 50  # it does something
    same_pictures(bundled, use, least=25)


def test_ip_adapter(bundled):
    """An adapter of random numbers: its own projections stay as they are, the text's keep their BOS rows."""
    width, text = 10, bundled.pipe.unet.config.cross_attention_dim
    torch.manual_seed(3)
    layers = dict(bundled.pipe.unet.named_modules())
    attentions = [n for n in bundled.pipe.unet.attn_processors if "attn2" in n]
    weights = {}
    for i, name in enumerate(attentions):
        rows = layers[name.removesuffix(".processor")].to_k.weight.shape[0]
        for kind in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{kind}.weight"] = 4 * torch.randn(rows, text) / text**0.5
    projection = {
        "proj.weight": torch.randn(4 * text, width) / width**0.5,
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    embeds = [torch.randn(1, 1, width)]

    def use(pipe):
        if pipe is bundled.pipe:
            pipe = copy.copy(pipe)
            object.__setattr__(pipe, "unet", copy.deepcopy(bundled.pipe.unet))
        pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
        return draw(pipe, bundled, ip_adapter_image_embeds=embeds)

    plain = draw(bundled.pipe, bundled)
    exact, pictures = both(bundled, use)
    assert psnr(exact, plain).min() < 45  # it does something
    assert psnr(pictures, exact).min() > 30


def test_embeddings_computed_outside(bundled):
    """Prompt weighting and long prompts: rows scaled one by one, and two chunks of 77 with a BOS row each."""
    with torch.no_grad():
        one, _, pooled, _ = bundled.pipe.encode_prompt(bundled.prompts[0], do_classifier_free_guidance=False)
        two = bundled.pipe.encode_prompt(bundled.prompts[1], do_classifier_free_guidance=False)[0]
    weighted = one.clone()
    weighted[:, 3:5] *= 1.2
    for embeds in (weighted, torch.cat([one, two], 1)):
        same_pictures(bundled, lambda pipe, e=embeds: draw(pipe, bundled, prompt_embeds=e, pooled_prompt_embeds=pooled))


def _parts(pipe) -> dict:
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    return {**{n: getattr(pipe, n) for n in names}, "add_watermarker": False}


def test_pipelines_that_take_pictures_are_named(bundled):
    pipe = StableDiffusionXLInpaintPipeline.from_pipe(bundled.pipe)
    with pytest.raises(MixDQError, match="InpaintPipeline takes image and mask_image besides prompts.*run=lambda"):
        calibrate(pipe, bundled.prompts[:1])


def test_a_second_denoiser_is_known(unet):
    assert other_denoisers(SimpleNamespace(unet=unet)) == ()
    assert other_denoisers(SimpleNamespace(transformer=unet, transformer_2=unet)) == ("transformer_2",)


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("guidance_scale", float("nan"), "a finite number"),
        ("guidance_scale", None, "a finite number"),
        ("steps", (1, 4), "a whole number of at least 1; only calibrate and input_moments take several"),
        ("steps", 2.5, "a whole number of at least 1"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("seed", None, "a whole number"),
        ("seed", 2**64, "a whole number from"),
        ("height", "512", "a whole number of at least 1"),
        ("frames", 0, "a whole number of at least 1"),
    ],
)
def test_a_field_that_is_out_of_range_is_named(field, value, expected):
    with pytest.raises(MixDQError, match=f"{field} is {re.escape(repr(value))}, expected {expected}"):
        Sampling(**{field: value})


def test_a_seed_that_runs_out_with_the_prompts_is_named(bundled):
    with pytest.raises(MixDQError, match=f"seed is {2**64}, expected .* also for the last prompt"):
        next(generate(bundled.pipe, ["a", "b"], Sampling(seed=2**64 - 1, batch_size=1)))


def test_every_measurement_draws_in_the_size_asked_for(bundled):
    """The bundled pipeline's default size is 64 x 64: latents of 16 x 16."""
    size, seen = {"height": 32, "width": 48}, set()
    pipe, texts = bundled.pipe, bundled.prompts[:2]

    def see(module, args, kwargs):
        seen.add(tuple((args[0] if args else kwargs["sample"]).shape[2:]))

    handle = pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
    try:
        for measure in (
            lambda: calibrate(pipe, texts, **size),
            lambda: input_moments(pipe, texts, calibration=bundled.calibration, layers=["conv_out"], **size),
            lambda: orthogonality(pipe, texts, **size),
            lambda: analyze(pipe, texts, method="probe", probes=1, **size),
            lambda: probe_steps(pipe, texts, steps=1, probes=1, **size),
        ):
            seen.clear()
            measure()
            assert seen == {(8, 12)}
    finally:
        handle.remove()
    metadata = calibrate(pipe, texts, **size).metadata
    assert (metadata["height"], metadata["width"]) == (32, 48)
