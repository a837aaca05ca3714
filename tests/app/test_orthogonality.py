"""mixdq analyze --metric orthogonality: a file the library reads, sampled steps, errors in one line; bits from it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mixdq_ao import Orthogonality, Plan, allocate_orthogonal, orthogonality
from tests.command import run

from ..search.test_orthogonality_allocate import measured
from .synthetic import sensitivity


@pytest.fixture
def analyze(shapes, _bundled, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(_bundled.prompts[:4]))
    return ("analyze", shapes.PIPELINE, "--prompts", tmp_path / "p.txt", "--metric", "orthogonality")


def test_what_the_library_measures(capsys, analyze, bundled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled.calibration.save(tmp_path / "c.json")
    options = ("--steps", 3, "--timesteps", 1, "--estimator", "unbiased", "--calibration", tmp_path / "c.json")
    code, _, err = run(capsys, *analyze, *options)
    assert code == 0 and "orthogonality.json: correlations of 175 layers over 4 prompts at 1 of 3 steps" in err
    found = Orthogonality.load(tmp_path / "orthogonality.json")
    expected = orthogonality(bundled.pipe, bundled.prompts[:4], steps=3, timesteps=1, estimator="unbiased")
    assert found.sampled == (1,) and found.estimator == "unbiased"
    np.testing.assert_allclose(found.matrices, expected.matrices, atol=1e-4)
    assert found.layers["conv_in"].weight_bytes


def test_errors_are_one_line(capsys, analyze, tmp_path):
    cases = [
        (("--store", tmp_path / "s"), "--store has no use with --metric orthogonality"),
        (("--timesteps", 2), "timesteps is 2, expected 1 to 1"),
        (("--metric", "error", "--timesteps", 2), "--timesteps has no use with --metric error"),
        (("--estimator", "x"), "invalid choice: 'x'"),
        (("--batch-size", 1), "expected at least 2 for the biased correlation"),
    ]
    for arguments, words in cases:
        code, out, err = run(capsys, *analyze, *arguments)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1, (arguments, err)
    assert not (tmp_path / "orthogonality.json").exists()


@pytest.mark.parametrize("form", [None, "linear", "error"])
def test_allocate_takes_the_file(capsys, tmp_path, form):
    path, out = tmp_path / "orthogonality.json", tmp_path / "plan.json"
    given = measured(layers=5)
    given.save(path)
    path.write_text("\ufeff" + path.read_text())  # as some editors save it
    options = () if form is None else ("--objective", form)
    code, text, err = run(
        capsys, "allocate", path, "--weight-bits", 4, *options, "--protect", "l1", "--json", "--out", out
    )
    assert code == 0, err
    expected = allocate_orthogonal(given, weight_bits=4, form=form or "error", protect=["l1"])
    assert Plan.load(out).layers == expected.plan.layers
    found = json.loads(text)
    assert found["status"] == expected.status and found["objective"] == expected.objective


def test_an_objective_of_the_other_file_is_one_line(capsys, tmp_path):
    path, scores, out = (tmp_path / n for n in ("orthogonality.json", "sensitivity.json", "plan.json"))
    measured().save(path)
    sensitivity(["conv_in", "conv_out"]).save(scores)
    cases = [
        (
            (path, "--objective", "additive"),
            "holds correlations between layers; expected one of error, linear, integer",
        ),
        ((scores, "--objective", "linear"), "holds errors of layers; expected one of additive, decoupled, sqnr"),
        ((path, "--weight-choices", "3"), "weight_choices"),
    ]
    for arguments, words in cases:
        code, text, err = run(capsys, "allocate", *arguments, "--weight-bits", 4, "--out", out)
        assert code == 2 and text == "" and words in err and err.count("\n") == 1, (arguments, err)
    assert not out.exists()
