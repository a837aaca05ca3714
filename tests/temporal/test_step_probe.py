"""Errors per layer and step from probes: exact on a linear pipeline, step by step; resumed; refused where it must."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mixdq_ao import SensitivityError, allocate_steps, calibrate
from mixdq_ao.quantize.config import MixDQLayerConfig, fake_quantizer
from mixdq_ao.quantize.fake import with_fake_quantizer, without_fake_quantizer
from mixdq_ao.search.evaluation import Evaluation
from mixdq_ao.temporal.step_probe import over_the_run, probe_steps

from ..search.test_probe import PROMPTS, Toy

STEPS = 3


class Stepped(Toy):
    """A toy whose steps take different parts of its model's output off, so that their errors differ by far. With
    ``guided`` the model sees every sample twice, and its answers are extrapolated."""

    def __init__(self, guided: bool = False) -> None:
        super().__init__()
        self.guided = guided

    @torch.no_grad()
    def __call__(self, *, prompt: Any, num_inference_steps: int, generator: Any, output_type: str, **_: Any) -> Any:
        x = torch.stack([torch.randn(5, 6, generator=g) for g in generator])
        for step in range(num_inference_steps):
            y = self.unet(torch.cat([x, 1.1 * x]) if self.guided else x, timestep=step)[0]
            if self.guided:
                plain, other = y.chunk(2)
                y = plain + 2.0 * (other - plain)
            x = x - (0.1, 0.3, 1.0)[step] * y
        pictures = 0.5 + (x.mean(1) @ self.decoder).view(-1, 3, 4, 4) / 10
        return SimpleNamespace(images=x if output_type == "latent" else pictures)


class Twice(Toy):
    """Calls its model twice a step, as second-order schedulers do."""

    @torch.no_grad()
    def __call__(self, *args: Any, num_inference_steps: int, **options: Any) -> Any:
        return inspect.unwrap(Toy.__call__)(self, *args, num_inference_steps=2 * num_inference_steps, **options)


def draw(pipe: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(prompt=PROMPTS, num_inference_steps=STEPS, generator=generators, output_type="pt").images.double()


def exact(pipe: Any, calibration: Any, choice: Evaluation, step: int) -> float:
    """Relative error power of the pictures with one layer rounded at one step."""
    reference, layer = draw(pipe), pipe.unet.get_submodule(choice.name)
    assert isinstance(layer, nn.Linear)
    quantizer = fake_quantizer(MixDQLayerConfig(choice.layer(calibration), "fake", None, choice.name))
    quantizer.keep(layer.weight)
    forward = pipe.unet.forward

    def rounded(sample: torch.Tensor, timestep: int = 0) -> tuple[torch.Tensor]:
        if timestep != step:
            return forward(sample, timestep)
        with_fake_quantizer(layer, quantizer)
        try:
            return forward(sample, timestep)
        finally:
            without_fake_quantizer(layer)

    pipe.unet.forward = rounded  # type: ignore[method-assign]
    try:
        return float((draw(pipe) - reference).square().sum() / reference.square().sum())
    finally:
        del pipe.unet.forward


def test_exact_on_a_linear_pipeline():
    pipe, probes = Stepped(), 200
    calibration = calibrate(pipe, PROMPTS, steps=STEPS)
    options: dict[str, Any] = {"calibration": calibration, "weight_bits": (2, 4), "act_bits": (4,), "batch_size": 2}
    found = probe_steps(pipe, PROMPTS, steps=STEPS, probes=probes, **options)
    assert list(found) == [0, 1, 2]
    for step, sensitivity in found.items():
        assert list(sensitivity.layers) == ["first", "second", "third"]
        for name, layer in sensitivity.layers.items():
            for choice in (Evaluation(name, "weight", 2), Evaluation(name, "weight", 4), Evaluation(name, "act", 4)):
                estimate = layer.errors(choice.kind)[choice.bits]
                # p^2 of a sample has at most twice its squared mean as variance, and one sample may be all the error
                assert estimate == pytest.approx(exact(pipe, calibration, choice, step), rel=3.5 * (2 / probes) ** 0.5)
    assert found[2].layers["first"].weight_errors[4] > 10 * found[0].layers["first"].weight_errors[4]
    total = over_the_run(found)
    assert total.layers["third"].weight_errors[2] == sum(s.layers["third"].weight_errors[2] for s in found.values())


def test_a_stopped_run_continues(tmp_path, monkeypatch):
    pipe = Toy()
    calibration = calibrate(pipe, PROMPTS, steps=STEPS)
    options: dict[str, Any] = {"steps": STEPS, "calibration": calibration, "act_bits": (8,)}
    whole = probe_steps(pipe, PROMPTS, probes=6, **options)
    store = tmp_path / "probes.jsonl"
    probe_steps(pipe, PROMPTS, probes=4, store=store, **options)
    assert len(store.read_text().splitlines()) == 1 + 4
    again = probe_steps(pipe, PROMPTS, probes=6, store=store, **options)
    assert [s.layers for s in again.values()] == [s.layers for s in whole.values()]
    monkeypatch.setattr("mixdq_ao.temporal.step_probe.BatchProbe", None)
    known = probe_steps(pipe, PROMPTS, probes=6, store=store, **options)  # nothing is probed any more
    assert [s.layers for s in known.values()] == [s.layers for s in whole.values()]


def test_what_cannot_be_told_apart_is_refused():
    pipe = Twice()
    with pytest.raises(SensitivityError, match="run of 3 steps calls the denoiser 6 times, expected once a step"):
        probe_steps(pipe, PROMPTS, steps=3, calibration=calibrate(pipe, PROMPTS, steps=3))
    with pytest.raises(SensitivityError, match="probes is 0, expected a whole number of at least 1"):
        probe_steps(pipe, PROMPTS, steps=3, probes=0)


def test_guidance_rows_of_a_sample_count_together():
    pipe, probes = Stepped(guided=True), 200
    calibration = calibrate(pipe, PROMPTS, steps=STEPS)
    found = probe_steps(pipe, PROMPTS, steps=STEPS, probes=probes, calibration=calibration, act_bits=())
    choice = Evaluation("second", "weight", 4)
    for step, sensitivity in found.items():
        expected = exact(pipe, calibration, choice, step)
        assert sensitivity.layers["second"].weight_errors[4] == pytest.approx(expected, rel=3.5 * (2 / probes) ** 0.5)


def test_plans_of_the_bundled_pipeline(bundled):
    """Two steps of the real thing: the last one costs more, and gets more bits."""
    options: dict[str, Any] = {"calibration": bundled.calibration, "weight_bits": (4, 8), "act_bits": ()}
    found = probe_steps(bundled.pipe, bundled.prompts[:2], steps=2, probes=2, **options)
    first, last = (sum(v.weight_errors[4] for v in found[s].layers.values()) for s in (0, 1))
    assert last > first > 0
    plan = allocate_steps(found, steps=2, weight_bits=6)
    bits = [plan.metadata["level_bits"][name][0] for name in plan.steps]
    assert bits[1] > 6 > bits[0]
