"""mixdq analyze by probes, in parts whose stores are merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixdq_ao import Sensitivity
from tests.command import run

PIPELINE = Path(__file__).parents[2] / "examples" / "shapes" / "pipeline"


@pytest.fixture
def given(_bundled, tmp_path) -> list[object]:
    _bundled.calibration.save(tmp_path / "calibration.json")
    (tmp_path / "prompts.txt").write_text("\n".join(_bundled.prompts[:2]))
    files = ["--prompts", tmp_path / "prompts.txt", "--calibration", tmp_path / "calibration.json"]
    return [PIPELINE, *files, "--weight-bits", 4, "--act-bits", 8, "--batch-size", 1]


def test_parts_and_their_whole(given, tmp_path, capsys):
    probes = ["--method", "probe", "--probes", 1, "--json"]
    for i in (1, 2):
        own = ["--part", f"{i}/2", "--store", tmp_path / f"part{i}"]
        code, text, err = run(capsys, "analyze", *given, *probes, *own)
        assert code == 0, err
        assert json.loads(text) == {"store": str(own[-1]), "results": 1, "results_of_all_parts": 2}
    stores = ["--store", tmp_path / "all", "--merge", tmp_path / "part1", tmp_path / "part2"]
    code, text, err = run(capsys, "analyze", *given, *probes, *stores, "--out", tmp_path / "s.json")
    assert code == 0 and json.loads(text)["layers"] == 175, err
    assert Sensitivity.load(tmp_path / "s.json").metadata["probes"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--part", "1/2"], "--part needs a --store of its own; give --store too"),
        (["--part", "5/4", "--store", "x"], "argument --part: part is 5/4, expected one from 1/4 to 4/4; see mixdq"),
        (["--part", "1", "--store", "x"], "argument --part: part is '1', expected one such as 2/8"),
        (["--part", "1/0", "--store", "x"], "argument --part: part is '1/0', expected one such as 2/8"),
        (["--probes", 3], "--probes is of --method probe"),
        (["--metric", "orthogonality", "--merge", "x"], "--merge has no use with --metric orthogonality"),
    ],
)
def test_options_that_need_others(given, capsys, options, message):
    code, _, err = run(capsys, "analyze", *given, *options)
    assert code == 2 and message in err


def test_a_part_without_a_calibration(capsys, tmp_path):
    """Only what is missing is named."""
    (tmp_path / "p.txt").write_text("a circle")
    arguments = ("--prompts", tmp_path / "p.txt", "--part", "1/2", "--store", tmp_path / "store")
    code, _, err = run(capsys, "analyze", PIPELINE, *arguments)
    assert code == 2 and "--part needs the same --calibration for all parts; give --calibration too" in err
    assert "--store" not in err
