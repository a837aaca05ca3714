"""The index of results of record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_every_result_is_in_the_index():
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    stems = {p.stem for p in RESULTS.iterdir() if p.is_file() and p.name != "README.md"}
    missing = [s for s in stems if f"`{s}`" not in index and not s.startswith("recover_w")]
    assert not missing, f"benchmarks/results/README.md does not say what made {', '.join(sorted(missing))}"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: p.name)
def test_results_say_nothing_of_where_they_lay(path):
    text = path.read_text(encoding="utf-8")
    json.loads(text)
    assert "/root" not in text and "/home" not in text
