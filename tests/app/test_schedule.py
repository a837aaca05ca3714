"""mixdq schedule: show and export of a file, a search end to end, and its errors in one line."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from PIL import Image

from mixdq_ao import LayerPlan, Plan, TemporalPlan
from mixdq_ao.app.inputs import load_pipeline
from mixdq_ao.app.quantized import make_scheduled
from mixdq_ao.models.pipelines import Sampling, generate
from mixdq_ao.temporal.results import ScheduleResults
from mixdq_ao.temporal.runtime import LevelRuntime
from tests.command import run

NATIVE = Plan({"conv_in": LayerPlan(weight_bits=8, act_bits=8, act_range=(-1.0, 1.0))})
COSTS = {"16": 1.0, "W8A8": 0.5}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "schedule.json"
    steps = ("16", "W8A8", "W8A8", "W8A8", "16", "16")
    TemporalPlan({"16": None, "W8A8": NATIVE}, steps, COSTS, {"error": 0.01, "metric": "ssim"}).save(path)
    return path


def test_show(capsys, saved):
    code, out, _ = run(capsys, "schedule", "show", saved)
    assert code == 0 and "0, 4-5" in out and "1-3" in out and "0.75" in out
    code, out, _ = run(capsys, "schedule", "show", saved, "--json")
    assert json.loads(out)["counts"] == {"16": 3, "W8A8": 3}


def test_export_alone_and_into_a_config(capsys, saved, tmp_path):
    assert run(capsys, "schedule", "export", saved, "--out", tmp_path / "p.json")[0] == 0
    policy = json.loads((tmp_path / "p.json").read_text())
    assert (policy["first_steps"]["count"], policy["last_steps"]["count"]) == (1, 2)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1, "quantization_config": {"b": 2}}))
    arguments = ("--config", tmp_path / "config.json", "--scope", "unet", "--out", tmp_path / "new.json")
    assert run(capsys, "schedule", "export", saved, *arguments)[0] == 0
    config = json.loads((tmp_path / "new.json").read_text())
    assert config["a"] == 1 and config["quantization_config"]["b"] == 2
    assert config["quantization_config"]["runtime"]["diffusion_step_policy"] == {**policy, "scope": ["unet"]}


def test_import_of_what_was_exported(capsys, saved, tmp_path):
    NATIVE.save(tmp_path / "plan.json")
    run(capsys, "schedule", "export", saved, "--out", tmp_path / "p.json")
    policy = json.loads((tmp_path / "p.json").read_text())
    config = {"quantization_config": {"runtime": {"diffusion_step_policy": policy}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("p.json", "config.json"):
        arguments = (tmp_path / name, "--plan", tmp_path / "plan.json", "--steps", 6, "--out", tmp_path / "new.json")
        code, out, err = run(capsys, "schedule", "import", *arguments, "--json")
        assert code == 0, err
        assert json.loads(out)["steps"] == ["a16", "native", "native", "native", "a16", "a16"]
        assert TemporalPlan.load(tmp_path / "new.json").levels["native"] == NATIVE


def test_generate_follows_a_schedule(capsys, tmp_path, shapes, _bundled, monkeypatch):
    """Each step at its level: pictures between those of the two levels, and what the library draws by itself."""
    levels = {f"W{bits}A8": Plan.uniform(_bundled.pipe.unet, bits, 8) for bits in (8, 4)}
    schedule = tmp_path / "schedule.json"
    TemporalPlan(levels, ("W8A8", "W4A8")).save(schedule)
    _bundled.calibration.save(tmp_path / "calibration.json")
    seen = []

    def follow(self, pipe):
        original(self, pipe)
        self.model.register_forward_pre_hook(lambda *_: seen.append(self.level))

    original = LevelRuntime.follow
    monkeypatch.setattr(LevelRuntime, "follow", follow)
    ask = ("--schedule", schedule, "--calibration", tmp_path / "calibration.json", "--prompt", _bundled.prompts[0])
    code, out, err = run(capsys, "generate", shapes.PIPELINE, *ask, "--out", tmp_path / "drawn", "--json")
    assert code == 0, err
    assert seen == ["W8A8", "W4A8"]
    with Image.open(json.loads(out)["pictures"][0]) as picture:
        drawn = torch.from_numpy(numpy.asarray(picture) / 255).permute(2, 0, 1)
    pipe = load_pipeline(str(shapes.PIPELINE), device="cpu")
    make_scheduled(pipe, TemporalPlan.load(schedule).with_calibration(_bundled.calibration))
    (expected,) = next(iter(generate(pipe, _bundled.prompts[:1], Sampling(steps=2, batch_size=1))))
    assert (drawn - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_a_search_on_a_pipeline_that_continues_and_reports(capsys, tmp_path, shapes, _bundled, monkeypatch):
    pipeline, prompts, plan = shapes.PIPELINE, tmp_path / "p.txt", tmp_path / "w8a8.json"
    prompts.write_text(_bundled.prompts[0])
    Plan.uniform(_bundled.pipe.unet, 8, 8).with_calibration(_bundled.calibration).save(plan)
    levels = ("--level", "16", "none", 1, "--level", "W8A8", plan, 0.5)
    arguments = (pipeline, "--prompts", prompts, "--steps", 2, *levels, "--metric", "mse", "--store", tmp_path / "s")
    code, out, err = run(
        capsys, "schedule", "search", *arguments, "--max-cost", 0.8, "--out", tmp_path / "s.json", "--json"
    )
    assert code == 0, err
    figures, found = json.loads(out), TemporalPlan.load(tmp_path / "s.json")
    assert found.counts == {"16": 1, "W8A8": 1} and figures["evaluations"] <= figures["evaluation_limit"] == 8
    assert figures["error"] > 0 and found.costs == {"16": 1.0, "W8A8": 0.5}

    def fail(self, schedule):
        raise AssertionError(f"{schedule} is drawn again")

    monkeypatch.setattr("mixdq_ao.temporal.measure.GenerationError.__call__", fail)
    again = ("--max-cost", 0.8, "--results", tmp_path / "schedule_results.json", "--out", tmp_path / "t.json")
    code, _, err = run(capsys, "schedule", "search", *arguments, *again)
    assert code == 0, err
    assert TemporalPlan.load(tmp_path / "t.json") == found
    results = ScheduleResults.load(tmp_path / "schedule_results.json")
    assert results.measured[found.steps] == figures["error"] and results.named["found at 0.75"] == found.steps
    assert len(results.measured) == figures["evaluations"]
    cheaper = [0.4 if word == 0.5 else word for word in arguments]
    code, _, err = run(capsys, "schedule", "search", *cheaper, "--max-cost", 0.8, "--out", tmp_path / "u.json")
    assert code == 0, err
    assert TemporalPlan.load(tmp_path / "u.json").costs == {"16": 1.0, "W8A8": 0.4}


def test_errors_that_are_all_equal_are_said_to_have_no_correlation(capsys, tmp_path, shapes, _bundled, monkeypatch):
    """What was measured is kept, and there to be printed."""
    prompts = tmp_path / "p.txt"
    prompts.write_text(_bundled.prompts[0])
    Plan.uniform(_bundled.pipe.unet, 8, 8).with_calibration(_bundled.calibration).save(tmp_path / "w8a8.json")
    monkeypatch.setattr("mixdq_ao.temporal.measure.GenerationError.__call__", lambda self, schedule: 0.5)
    levels = ("--level", "16", "none", 1, "--level", "W8A8", tmp_path / "w8a8.json", 0.5)
    asked = ("--prompts", prompts, "--steps", 3, *levels, "--max-cost", 0.8, "--check", 4)
    written = ("--results", tmp_path / "r.json", "--out", tmp_path / "s.json")
    code, out, err = run(capsys, "schedule", "search", shapes.PIPELINE, *asked, *written, "--json")
    assert code == 0, err
    assert json.loads(out)["r_squared"] is None and json.loads(out)["measured_over_predicted"] == 1
    assert len(ScheduleResults.load(tmp_path / "r.json").additivity) == 1
    code, out, _ = run(capsys, "schedule", "show", tmp_path / "s.json")
    assert code == 0 and "r squared                undefined" in out


def test_help_says_what_level_16_holds(capsys):
    _, out, _ = run(capsys, "schedule", "search", "--help")
    said = " ".join(out.split())
    assert "'none' for 16 bit: 8-bit weights and 16-bit activations, unless --keep-full" in said
    _, out, _ = run(capsys, "schedule", "export", "--help")
    assert "knows two levels: one of 16 bit" in " ".join(out.split())


def test_errors_are_one_line(capsys, saved, tmp_path):
    (tmp_path / "p.txt").write_text("a circle\n")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    imported = ("schedule", "import", tmp_path / "bad.json")
    generated = ("generate", tmp_path, "--prompt", "a circle", "--out", tmp_path / "pictures")
    search = ("schedule", "search", tmp_path, "--prompts", tmp_path / "p.txt")
    two = ("--level", "a", "none", 2, "--level", "b", "none", 1)
    cases = [
        (("schedule", "show", tmp_path / "none.json"), "cannot be read"),
        (("schedule", "show", tmp_path / "bad.json"), "expected 'mixdq-temporal-plan'"),
        (("schedule", "export", saved, "--config", tmp_path / "list.json"), "is a list, expected an object"),
        ((*imported, "--plan", tmp_path / "none.json", "--steps", "4"), "has no quantization_config.runtime"),
        (
            (*generated, "--schedule", saved, "--steps", "4"),
            "schedule.json is for 6 steps; leave out --steps, or search",
        ),
        ((*generated, "--schedule", saved, "--steps", "1"), "search a schedule for 1 step\n"),
        ((*generated, "--schedule", saved, "--plan", saved), "--plan and --schedule are both given"),
        ((*generated, "--schedule", tmp_path / "bad.json"), "expected 'mixdq-temporal-plan'"),
        (("schedule", "export", saved, "--config", tmp_path / "bad.json", "--out", tmp_path / "x"), "no quantization"),
        ((*search, "--level", "16", "none", "1", "--max-cost", "1"), "expected at least two"),
        ((*search, "--level", "a", "none", "x", "--max-cost", "1"), "--level a: cost is 'x'"),
        ((*search, *("--level", "a", "none", "1") * 2, "--max-cost", "1"), "--level a is given twice"),
        ((*search, "--level", "a", "none", "1"), "one of the arguments --max-cost --max-error is required"),
        ((*search, *two, "--max-cost", "0.5"), "costs 1.0"),
        ((*search, *two, "--max-cost", "1", "--check", "2"), "schedules is 2, expected at least 3"),
        ((*search, *two, "--max-cost", "1", "--check", "40", "--steps", "3"), "3 steps of 2 levels have fewer"),
        ((*search, *two, "--max-cost", "1", "--results", tmp_path), f"--results is {tmp_path}, a folder"),
        ((*search, *two, "--max-cost", "1", "--store", "s", "--out", "s"), "--store and --out are both s"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, *arguments)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1, (arguments, err)
