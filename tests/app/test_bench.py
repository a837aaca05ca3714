"""mixdq bench: which benchmarks it finds, what it prints, and what it says when something is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mixdq_ao.app import benchmarks
from mixdq_ao.errors import MixDQError
from tests.command import run

CASE = """
import pytest

@pytest.mark.quick
def test_quick(benchmark):
    benchmark.extra_info["bytes"] = 12
    benchmark(lambda: sum(range(10)))

def test_long(benchmark):
    benchmark(lambda: None)

@pytest.mark.gpu
def test_elsewhere(benchmark):
    benchmark(lambda: None)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with one benchmark, in the place of ours."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "test_case.py").write_text(CASE)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers =\n    gpu: needs a GPU\n    quick: short\n")
    monkeypatch.setattr(benchmarks, "_root", lambda: tmp_path)
    for name in [n for n in os.environ if n.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # or pytest-benchmark takes its process for one of several workers
    return tmp_path


def test_figures_of_a_run(capfd, checkout):
    out = checkout / "kept" / "figures.json"
    code, text, err = run(capfd, "bench", "quick", "--json", "--rounds", "2", "--out", out)
    assert code == 0, err
    figures = json.loads(text)["benchmarks/test_case.py::test_quick"]
    assert 0 < figures["min"] <= figures["median"] and figures["rounds"] >= 2 and figures["bytes"] == 12
    assert len(json.loads(out.read_text())["benchmarks"]) == 1


def test_names_and_what_is_wrong(capfd, checkout):
    code, text, _ = run(capfd, "bench", "--list")
    case = "benchmarks/test_case.py::"
    assert code == 0 and text.split() == [case + "test_quick", case + "test_long"]
    assert run(capfd, "bench", "--list", "--quick")[1].split() == [case + "test_quick"]
    assert run(capfd, "bench", "--list", "--gpu", "elsewhere")[1].split() == [case + "test_elsewhere"]
    code, _, err = run(capfd, "bench", "nothing-like-it", "--list")
    assert code == 2 and "no benchmark matches nothing-like-it" in err
    (checkout / "benchmarks" / "test_case.py").write_text("def test_bad(benchmark):\n    benchmark(lambda: 1 / 0)\n")
    code, _, err = run(capfd, "bench")
    assert code == 2 and "the benchmarks ended with code 1" in err


def test_what_to_install(monkeypatch):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None if name == "pytest_benchmark" else object())
    with pytest.raises(MixDQError, match=r"need pytest-benchmark: pip install 'mixdq-ao\[test\]'"):
        benchmarks.names_of()


def test_an_installed_wheel_has_no_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "__file__", str(tmp_path / "a" / "b" / "benchmarks.py"))
    with pytest.raises(MixDQError, match="run this from a checkout"):
        benchmarks.names_of()
