"""The unconditional DDPM: its data, its training's promises, what the shipped weights can do, and plans on it."""

import copy
import random
from typing import Any, cast

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import nn

from examples.ddpm.data import PIXELS, draw_spec, framed, pictures
from examples.ddpm.models import make_scheduler, make_unet
from examples.ddpm.step_errors import output_errors, record, step_sensitivities
from examples.ddpm.subject import PIPELINE, Prompted, draw, features, likeness, load_pipeline, load_scorer
from examples.ddpm.train import save, train_unet, velocity_error
from examples.shapes.labels import labels
from examples.shapes.training import Recipe, generators
from mixdq_ao import (
    LayerSensitivity,
    Plan,
    Sampling,
    TemporalPlan,
    calibrate,
    mixdq_config,
    orthogonality,
    prepare,
    quantize_,
)
from mixdq_ao.layers import find_layers, split_points
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.quantize.quantizer import quantize_weight
from mixdq_ao.quantize.tensor import is_quantized
from mixdq_ao.search.metrics import frechet_distance, psnr
from mixdq_ao.temporal.step_probe import over_the_run

shipped = pytest.mark.skipif(not (PIPELINE / "model_index.json").exists(), reason="no trained weights here")
STEPS = 10


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def reference(pipe):
    return draw(pipe, range(16), steps=STEPS)


@pytest.fixture(scope="module")
def calibration(pipe):
    return calibrate(pipe.unet, run=lambda: draw(pipe, range(100, 116), steps=STEPS))


def quantized(pipe, plan):
    clone = copy.deepcopy(pipe)
    quantize_(clone.unet, mixdq_config(plan))
    return clone


def test_pictures_are_seeded_small_and_read_right_by_the_scorer():
    images = pictures(64, random.Random(3))
    assert images.shape == (64, 3, PIXELS, PIXELS) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, pictures(64, random.Random(3)), rtol=0, atol=0)
    rng = random.Random(3)
    specs = [_spec_and_skip(rng) for _ in range(64)]
    scorer = load_scorer()
    assert scorer.agreement(framed(images), specs).all >= 0.98
    assert likeness(images).mean() > 27 and likeness(images).min() > 20
    assert likeness(images.roll(4, 3)).mean() < 16  # the right colours in the wrong place
    assert likeness(images.mean((2, 3), keepdim=True).expand_as(images)).mean() < 18  # no shape
    assert labels(specs)["shape"].shape == (64, 5)


def _spec_and_skip(rng):
    spec = draw_spec(rng)
    for _ in range(2):
        rng.random()  # the jitter that drawing takes
    return spec


def test_the_unet_has_attention_and_concatenated_shortcuts():
    unet = make_unet()
    assert len(find_layers(unet)) == 77
    assert sum(name.endswith("to_q") for name in find_layers(unet)) == 7
    splits = split_points(unet)
    assert len(splits) == 6
    for name, channels in splits.items():
        assert 0 < channels < cast(Any, unet.get_submodule(name)).in_channels


def test_velocity_error_of_an_exact_prediction_is_nothing():
    """A network that answers with the true velocity has no error: noising, velocity and range fit together."""
    scheduler = make_scheduler()
    images = pictures(4, random.Random(0))
    noise = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    grains = torch.randn(images.shape, generator=(again := noise()))
    t = torch.randint(1000, (4,), generator=again)
    alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    truth = alpha.sqrt() * grains - (1 - alpha).sqrt() * (images * 2 - 1)
    answer = type("Answer", (), {"sample": truth})

    def oracle(x, steps):
        torch.testing.assert_close(x, alpha.sqrt() * (images * 2 - 1) + (1 - alpha).sqrt() * grains)
        assert torch.equal(steps, t)
        return answer

    assert velocity_error(cast(Any, oracle), scheduler, images, noise()) < 1e-12


def test_killed_training_continues_to_the_same_weights(tmp_path):
    recipe = Recipe(steps=2, batch=2, lr=1e-3, average=0.9, seed=9, warmup=2, save_every=1)

    def killed(step, steps, text):
        raise KeyboardInterrupt

    straight, _ = train_unet(tmp_path / "straight.pt", lambda *a: None, recipe)
    with pytest.raises(KeyboardInterrupt):
        train_unet(tmp_path / "killed.pt", killed, recipe)
    continued, _ = train_unet(tmp_path / "killed.pt", lambda *a: None, recipe)
    for name, value in straight.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name
    save(continued, tmp_path / "pipeline")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded.unet, UNet2DModel) and loaded.unet.dtype == torch.float32
    assert str(tmp_path) not in (tmp_path / "pipeline" / "unet" / "config.json").read_text()
    assert generators(recipe, 0)[0].random() != generators(recipe, 1)[0].random()


@shipped
def test_weights_are_small_and_nothing_is_pickled():
    files = [f for f in PIPELINE.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if f.suffix == ".safetensors") <= 3 * 2**20
    assert not [f for f in files if f.suffix not in (".safetensors", ".json")]


