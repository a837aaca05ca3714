"""Errors of whole generations: the same with and without reuse, and less work with it."""

from __future__ import annotations

import pytest
import torch

from mixdq_ao import Plan, Sampling, ScheduleError, TemporalPlan, prepare
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.temporal.measure import GenerationError, draw_reference

SAMPLING = Sampling(steps=3, batch_size=1, seed=4)


@pytest.fixture
def measured(bundled):
    prompts = bundled.prompts[:2]
    plans = {f"W{b}A8": Plan.uniform(bundled.pipe.unet, b, 8).with_calibration(bundled.calibration) for b in (8, 2)}
    plan = TemporalPlan({"16": None, **plans}, ("16",) * 3)
    reference = draw_reference(bundled.pipe, prompts, SAMPLING, metric="mse")
    runtime = prepare(bundled.pipe.unet, plan, keep_full=True)
    return GenerationError(bundled.pipe, runtime, prompts, SAMPLING, reference, metric="mse")


def test_prefixes_are_computed_once_and_change_nothing(measured):
    assert measured(("16", "16", "16")) == 0
    assert (measured.computed, measured.reused) == (6, 0)  # two batches of three steps
    coarse = measured(("16", "W2A8", "W8A8"))
    assert (measured.computed, measured.reused) == (10, 2)
    late = measured(("16", "W2A8", "16"))
    assert (measured.computed, measured.reused) == (12, 6)
    assert 0 < measured(("W8A8",) * 3) < late < coarse * 2
    measured.runtime.plan = measured.runtime.plan.with_steps(("16", "W2A8", "W8A8"))
    plain = generate_all(measured.pipe, measured.prompts, SAMPLING, "latent")
    assert torch.equal(plain, measured.draw(("16", "W2A8", "W8A8")))
    assert "forward" not in measured.pipe.unet.__dict__


def test_without_room_everything_is_computed(measured):
    measured.budget = 0
    first, second = measured(("W2A8",) * 3), measured(("W2A8",) * 3)
    assert first == second and measured.reused == 0


def test_any_function_of_two_pictures_is_a_metric(bundled):
    prompts, sampling = bundled.prompts[:1], Sampling(steps=1, batch_size=1)

    def worst(images, reference):
        return (images - reference).abs().amax().item()

    reference = draw_reference(bundled.pipe, prompts, sampling, metric=worst)
    plan = TemporalPlan({"16": None, "W4A16": Plan.uniform(bundled.pipe.unet, 4, 16)}, ("16",))
    error = GenerationError(
        bundled.pipe, prepare(bundled.pipe.unet, plan, keep_full=True), prompts, sampling, reference, metric=worst
    )
    assert reference.shape == (1, 3, 64, 64) and error(("16",)) == 0 < error(("W4A16",)) <= 1
    assert error.draw(("W4A16",), "latent").shape[1] == 4 and error.computed == 2
    with pytest.raises(ScheduleError, match="metric is 'fid', expected ssim, mse"):
        draw_reference(bundled.pipe, prompts, sampling, metric="fid")  # type: ignore[arg-type]
