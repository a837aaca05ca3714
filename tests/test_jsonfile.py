"""What others may have written as JSON: numbers that float64 does not hold are refused where they are read."""

from __future__ import annotations

import numpy as np
import pytest

from mixdq_ao.errors import PlanError
from mixdq_ao.expect import is_number
from mixdq_ao.jsonfile import WRITTEN_BY, parse, read_document, write_document
from tests.command import run


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "-1e999", "[0, 1.5e309]", '{"a": 1, "a": 2}'])
def test_what_is_not_read(text, tmp_path):
    with pytest.raises(ValueError):
        parse(text)
    (tmp_path / "d.json").write_text(f'{{"format": "f", "version": 1, "value": {text}}}')
    with pytest.raises(PlanError, match="d.json: not valid JSON"):
        read_document(tmp_path / "d.json", "f", 1, PlanError)


def test_numbers_come_back(tmp_path):
    values = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 10**400, 3, True]
    write_document(tmp_path / "d.json", {"format": "f", "version": 1, "values": values})
    assert repr(read_document(tmp_path / "d.json", "f", 1, PlanError)["values"]) == repr(values)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (
            {"format": "mixdq-calibration"},
            "format is 'mixdq-calibration' (from mixdq calibrate), expected 'mixdq-plan'",
        ),
        ({"format": "other"}, "format is 'other', expected 'mixdq-plan'; give a file that mixdq allocate writes"),
        ({"format": ["mixdq-plan"]}, "format is ['mixdq-plan'], expected 'mixdq-plan'"),
        ({"format": "x" * 999}, "format is 'xxx"),
        ({}, "d.json: has no format, expected 'mixdq-plan'; give a file that mixdq allocate writes"),
    ],
)
def test_a_file_of_another_kind_says_what_writes_the_right_one(tmp_path, header, words):
    write_document(tmp_path / "d.json", header)
    with pytest.raises(PlanError) as e:
        read_document(tmp_path / "d.json", "mixdq-plan", 1, PlanError)
    assert words in str(e.value) and len(str(e.value)) < len(str(tmp_path)) + 200


def test_what_writes_a_kind_exists(capsys):
    for command in set(WRITTEN_BY.values()):
        words = [word for word in command.split()[1:] if not word.startswith("-")]
        code, shown, _ = run(capsys, *words, "--help")
        assert code == 0 and all(word in shown for word in command.split())


def test_finite_numbers():
    assert all(map(is_number, (0, -1, 2.5, 1e308, np.float64(1))))
    assert not any(map(is_number, (True, None, "1", [1], float("nan"), float("inf"), 10**400)))
