"""mixdq recover: a plan in, a quantized denoiser out that loads again; errors in one line."""

from __future__ import annotations

import json

import pytest

from mixdq_ao import Plan, load_quantized
from mixdq_ao.quantize.tensor import is_quantized
from tests.command import run


@pytest.fixture
def files(tmp_path, _bundled):
    (tmp_path / "prompts.txt").write_text("\n".join(_bundled.prompts))
    _bundled.calibration.save(tmp_path / "calibration.json")
    plan = Plan.uniform(_bundled.pipe.unet, 2, 8)
    plan.save(tmp_path / "bare.json")
    plan.with_calibration(_bundled.calibration).save(tmp_path / "plan.json")
    return tmp_path


def test_recover_and_load(capsys, files, shapes):
    size = ("--steps", 3, "--batch-size", 4, "--trajectory", 1, "--checkpoint", files / "run")
    size += ("--fixed-scales", "--evaluate-every", 2, "--block-weight", 0.5)
    inputs = (shapes.PIPELINE, "--plan", files / "plan.json", "--prompts", files / "prompts.txt")
    code, out, err = run(capsys, "recover", *inputs, *size, "--out", files / "unet", "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["status"] == "finished" and figures["after"] <= figures["before"]
    assert figures["real"] == pytest.approx(figures["after"], rel=0.02)
    unet = load_quantized(files / "unet")
    assert is_quantized(unet.get_submodule("conv_in").weight)
    recipe = json.loads((files / "run" / "run.json").read_text())["recipe"]
    assert (recipe["learn_scales"], recipe["evaluate_every"], recipe["block_weight"]) == (False, 2, 0.5)
    longer = ("--steps", 5, *size[2:], "--out", files / "unet")
    code, out, err = run(capsys, "recover", *inputs, *longer)
    assert code == 2 and "steps was 3 there and is 5 now (a run cannot be lengthened" in err


def test_errors_are_one_line(capsys, files, shapes):
    inputs = (shapes.PIPELINE, "--prompts", files / "prompts.txt", "--out", files / "unet")
    cases = [
        (("--plan", files / "none.json"), "cannot be read"),
        (("--plan", files / "bare.json"), "no act_range"),
        (("--plan", files / "plan.json", "--steps", 0), "not a whole number of at least 1"),
        (("--plan", files / "plan.json", "--lr", -1), "lr is -1.0"),
        (("--plan", files / "plan.json", "--checkpoint", files / "plan.json"), "plan.json is no folder; choose"),
        (("--plan", files / "plan.json", "--checkpoint", shapes.PIPELINE), "holds a model (model_index.json)"),
        (("--plan", files / "plan.json", "--block-steps", 9, "--steps", 3), "block_steps is 9"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, "recover", *inputs, *arguments)
        assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1, (arguments, err)
    assert not (files / "unet").exists()


def test_where_the_model_goes_is_checked_before_the_training(capsys, files, shapes, monkeypatch):
    monkeypatch.setattr("mixdq_ao.app.commands.recover.load_pipeline", None)
    (files / "other").mkdir()
    (files / "other" / "config.json").write_text("{}")
    inputs = (shapes.PIPELINE, "--plan", files / "plan.json", "--prompts", files / "prompts.txt")
    cases = [
        (("--out", files / "other"), "holds another model, which is not overwritten"),
        (("--out", shapes.PIPELINE), "holds a whole pipeline"),
        (("--out", files / "run", "--checkpoint", files / "run"), f"--checkpoint and --out are both {files / 'run'}"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, "recover", *inputs, *arguments)
        assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1, (arguments, err)
