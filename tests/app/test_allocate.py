"""mixdq allocate on a pipeline: plans chosen by pictures, and what was measured beside what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixdq_ao import Plan, mixdq_config
from tests.command import run

PIPELINE = Path(__file__).parents[2] / "examples" / "shapes" / "pipeline"
BITS = ("--weight-bits", 4.5, "--act-bits", 8)


@pytest.fixture(scope="module")
def files(_bundled, tmp_path_factory) -> Path:
    """Sensitivities by two probes, ranges, and prompts, of the bundled pipeline."""
    from mixdq_ao import analyze

    folder = tmp_path_factory.mktemp("files")
    _bundled.calibration.save(folder / "calibration.json")
    options = {"calibration": _bundled.calibration, "probes": 2, "batch_size": 2}
    found = analyze(_bundled.pipe, _bundled.prompts[:2], method="probe", rule=lambda name: "quality", **options)
    found.save(folder / "sensitivity.json")
    (folder / "prompts.txt").write_text("\n".join(_bundled.prompts[:2]))
    return folder


def test_choosing_and_checking(files, tmp_path, capsys):
    """The winner has the most dB of all that were drawn; its plan says what it was predicted and measured to cost."""
    given = ("--calibration", files / "calibration.json", "--pipeline", PIPELINE, "--prompts", files / "prompts.txt")
    options = ("--choose", 3, "--seeds", 2, "--check", 3, "--json", "--out", tmp_path / "plan.json")
    code, text, err = run(capsys, "allocate", files / "sensitivity.json", *BITS, *given, *options)
    assert code == 0, err
    found, plan = json.loads(text), Plan.load(tmp_path / "plan.json")
    drawn = found["candidates"]
    assert len(drawn) == 3 and {c["pictures"] for c in drawn} == {4}
    assert [c["psnr"] for c in drawn] == sorted((c["psnr"] for c in drawn), reverse=True)
    assert found["predicted_error"] == drawn[0]["predicted_error"] == plan.metadata["predicted_error"]
    assert plan.metadata["measured_psnr"] == drawn[0]["psnr"] > 25
    assert plan.metadata["measured_error"] == found["measured_error"] > 0
    assert 0.3 < found["measured_over_predicted"] < 3
    assert found["prediction_agreement"]["plans"] == 3 and found["prediction_agreement"]["rank"] > 0
    assert all(layer.calibrated for layer in plan.layers.values())


def test_only_measuring(files, tmp_path, capsys):
    given = ("--calibration", files / "calibration.json", "--pipeline", PIPELINE, "--prompts", files / "prompts.txt")
    out = ("--objective", "additive", "--out", tmp_path / "plan.json")
    code, text, err = run(capsys, "allocate", files / "sensitivity.json", *BITS, *given, *out)
    assert code == 0, err
    assert "measured error" in text and "random plans" not in text and "candidates" not in text
    assert Plan.load(tmp_path / "plan.json").metadata["measured_error"] > 0


def test_16_bit_weights_come_with_16_bit_activations(files, tmp_path, capsys):
    bits = "--weight-bits", 12, "--weight-choices", "4,8,16"
    given = ("--objective", "additive", "--calibration", files / "calibration.json", "--out", tmp_path / "plan.json")
    code, _, err = run(capsys, "allocate", files / "sensitivity.json", *bits, *given)
    assert code == 0, err
    plan = Plan.load(tmp_path / "plan.json")
    assert any(layer.weight_bits == 16 for layer in plan.layers.values())
    mixdq_config(plan)  # refuses 16-bit weights with 8-bit activations


@pytest.mark.parametrize(
    "options, message",
    [
        (("--choose",), "--choose is about plans measured on a model; give --pipeline"),
        (("--steps", 4), "--steps is about plans measured on a model; give --pipeline"),
        (("--guidance-scale", 0), "--guidance-scale is about plans measured on a model"),
        (("--device", "cpu"), "--device is about plans measured on a model"),
        (("--pipeline", PIPELINE, "--prompts", "p", "--calibration", "c", "--seeds", 2), "--seeds is of --choose"),
        (("--check", 1), "'1' is not a whole number of at least 2"),
        (("--pipeline", PIPELINE), "--pipeline needs --prompts"),
        (("--pipeline", PIPELINE, "--prompts", "p.txt"), "--pipeline needs --calibration"),
    ],
)
def test_options_that_need_others(files, tmp_path, capsys, options, message):
    code, _, err = run(capsys, "allocate", files / "sensitivity.json", *BITS, *options, "--out", tmp_path / "plan.json")
    assert code == 2 and message in err
