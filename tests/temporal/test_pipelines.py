"""Real diffusers pipelines, called as ever: every step at its level, whatever the scheduler, guidance and start."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.models.attention_processor import Attention
from diffusers.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from mixdq_ao import Plan, QuantizationError, ScheduleError, TemporalPlan, prepare

STEPS = ("W4", "W8", "16", "W4", "W8", "16")


class Seen:
    """The bundled pipeline, prepared and followed; notes level and batch of each call of the UNet."""

    def __init__(self, pipe) -> None:
        plans = {f"W{bits}": Plan.uniform(pipe.unet, bits, 16) for bits in (8, 4)}
        self.pipe, self.calls = pipe, []
        self.runtime = prepare(pipe.unet, TemporalPlan({"16": None, **plans}, STEPS))
        pipe.unet.conv_in.register_forward_hook(lambda m, x, y: self.calls.append((self.runtime.level, len(x[0]))))
        self.runtime.follow(pipe)

    def draw(self, pipe=None, **options) -> list[tuple[str, int]]:
        self.calls.clear()
        options = {"num_inference_steps": 6, "guidance_scale": 0.0, "output_type": "latent", **options}
        (pipe or self.pipe)("a large red circle", generator=torch.Generator().manual_seed(1), **options)
        return list(self.calls)


@pytest.fixture
def seen(bundled) -> Seen:
    return Seen(bundled.pipe)


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        LCMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_every_step_runs_at_its_level_with_any_scheduler(seen, kind):
    seen.pipe.scheduler = kind.from_config(seen.pipe.scheduler.config)
    assert seen.draw() == [(name, 1) for name in STEPS]


def test_both_halves_of_guidance_run_at_one_level(seen):
    """The pipeline puts them into one batch; two calls in a row are tested with the runtime."""
    assert seen.draw(guidance_scale=3.0) == [(name, 2) for name in STEPS]


def test_calls_of_a_second_order_scheduler_at_one_timestep_share_a_level(seen):
    """Heun calls the model at the first timestep once and at every other twice: to correct a step, and to begin one."""
    seen.pipe.scheduler = HeunDiscreteScheduler.from_config(seen.pipe.scheduler.config)
    assert [name for name, _ in seen.draw()] == [STEPS[0], *(name for name in STEPS[1:] for _ in range(2))]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(("strength", "left"), [(0.5, 3), (0.34, 2), (1.0, 6)])
def test_image_to_image_has_the_end_of_the_schedule(seen, kind, strength, left):
    """strength shortens the run; what is left are the last steps."""
    pipe = StableDiffusionXLImg2ImgPipeline(**seen.pipe.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    seen.runtime.follow(pipe)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert [name for name, _ in seen.draw(pipe, image=image, strength=strength)] == list(STEPS[6 - left :])


def test_another_number_of_steps_stops_the_pipeline_with_a_named_error(seen):
    with pytest.raises(ScheduleError, match="the schedule is for 6 steps, the scheduler runs 4"):
        seen.draw(num_inference_steps=4)
    assert seen.calls == []
    seen.runtime.follow(seen.pipe, resample=True)
    with pytest.warns(UserWarning, match="resampled to 4"):
        assert len(seen.draw(num_inference_steps=4)) == 4


def test_a_copy_draws_the_same_and_leaves_the_original_alone(bundled):
    options = {"num_inference_steps": 3, "guidance_scale": 0.0, "output_type": "latent"}

    def draw(pipe) -> torch.Tensor:
        return pipe("a large red circle", generator=torch.Generator().manual_seed(1), **options).images

    plan = TemporalPlan({f"W{bits}": Plan.uniform(bundled.pipe.unet, bits, 16) for bits in (8, 4)}, ("W4", "W8", "W8"))
    runtime = prepare(bundled.pipe.unet, plan, storage="own")
    runtime.follow(bundled.pipe)
    expected, runtime.level = draw(bundled.pipe), "W4"
    clone = copy.deepcopy(bundled.pipe)
    assert torch.equal(draw(clone), expected) and runtime.level == "W4"
    pickle.dumps(clone.unet)  # text encoders that have run cannot be stored


def test_projections_are_not_fused_at_one_level(seen):
    """diffusers would copy the weights of the present level, and run those at every level."""
    unet, names = seen.pipe.unet, [name for name, _ in seen.pipe.unet.named_modules()]
    attention = next(module for module in unet.modules() if isinstance(module, Attention))
    compiled = torch.compile(unet, backend="eager")
    for owner in (seen.pipe, unet, compiled, copy.deepcopy(unet)):
        with pytest.raises(QuantizationError, match="prepared for a precision per step.*leave them apart"):
            owner.fuse_qkv_projections()
    with pytest.raises(QuantizationError, match="leave them apart"):
        attention.fuse_projections()
    assert [name for name, _ in unet.named_modules()] == names
    assert attention.to_q.weight.data.dtype == torch.float32
    assert seen.draw() == [(name, 1) for name in STEPS]
