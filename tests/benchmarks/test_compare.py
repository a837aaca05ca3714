"""Two records of a benchmark: which differences count as slower, and which rows are not comparable."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.compare import main

MACHINE = {"processor": "A", "cpu_capability": "AVX2", "vnni": False, "amx": False, "threads": 2, "gpu": None}


def row(speedup, spread=0.1):
    return {"ms": 1.0, "speedup": speedup, "low": speedup - spread, "high": speedup + spread}


@pytest.fixture
def record():
    contenders = {"float32": row(1.0, 0), "W8A8": row(2.0), "W4A8": row(1.8)}
    return {
        "machine_info": {"mixdq": MACHINE | {"packages": {"torch": "2.13.0"}}},
        "benchmarks": [{"name": "test_linear[a]", "extra_info": {"contenders": contenders}}, {"name": "other"}],
    }


def run(tmp_path, record, new, *options):
    paths = [tmp_path / "record.json", tmp_path / "new.json"]
    for path, document in zip(paths, (record, new), strict=True):
        path.write_text(document if isinstance(document, str) else json.dumps(document))
    return main([*map(str, paths), *options])


@pytest.mark.parametrize(
    ("now", "status"),
    [
        (row(2.0), 0),
        (row(1.75), 0),  # within the tolerance
        (row(1.5, 0.5), 0),  # the intervals meet: not sure
        (row(1.5), 1),
    ],
)
def test_slower(tmp_path, record, now, status, capsys):
    new = copy.deepcopy(record)
    new["benchmarks"][0]["extra_info"]["contenders"]["W8A8"] = now
    assert run(tmp_path, record, new) == status
    assert ("fell by more than" in capsys.readouterr().err) == bool(status)


def test_one_run_is_shown(tmp_path, record, capsys):
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert main([str(tmp_path / "record.json")]) == 0
    assert (
        "test_linear[a]" in (shown := capsys.readouterr().out)
        and "2.00 [1.90, 2.10]" in shown
        and "W8A8" in shown
        and "float32" not in shown
    )


def test_the_tolerance_is_an_option(tmp_path, record):
    new = copy.deepcopy(record)
    new["benchmarks"][0]["extra_info"]["contenders"]["W8A8"] = row(1.5)
    assert run(tmp_path, record, new, "--tolerance", "0.3") == 0


@pytest.mark.parametrize(("key", "value"), [("processor", "B"), ("threads", 4), ("vnni", True)])
def test_another_machine_is_refused(tmp_path, record, key, value, capsys):
    new = copy.deepcopy(record)
    new["machine_info"]["mixdq"][key] = value
    assert run(tmp_path, record, new) == 2
    error = capsys.readouterr().err
    assert "not the same machine" in error and key in error and repr(value) in error


def test_another_torch_is_refused(tmp_path, record, capsys):
    new = copy.deepcopy(record)
    new["machine_info"]["mixdq"]["packages"]["torch"] = "2.11.0"
    assert run(tmp_path, record, new) == 2 and "2.11.0" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"machine_info": {}, "benchmarks": []}'])
def test_files_that_are_no_results(tmp_path, record, content, capsys):
    assert run(tmp_path, record, content) == 2
    assert "new.json: not a result" in capsys.readouterr().err