@shipped
def test_pictures_are_near_drawn_ones(reference):
    scorer, real = load_scorer(), pictures(256, random.Random(1))
    assert likeness(reference).mean() > 18.5
    near = frechet_distance(features(scorer, reference), features(scorer, real))
    far = frechet_distance(features(scorer, torch.rand_like(reference)), features(scorer, real))
    assert near < 0.7 * far  # so few pictures leave much of a distance in any case


@shipped
def test_a_picture_depends_on_its_seed_alone(pipe, reference):
    again = draw(pipe, [5, 2], steps=STEPS, batch=1)
    torch.testing.assert_close(again, reference[[5, 2]], rtol=0, atol=1e-3)
    assert (reference[5] - reference[2]).abs().max() > 0.1


@shipped
def test_plans_quantize_an_unconditional_unet(pipe, reference, calibration):
    """No text and no BOS: 8 bits hardly change a picture, 4-bit weights more, a shortcut's halves have own ranges."""
    assert calibration.bos_embedding is None
    plan = Plan.uniform(pipe.unet, 8, 8).with_calibration(calibration)
    assert sum(layer.split is not None for layer in plan.layers.values()) == 6
    assert not any(layer.bos for layer in plan.layers.values())
    eight, four = quantized(pipe, plan), quantized(pipe, Plan.uniform(pipe.unet, 4, 8).with_calibration(calibration))
    assert all(is_quantized(m.weight) for m in eight.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    quality = [psnr(draw(p, range(16), steps=STEPS), reference).mean().item() for p in (eight, four)]
    assert quality[0] > 25 and quality[0] > quality[1] + 3


@shipped
def test_levels_follow_a_pipeline_without_prompts(pipe, reference, calibration):
    clone = copy.deepcopy(pipe)
    levels = {"16": None, "W4A8": Plan.uniform(pipe.unet, 4, 8).with_calibration(calibration)}
    plan = TemporalPlan(levels, ("W4A8",) * (STEPS // 2) + ("16",) * (STEPS - STEPS // 2))
    runtime = prepare(clone.unet, plan, storage="own", keep_full=True)
    runtime.follow(clone)
    few = range(8)
    mixed = draw(clone, few, steps=STEPS)
    runtime.plan = plan.with_steps(("16",) * STEPS)
    torch.testing.assert_close(draw(clone, few, steps=STEPS), reference[:8], rtol=0, atol=1e-3)
    coarse = draw(quantized(pipe, levels["W4A8"]), few, steps=STEPS)
    runtime.plan = plan.with_steps(("W4A8",) * STEPS)
    assert psnr(draw(clone, few, steps=STEPS), coarse).mean() > 40  # the same codes in another storage
    assert psnr(mixed, reference[:8]).mean() > psnr(coarse, reference[:8]).mean()


@shipped
def test_step_errors_are_those_of_one_rounded_layer_and_leave_the_model_as_it_was(pipe, calibration):
    calls = record(pipe.unet, lambda: draw(pipe, range(4), steps=3))
    assert calls.timesteps.tolist() == [999, 666, 332] and calls.inputs.shape == (3, 4, 3, PIXELS, PIXELS)
    assert calls.again(pipe.unet).max() < 1e-10
    names = ["mid_block.resnets.0.conv1", "mid_block.attentions.0.to_q"]
    found = output_errors(pipe.unet, calls, calibration, names)
    assert calls.again(pipe.unet).max() < 1e-10
    for name in names:
        assert list(found[name]["weight"]) == [2, 4, 8] and list(found[name]["act"]) == [4, 8]
        for table in found[name].values():
            falling = torch.stack(list(table.values()))
            assert (falling[1:] < falling[:-1]).all()
        rounded = copy.deepcopy(pipe.unet)
        layer = rounded.get_submodule(name)
        layer.weight.data = quantize_weight(layer.weight.data, 4, symmetric=False).dequantize()
        torch.testing.assert_close(found[name]["weight"][4], calls.again(rounded), rtol=1e-3, atol=1e-12)


def test_errors_of_the_run_are_the_sum_over_steps():
    layer = LayerSensitivity(group="quality", weight_size=8, act_size=4)
    errors = {"a": {"weight": {4: torch.tensor([1.0, 3.0])}, "act": {8: torch.tensor([0.5, 0.25])}}}
    steps = step_sensitivities({"a": layer}, errors, {1: 2.0, 7: 10.0})
    assert steps[1].layers["a"].weight_errors == {4: 2.0} and steps[7].layers["a"].weight_errors == {4: 30.0}
    run = over_the_run(steps).layers["a"]
    assert run.weight_errors == {4: 32.0} and run.act_errors == {8: 3.5} and run.weight_size == 8


@shipped
def test_what_asks_for_prompts_draws_the_unconditional_pipeline(pipe, reference):
    prompts = [str(i) for i in range(16)]
    images = generate_all(Prompted(pipe), prompts, Sampling(steps=STEPS, batch_size=16))
    torch.testing.assert_close(images, reference, rtol=0, atol=1e-3)
    found = orthogonality(Prompted(pipe), prompts[:8], steps=3)
    assert len(found.layers) == 77 and len(set(found.importance().values())) > 20
