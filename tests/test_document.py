"""Objects that are files: what is taken for one of them by mistake, how they print, files that cannot be written."""

from __future__ import annotations

import pytest

from mixdq_ao import (
    Calibration,
    CalibrationError,
    LayerSensitivity,
    MixDQError,
    Plan,
    PlanError,
    ScheduleError,
    Sensitivity,
    SensitivityError,
    TemporalPlan,
    allocate,
    allocate_orthogonal,
    analyze,
    input_moments,
    mixdq_config,
    prepare,
    probe_steps,
)

SENSITIVITY = Sensitivity({"a": LayerSensitivity(group="content", weight_size=1, act_size=1)})


@pytest.mark.parametrize(
    "use, error",
    [
        (lambda path, pipe: allocate(path, weight_bits=4), SensitivityError),
        (lambda path, pipe: allocate_orthogonal(path, weight_bits=4), SensitivityError),
        (lambda path, pipe: analyze(pipe, ["a"], calibration=path), CalibrationError),
        (lambda path, pipe: probe_steps(pipe, ["a"], steps=1, calibration=path), CalibrationError),
        (lambda path, pipe: input_moments(pipe, ["a"], calibration=path), CalibrationError),
        (lambda path, pipe: Plan({}).with_calibration(path), CalibrationError),
        (lambda path, pipe: mixdq_config(path), PlanError),
        (lambda path, pipe: prepare(pipe.unet, path), ScheduleError),
        (lambda path, pipe: prepare(pipe.unet, Plan({})), ScheduleError),
        (lambda path, pipe: prepare(pipe, TemporalPlan({"a": None}, ("a",))), MixDQError),
    ],
)
def test_what_is_given_instead_is_named(bundled, use, error):
    with pytest.raises(error, match=r" is (a |'of\.json'|Plan\().*, expected "):
        use("of.json", bundled.pipe)


def test_they_print_in_a_line(bundled):
    assert repr(bundled.calibration) == f"Calibration({len(bundled.calibration.layers)} layers)"
    assert repr(Plan({})) == "Plan(0 layers)" and repr(SENSITIVITY) == "Sensitivity(1 layers)"


@pytest.mark.parametrize("document", [Plan({}), Calibration({}), SENSITIVITY])
def test_a_place_where_nothing_can_be_written_is_named(tmp_path, document):
    (tmp_path / "file").write_text("")
    with pytest.raises(type(document).ERROR, match="file/plan.json: cannot be written"):
        document.save(tmp_path / "file" / "plan.json")
