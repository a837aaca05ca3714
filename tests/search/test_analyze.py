"""Sensitivity analysis: replay changes nothing, values are what a direct run gives, kill -9 loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mixdq_ao import (
    LayerPlan,
    MixDQError,
    Plan,
    Sampling,
    SensitivityError,
    analyze,
    calibrate,
    mixdq_config,
    quantize_,
)
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.metrics import error_power, ssim
from mixdq_ao.search.trial import Trials

from . import analyze_program
from .test_distributed import Pipe

LAYERS = ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.2.resnets.1.conv_shortcut")


@pytest.fixture(scope="module")
def analyzed(_bundled):
    """Every layer of the bundled pipeline at 2 and 4 bits."""
    options = {"calibration": _bundled.calibration, "weight_bits": (2, 4), "act_bits": (), "batch_size": 2}
    return analyze(_bundled.pipe, _bundled.prompts[:2], **options)


@pytest.mark.parametrize("steps", [1, 2])
def test_replay_gives_what_a_full_run_gives(bundled, steps):
    sampling = Sampling(steps=steps, batch_size=2)
    embedding = torch.tensor(bundled.calibration.bos_embedding)
    trials = [Trials(bundled.pipe, bundled.prompts[:3], sampling, replay=replay) for replay in (True, False)]
    for name in LAYERS:
        layer = bundled.calibration.layers[name].plan(LayerPlan(weight_bits=4, act_bits=8), bos=True, split=True)
        fast, slow = (t.measure(name, layer, embedding, images=True) for t in trials)
        assert fast == slow, name
        assert fast["error"] > 0


def test_a_small_memory_budget_changes_speed_only(bundled):
    sampling = Sampling(batch_size=2)
    trials = [Trials(bundled.pipe, bundled.prompts[:2], sampling, budget=b) for b in (4 << 30, 1 << 20)]
    assert trials[1].batches[0].recorder.bytes <= 1 << 20
    results = [t.measure("conv_out", LayerPlan(weight_bits=4), None, images=False) for t in trials]
    assert results[0] == results[1]


def test_scores_are_what_quantizing_that_layer_alone_gives(bundled, analyzed):
    pipe, prompts = bundled.pipe, bundled.prompts[:2]
    outputs = []
    reference_images = generate_all(pipe, prompts, Sampling(batch_size=2))
    handle = pipe.unet.register_forward_hook(lambda m, a, o: outputs.append(o[0]))
    generate_all(pipe, prompts, Sampling(batch_size=2), "latent")
    for name in LAYERS[:2]:
        plan = Plan({name: LayerPlan(weight_bits=4)}).with_calibration(bundled.calibration)
        original = pipe.unet.get_submodule(name).weight
        quantize_(pipe.unet, mixdq_config(plan))
        images = generate_all(pipe, prompts, Sampling(batch_size=2))
        pipe.unet.get_submodule(name).weight = original
        layer = analyzed.layers[name]
        assert layer.weight_errors[4] == pytest.approx(error_power(outputs[0], outputs[-1]), rel=1e-2)
        if layer.group == "content":
            assert layer.weight_scores[4] == pytest.approx(ssim(images, reference_images).mean().item(), abs=1e-6)
        else:
            assert layer.weight_scores[4] == pytest.approx(
                -10 * torch.tensor(layer.weight_errors[4]).log10().item(), abs=1e-3
            )
    handle.remove()


def test_more_bits_hurt_less(analyzed):
    assert len(analyzed.layers) == 175
    better = [v.weight_errors[2] > v.weight_errors[4] for v in analyzed.layers.values()]
    assert sum(better) > 0.97 * len(better)
    assert {v.group for v in analyzed.layers.values()} == {"content", "quality"}


def run_program(store: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, analyze_program.__file__, str(store), str(out)], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )


def test_kill_nine_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path):
    """The store grows, the process is killed, a second run continues; the result is the one of an undisturbed run."""
    store = tmp_path / "s.jsonl"
    process = run_program(store, tmp_path / "never.json")
    deadline = time.time() + 120
    while time.time() < deadline and (not store.exists() or store.read_bytes().count(b"\n") < 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [json.loads(line)["key"] for line in store.read_bytes().splitlines()[1:] if line.endswith(b"}")]
    assert 1 <= len(done) and not (tmp_path / "never.json").exists()
    assert run_program(store, tmp_path / "resumed.json").wait() == 0
    keys = [json.loads(line)["key"] for line in store.read_text().splitlines()[1:]]
    assert keys[: len(done)] == done and len(set(keys)) == len(keys)
    analyze_program.run(tmp_path / "fresh.jsonl", tmp_path / "fresh.json")
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "fresh.json").read_text()


def test_a_store_of_other_prompts(bundled, tmp_path):
    options = {"calibration": bundled.calibration, "weight_bits": (), "act_bits": (), "batch_size": 2}
    analyze(bundled.pipe, bundled.prompts[:2], store=tmp_path / "s", **options)
    with pytest.raises(SensitivityError, match="other prompts"):
        analyze(bundled.pipe, bundled.prompts[1:3], store=tmp_path / "s", **options)


def test_a_store_of_another_rule(tmp_path):
    """Pictures are judged only where the rule says content: what was stored without cannot be continued with."""
    pipe, options = Pipe(), {"store": tmp_path / "s", "weight_bits": (4,), "act_bits": ()}
    analyze(pipe, ["a", "b"], rule=lambda name: "quality", **options)
    with pytest.raises(SensitivityError, match="other settings"):
        analyze(pipe, ["a", "b"], rule=lambda name: "content", **options)


@pytest.mark.parametrize("options", [{"method": "one_at_a_time"}, {"method": "probe", "probes": 1}])
def test_a_layer_that_was_not_calibrated(options, tmp_path):
    """Of those that are called, all have to be; what is never called is left out."""
    pipe, prompts = Pipe(), ["a", "b"]
    pipe.unet.spare = nn.Linear(3, 3)
    calibration, layers = calibrate(pipe, prompts), ["conv", "linear"]
    shared = {"weight_bits": (4,), "act_bits": (), "store": tmp_path / "store", "rule": lambda name: "quality"}
    less = replace(calibration, layers={"conv": calibration.layers["conv"]})
    with pytest.raises(SensitivityError, match="layer 'linear': is called and not in the calibration"):
        analyze(pipe, prompts, calibration=less, **shared, **options)
    assert (tmp_path / "store").read_bytes().count(b"\n") == 1
    (tmp_path / "store").unlink()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    assert list(analyze(pipe, prompts, calibration=calibration, **shared, **options).layers) == layers


@pytest.mark.parametrize("options", [{"method": "one_at_a_time"}, {"method": "probe", "probes": 1}])
def test_a_model_that_gives_zero_has_no_relative_error(options):
    pipe = Pipe()
    for parameter in pipe.unet.linear.parameters():
        parameter.data.zero_()
    with pytest.raises(SensitivityError, match="output has power 0.0, expected finite and above 0"):
        analyze(pipe, ["a", "b"], weight_bits=(4,), act_bits=(), rule=lambda name: "quality", **options)


def test_a_batch_of_zeros_counts_like_any_other():
    """Errors are relative to the power of all batches together."""
    trials = Trials(Pipe(), ["a", "b"], Sampling(batch_size=1))
    whole = trials.measure("linear", LayerPlan(weight_bits=4), None, images=False)["error"]
    trials.batches[1].reference.denoised.zero_()
    assert whole < trials.measure("linear", LayerPlan(weight_bits=4), None, images=False)["error"] < float("inf")


def test_bad_input(bundled):
    with pytest.raises(MixDQError, match="prompts is empty"):
        analyze(bundled.pipe, [])
    with pytest.raises(MixDQError, match="method is 'guess'"):
        analyze(bundled.pipe, bundled.prompts, method="guess")  # type: ignore[arg-type]
    with pytest.raises(MixDQError, match="probes is 1, but method is 'one_at_a_time'"):
        analyze(bundled.pipe, bundled.prompts, probes=1)
