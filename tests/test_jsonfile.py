"""What others may have written as JSON: numbers that float64 does not hold are refused where they are read."""

from __future__ import annotations

import numpy as np
import pytest

from mixdq_ao.errors import PlanError
from mixdq_ao.jsonfile import is_number, parse, read_document, write_document


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


def test_finite_numbers():
    assert all(map(is_number, (0, -1, 2.5, 1e308, np.float64(1))))
    assert not any(map(is_number, (True, None, "1", [1], float("nan"), float("inf"), 10**400)))
